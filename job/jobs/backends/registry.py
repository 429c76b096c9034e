"""Whether an image is in its registry, asked as container engines ask it (OCI distribution specification, 4.4)."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from job.exits import Exit
from job.jobs.checks import Check

NAME = "image"
ANSWER_SECONDS = 4.0
_GOOGLE = re.compile(r"([a-z0-9-]+-docker\.pkg\.dev|([a-z0-9-]+\.)?gcr\.io)")
_KINDS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CHALLENGE = re.compile(r'(realm|service|scope)="([^"]*)"')
_LONGEST_ANSWER_BYTES = 1 << 16


def image_check(image: str) -> Check:
    """Looks for an image; one that nobody here may see is no failure, for the machines have rights of their own."""
    if not image:
        return Check(NAME, False, "the target names none", "set its `image:`")
    host, path, reference = parsed(image)
    if host == "localhost":
        return Check(NAME, False, f"{image} is on this machine alone", "`make push-image`, and set `image:`")
    url = f"{_scheme(host)}://{host}/v2/{quote(path)}/manifests/{quote(reference, safe=':')}"
    try:
        status = _status(url, _google_token() if _GOOGLE.fullmatch(host) else "")
    except (OSError, HTTPException, ValueError) as error:
        return Check(NAME, True, f"not looked at: {host} does not answer ({error})")
    if status == 200:
        return Check(NAME, True, f"{image} is there")
    if status == 404:
        remedy = "`make push-image` puts it there"
        return Check(NAME, False, f"{image} is not in its registry", remedy, Exit.MISSING_INPUT)
    return Check(NAME, True, f"{image}: {host} does not show it here ({status}); the machines' account must see it")


def parsed(image: str) -> tuple[str, str, str]:
    """Host, path and tag or digest of an image's name, as container engines take it apart."""
    name, at, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    is_host = bool(slash) and (any(sign in first for sign in ".:") or first == "localhost")
    host, path = (first, rest) if is_host else ("registry-1.docker.io", name if slash else f"library/{name}")
    host = "registry-1.docker.io" if host in ("docker.io", "index.docker.io") else host
    stem, colon, tag = path.rpartition(":")
    path, tag = (stem, tag) if colon else (path, "latest")
    return host, path, digest if at else tag


def _scheme(host: str) -> str:
    return "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"


class _NoRedirects(HTTPRedirectHandler):
    """A token is for the registry, and for nobody that it points to."""

    def redirect_request(self, *_: object) -> None:
        return None


def _status(url: str, token: str) -> int:
    """What the registry answers; with the token that it gives to everybody, if it wants one."""
    status, challenge = _asked(url, token)
    if status != 401 or token or not challenge.lower().startswith("bearer "):
        return status
    words = dict(_CHALLENGE.findall(challenge))
    realm = urlsplit(words.pop("realm", ""))
    if realm.scheme != _scheme(realm.netloc):
        return status
    question = Request(f"{realm.geturl()}?{urlencode(words)}")  # noqa: S310 -- the scheme has been looked at
    try:
        with build_opener(_NoRedirects).open(question, timeout=ANSWER_SECONDS) as answer:
            given = json.loads(answer.read(_LONGEST_ANSWER_BYTES))
    except HTTPError:
        return status
    token = str(given.get("token") or given.get("access_token") or "") if isinstance(given, dict) else ""
    return _asked(url, token)[0] if token else status


def _asked(url: str, token: str) -> tuple[int, str]:
    headers = {"Accept": ", ".join(_KINDS), **({"Authorization": f"Bearer {token}"} if token else {})}
    request = Request(url, method="HEAD", headers=headers)  # noqa: S310 -- the scheme is ours
    try:
        with build_opener(_NoRedirects).open(request, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status), ""
    except HTTPError as error:
        return error.code, error.headers.get("WWW-Authenticate", "")


def _google_token() -> str:
    """Of the credentials in use; none where there are none, or no library for them."""
    with suppress(Exception):
        import google.auth
        from google.auth.transport.requests import Request as Refresh

        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        credentials.refresh(Refresh())
        return str(credentials.token or "")
    return ""

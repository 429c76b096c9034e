"""Sources on the web: an https:// archive, or a file or folder of a dataset at the hub (hf://datasets/ORG/NAME/…).

A file is fetched into the cache, and stays there until it is packed. A fetch that broke off goes on where it was, but
only in the same file. A folder's files are read one by one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from filelock import FileLock, Timeout

from job.code_version import how_to_install
from job.data.cache import default_cache_dir
from job.exits import (
    BadDataError,
    BadRequestError,
    BucketAwayError,
    DiskFullError,
    JobError,
    MissingInputError,
    NoPermissionError,
)
from job.progress import Progress
from job.store import Retry
from job.store.files import os_errors
from job.store.retry import FIRST_PAUSE_SECONDS

if TYPE_CHECKING:
    import aiohttp

SCHEMES = ("https", "http", "hf")
CHUNK_BYTES = 1 << 20
SPARE_BYTES = 1 << 30
"""Of the disk, that a fetched file leaves free."""
_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_on_the_web(source: str) -> bool:
    """Whether a source is one of these."""
    return source.partition("://")[0].lower() in SCHEMES and "://" in source


def check_web_source(source: str) -> None:
    """Returns if a source on the web may be asked for.

    Raises:
        BadRequestError: it is no https:// or hf://datasets/, or holds a password, which lists would show.
    """
    parts = urlsplit(source)
    if parts.username or parts.password:
        raise BadRequestError("a source on the web must not hold a user or password: lists and logs would show them")
    if not _is_safe(source):
        raise BadRequestError(f"{source.partition('?')[0]}: anybody on the way could change it: use https://")
    if parts.scheme.lower() == "hf" and (parts.netloc != "datasets" or parts.path.count("/") < 2):
        raise BadRequestError(f"{source}: of the hub datasets are read, as hf://datasets/ORG/NAME[@REVISION][/PATH]")


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme.lower() in ("https", "hf") or (parts.scheme.lower() == "http" and parts.hostname in _LOCAL)


@dataclass(frozen=True)
class Answer:
    """What a server sends of a file."""

    start: int
    """Where in the file it begins: at 0 unless the server went on as it was asked to."""
    version: str
    """As the server tells it; empty if it does not."""
    chunks: Iterator[bytes]


class Web:
    """A source on the web, by fsspec's file systems, with this program's patience and errors."""

    def __init__(self, source: str, retry: Retry) -> None:
        """Raises `BadRequestError` if what speaks to it is not installed."""
        check_web_source(source)
        self.source, self.retry = source, retry
        self.shown = source.partition("?")[0]
        """Without a query, which may be a signature."""
        self.name = self.shown.rstrip("/").rpartition("/")[2]
        is_hub = source.lower().startswith("hf://")
        try:
            import aiohttp
            import fsspec

            silence_seconds = retry.silence_seconds
            limits = aiohttp.ClientTimeout(total=None, sock_connect=silence_seconds, sock_read=silence_seconds)
            redirects = aiohttp.TraceConfig()
            redirects.on_request_redirect.append(self._check_redirect)
            # Listings and files may have changed since another command asked.
            own = {"skip_instance_cache": True, "use_listings_cache": False}
            session = {"timeout": limits, "trace_configs": [redirects]}
            self._http: Any = fsspec.filesystem("https", client_kwargs=session, **own)
            self._hub: Any = fsspec.filesystem("hf", **own) if is_hub else None
        except (ImportError, ValueError) as error:
            needed = f"{source.partition('://')[0]}:// needs more than is installed ({error})"
            raise BadRequestError(f"{needed}: {how_to_install('web')}") from None
        self._path = source[len("hf://") :] if is_hub else source

    def info(self) -> dict[str, Any]:
        """What is known of the source itself: `type`, `size` in bytes, and `ETag` where the server says it."""
        found: dict[str, Any] = self._ask(partial((self._hub or self._http).info, self._path))
        return found

    def files(self) -> list[tuple[str, int]]:
        """Relative paths and sizes in bytes of what is below a folder of the hub, in order."""
        found: dict[str, dict[str, Any]] = self._ask(partial(self._hub.find, self._path, detail=True))
        return sorted((name.removeprefix(f"{self._path}/"), int(each["size"] or 0)) for name, each in found.items())

    def read(self, name: str, size_bytes: int) -> bytes:
        """A file below a folder of the hub, which must be so large.

        Raises:
            BadDataError: it has another size.
        """

        def whole() -> bytes:
            content = b""
            for chunk in self.asked(name).chunks:
                content += chunk
                if len(content) > size_bytes:
                    break
            if len(content) != size_bytes:
                raise _wrong_size(f"{self.shown}/{name}", size_bytes, len(content))
            return content

        return self.retry(whole)

    def asked(self, name: str = "", start: int = 0, version: str = "") -> Answer:
        """Asks once for a file from byte `start` on, if it is still of this version.

        Raises:
            JobError: as the server refuses it; `BucketAwayError` if it may answer later.
        """
        url, headers = self._path, {"Accept-Encoding": "identity"}
        if self._hub is not None:
            from huggingface_hub import get_token

            url = self._hub.url(f"{self._path}/{name}" if name else self._path)
            headers |= {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
        if start:
            headers |= {"Range": f"bytes={start}-"} | ({"If-Range": version} if version else {})

        async def get() -> aiohttp.ClientResponse:
            session = await self._http.set_session()
            response: aiohttp.ClientResponse = await session.get(url, headers=headers)
            response.raise_for_status()
            return response

        response = self._told(partial(self._sync, get))
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        return Answer(start if goes_on else 0, response.headers.get("ETag", ""), self._chunks(response))

    async def _check_redirect(self, _: object, __: object, sent: aiohttp.TraceRequestRedirectParams) -> None:
        headers = sent.response.headers
        target = urljoin(str(sent.url), headers.get("Location") or headers.get("URI") or "")
        if not _is_safe(target):
            shown = target.partition("?")[0]
            raise BadRequestError(f"{self.shown} leads to {shown:.100}, which is not https://: download it")

    def _chunks(self, response: aiohttp.ClientResponse) -> Iterator[bytes]:
        try:
            while chunk := self._told(partial(self._sync, response.content.read, CHUNK_BYTES)):
                self.retry.is_under_way(self.shown)
                yield chunk
        finally:
            response.close()

    def _sync(self, work: Callable[..., Any], *args: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._http.loop, work, *args)

    def _ask(self, question: Callable[[], Any]) -> Any:
        return self.retry(partial(self._told, question))

    def _told(self, question: Callable[[], Any]) -> Any:
        where = self.shown
        try:
            return question()
        except Exception as error:
            # fsspec raises a FileNotFoundError for every failure, and its cause says which one it was.
            cause = error.__cause__ or error
            if isinstance(cause, JobError):
                raise cause from None
            status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
            # The query of an address may be a signature, also where a server redirects to.
            said = " ".join(re.sub(r"\?[^\s'\")]+", "", str(cause)).split()) or type(cause).__name__
            if status in (401, 403):
                how = "sign in with `hf auth login`" if self._hub else "download it where you are signed in"
                raise NoPermissionError(f"{where} may not be read ({said:.200}): {how}") from None
            if status in (404, 410) or isinstance(cause, FileNotFoundError):
                raise MissingInputError(f"there is nothing at {where}: check the address") from None
            if status == 416:
                raise BadDataError(f"{where} ends before the size that the server gives: download it") from None
            # Any other failure may pass.
            raise BucketAwayError(f"{where} does not answer: {said:.200}") from error


def fetched(web: Web, info: dict[str, Any]) -> Path:
    """The file at a source, on the local disk.

    Raises:
        BadDataError: the server does not say how large it is, or sends another size.
        BadRequestError: another process fetches it.
        DiskFullError: the disk has no room for it.
    """
    size_bytes, version = info.get("size"), str(info.get("ETag") or "")
    if not size_bytes:
        raise BadDataError(f"{web.shown} does not say how large it is: download it, and pack the file")
    known = hashlib.sha256(f"{size_bytes}\0{version}".encode()).hexdigest()[:16]
    whole = _place(web.source).with_suffix(f".{known}")
    with os_errors(whole.parent):
        whole.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{whole}.lock", timeout=0):
            if not whole.exists():
                _fetch(web, whole, size_bytes, version)
    except Timeout:
        raise BadRequestError(f"another process fetches {web.shown} just now: begin again when it is done") from None
    return whole


def forget(source: str) -> None:
    """Removes what was fetched of a source: it is packed, or of no use."""
    if not is_on_the_web(source):
        return
    place = _place(source)
    for path in place.parent.glob(f"{place.name}.*"):
        path.unlink(missing_ok=True)


def _place(source: str) -> Path:
    return default_cache_dir() / "sources" / hashlib.sha256(source.encode()).hexdigest()[:32]


def _fetch(web: Web, whole: Path, size_bytes: int, version: str) -> None:
    part = whole.with_name(f"{whole.name}-part")
    with os_errors(part), part.open("a+b") as file:
        free_bytes = shutil.disk_usage(part.parent).free
        if size_bytes - file.tell() > free_bytes - SPARE_BYTES:
            raise DiskFullError(
                f"{web.shown} has {size_bytes:,} bytes, and {part.parent} room for {free_bytes:,}: set DDPM_CACHE to a "
                "larger disk, or pack it from a bucket"
            )
        furthest = file.tell()
        with Progress(f"fetching {web.name}", total=size_bytes >> 20, unit="MiB", start=furthest >> 20) as bar:

            def go_on() -> None:
                nonlocal furthest
                start = file.seek(0, 2)
                answer = web.asked("", start, version)
                if version and answer.version not in ("", version):
                    raise BadDataError(f"{web.shown} was changed just now: begin again")
                if answer.start != start:
                    file.seek(file.truncate(0))
                try:
                    for chunk in answer.chunks:
                        file.write(chunk)
                        bar.update(file.tell() >> 20)
                        if file.tell() > size_bytes:
                            break
                    # The rest may come in parts, but an answer from the first byte on is the whole file.
                    if answer.start and file.tell() < size_bytes:
                        raise BucketAwayError(f"{web.shown} sends {file.tell():,} of {size_bytes:,} bytes")
                except BucketAwayError:
                    # A server without ranges sends the same bytes again for ever, and they are no progress.
                    if file.tell() <= furthest:
                        raise
                    furthest = file.tell()
                    web.retry.stop.sleep(FIRST_PAUSE_SECONDS)
                    return
                if (received_bytes := file.tell()) != size_bytes:
                    file.truncate(0)
                    raise _wrong_size(web.shown, size_bytes, received_bytes)

            while file.seek(0, 2) < size_bytes:
                web.retry(go_on)
    part.replace(whole)


def _wrong_size(where: str, size_bytes: int, received_bytes: int) -> JobError:
    """Returns the error that a whole answer has another size than the server gave; an empty one may be an outage."""
    said = f"{where}: the server gives a size of {size_bytes:,} bytes and sends {received_bytes:,} or more"
    return BadDataError(f"{said}: download it yourself, and pack the file") if received_bytes else BucketAwayError(said)

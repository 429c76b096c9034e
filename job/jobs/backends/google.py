"""The APIs of Google Cloud that jobs need, asked in JSON, and their errors as ones that a person can act on.

Endpoints are those of the services, or what gcloud's own variables say, such as a private endpoint:
`CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`, `…_BATCH`, `…_LOGGING`, `…_IAM`. One in plain http is a server on a
developer's machine: no credentials go there.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import NoCapacityError

Answer = dict[str, Any]
"""JSON, in the words of the API's reference page."""

API_RETRY_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Between attempts, while an API does not answer or says that it is too busy."""
API_TIMEOUT_SECONDS = 30.0
HURRIED_TIMEOUT_SECONDS = 4.0
LOG_PAGE_ENTRIES = 1000
ENDPOINT_VARIABLE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_"
LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""Of tokens, here and on machines: what an account may do is decided by its roles alone."""
_PATHS = {"compute": "compute/v1", "batch": "v1", "logging": "v2", "iam": "v1"}
_STOCK_OUT = re.compile(r"RESOURCE_POOL_EXHAUSTED|does not have enough resources|STOCKOUT|resource_availability", re.I)
_QUOTA = re.compile(r"QUOTA_EXCEEDED|quotaExceeded|Quota '[A-Z0-9_-]+' exceeded", re.I)
_GOOGLE_PERMISSION = re.compile(
    r"'?([a-z]+(?:\.[a-zA-Z]+)+)'? permission|permission:? '?([a-z]+(?:\.[a-zA-Z]+)+)", re.I
)
_LONGEST_REASON = 400


class GoogleNotFoundError(MissingInputError):
    """Google answered 404."""


class GoogleApis:
    """What is asked about one project.

    Attributes:
        project: its id.
        is_hurried: whether each request is tried once, and not for long: somebody waits for the answers.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self.is_hurried = False

    def ask(self, what: str, request: str, body: Answer | None = None, **query: str) -> Answer:
        """What an API answers; it is asked again while it is away or too busy.

        Args:
            what: the thing that it is about, for messages.
            request: method, API and path, such as `GET compute/projects/p`; it has to bear repetition.
            body: of the request.
            query: parameters in the URL.

        Raises:
            GoogleNotFoundError: 404.
            JobError: see `refusal`.
        """
        for pause_seconds in () if self.is_hurried else API_RETRY_PAUSES_SECONDS:
            try:
                return self._ask_once(what, request, body, query)
            except BucketAwayError:
                time.sleep(pause_seconds)
        return self._ask_once(what, request, body, query)

    def pages(self, what: str, request: str, body: Answer | None = None, **query: str) -> Iterator[Answer]:
        """As `ask`, for a method whose answer comes in pages."""
        token: Answer = {}
        while True:
            page = self.ask(what, request, body and {**body, **token}, **query, **({} if body else token))
            yield page
            if not page.get("nextPageToken"):
                return
            token = {"pageToken": page["nextPageToken"]}

    def _ask_once(self, what: str, request: str, body: Answer | None, query: dict[str, str]) -> Answer:
        import requests
        from google.auth.exceptions import GoogleAuthError, TransportError

        method, _, target = request.partition(" ")
        api, _, path = target.partition("/")
        endpoint = urlsplit(os.environ.get(ENDPOINT_VARIABLE + api.upper()) or f"https://{api}.googleapis.com")
        # gcloud's values end with a path, such as /compute/v1/, or do not.
        url = f"{endpoint.scheme}://{endpoint.netloc}/{_PATHS[api]}/{path}"
        timeout_seconds = HURRIED_TIMEOUT_SECONDS if self.is_hurried else API_TIMEOUT_SECONDS
        try:
            session = requests.Session() if endpoint.scheme == "http" else _authorized_session()
            answer = session.request(method, url, params=query, json=body, timeout=timeout_seconds)
            if answer.ok:
                found: Answer = answer.json()
                return found
        except (requests.RequestException, TransportError) as error:
            raise refusal(None, _innermost(error), what, self.project) from error
        except GoogleAuthError as error:
            raise NoPermissionError(f"{what}: no usable Google credentials ({_innermost(error)}): {LOGIN}") from error
        raise refusal(answer.status_code, _refusal_text(answer), what, self.project)


@cache
def _authorized_session() -> Any:
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    with warnings.catch_warnings():
        # It is about quotas of users without a project; ours is named in each request.
        warnings.simplefilter("ignore")
        return AuthorizedSession(google.auth.default(scopes=[CLOUD_SCOPE])[0])


def refusal(status: int | None, reason: str, what: str, project: str) -> JobError:
    """What an API or an operation of it says, as an error that a person can act on; without a status for no answer.

    `GoogleNotFoundError` for 404, `NoPermissionError` for 401 and 403, `NoCapacityError` for a machine out of stock,
    `BadRequestError` for a quota and every other refusal, and `BucketAwayError` for no answer, 408, 429 and 5xx.
    """
    reason = " ".join(reason.split())
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}…"
    if _STOCK_OUT.search(reason):
        return NoCapacityError(
            f"{what}: there is no such machine now ({reason}): try another zone or region, later, or --on-demand"
        )
    if _QUOTA.search(reason) and "rate" not in reason.lower():
        return BadRequestError(
            f"{what}: the quota of project {project} does not allow it ({reason}): ask for more at "
            f"{quota_page(project)}; spot machines have their own quota"
        )
    if status == 404:
        return GoogleNotFoundError(f"{what} is not there ({reason})")
    if status == 401:
        return NoPermissionError(f"{what}: Google does not know who asks ({reason}): {LOGIN}")
    if status == 403 and "rateLimitExceeded" not in reason:
        found = _GOOGLE_PERMISSION.search(reason)
        permission = f" {found[1] or found[2]}" if found else ""
        return NoPermissionError(
            f"{what}: no permission{permission} ({reason}): have an owner of project {project} grant the account in "
            "use a role with it"
        )
    if status is not None and 400 <= status < 500 and status not in (403, 408, 429):
        return BadRequestError(f"{what}: Google refused with {status}: {reason}")
    return BucketAwayError(
        f"{what}: Google's API is away or too busy ({reason}): check the network, or try again later"
    )


def quota_page(project: str) -> str:
    """Where somebody asks for a larger quota."""
    return f"https://console.cloud.google.com/iam-admin/quotas?project={project}"


def _refusal_text(answer: Any) -> str:
    """What a refusal says (cloud.google.com/apis/design/errors, and Compute Engine's words with it)."""
    try:
        error = answer.json()["error"]
        words = [str(error["message"]), *(str(item.get("reason", "")) for item in error.get("errors", ()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(answer.text or answer.reason)
    return " ".join(dict.fromkeys(filter(None, words)))


def _innermost(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def quoted(value: str) -> str:
    """A value as filters have it (cloud.google.com/logging/docs/view/logging-query-language)."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def log_entries(apis: GoogleApis, filter_: str, since: datetime, order: str = "asc") -> Iterator[Answer]:
    """The entries of logs that match `filter_` from `since` on, in the order of their times, or `desc`."""
    asked = {
        "resourceNames": [f"projects/{apis.project}"],
        # Without a time the API gives the last day alone.
        "filter": f"({filter_}) AND timestamp>={quoted(since.astimezone(UTC).isoformat().replace('+00:00', 'Z'))}",
        "orderBy": f"timestamp {order}",
        "pageSize": LOG_PAGE_ENTRIES,
    }
    for page in apis.pages(f"the log of project {apis.project}", "POST logging/entries:list", asked):
        yield from page.get("entries", ())


def utc_text(at: datetime) -> str:
    """ISO 8601, to the second."""
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

"""The APIs of Google Cloud that jobs need, asked in JSON, and their errors as ones that a person can act on.

Endpoints are those of the services, or what gcloud's own variables say, such as a private endpoint:
`CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`, `…_BATCH`, `…_LOGGING`, `…_IAM`. One in plain http is a server on a
developer's machine: no credentials go there.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
import uuid
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple
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
QUOTA_PAGE = "https://console.cloud.google.com/iam-admin/quotas?project={project}"
"""Where somebody asks for more."""
_PATHS = {"compute": "compute/v1", "batch": "v1", "logging": "v2", "iam": "v1"}
_LONGEST_REASON = 400


class GoogleNotFoundError(MissingInputError):
    """Google answered 404."""


class _Refusal(NamedTuple):
    """What an answer means: the error, and in it what is wrong and what to do."""

    error: type[JobError]
    said: str
    remedy: str


_AWAY = _Refusal(BucketAwayError, "Google's API is away or too busy", "check the network, or try again later")
_STATUSES = {
    401: _Refusal(NoPermissionError, "Google does not know who asks", LOGIN),
    403: _Refusal(NoPermissionError, "no permission", "have an owner of the project grant a role that has it"),
    404: _Refusal(GoogleNotFoundError, "it is not there", "check its name, and project and place in the target"),
    408: _AWAY,
    429: _AWAY,
}
_OTHER_STATUS = _Refusal(BadRequestError, "Google refused it", "change what it names")
_SHORTAGES = {
    r"RESOURCE_POOL_EXHAUSTED|does not have enough resources|STOCKOUT|resource_availability": _Refusal(
        NoCapacityError, "there is no such machine now", "try another zone or region, later, or --on-demand"
    ),
    r"QUOTA_EXCEEDED|quotaExceeded|Quota '[A-Z0-9_-]+' exceeded": _Refusal(
        BadRequestError, "the project's quota does not allow it", f"ask for more at {QUOTA_PAGE}; spot has its own"
    ),
}
"""By what Compute Engine says, whatever its status; Batch passes the same words on."""


class GoogleApis:
    """What is asked about one project.

    Attributes:
        project: its id.
        is_hurried: whether each request is tried once, and not for long: somebody waits for the answers.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self.is_hurried = False

    def ask(self, request: str, body: Answer | None = None, **query: str) -> Answer:
        """What an API answers; it is asked again while it is away or too busy.

        Args:
            request: method, API and path, such as `GET compute/projects/p`; it has to bear repetition.
            body: of the request.
            query: parameters in the URL.

        Raises:
            JobError: see `refusal`.
        """
        for pause_seconds in () if self.is_hurried else API_RETRY_PAUSES_SECONDS:
            try:
                return self._ask_once(request, body, query)
            except BucketAwayError:
                time.sleep(pause_seconds)
        return self._ask_once(request, body, query)

    def create(self, request: str, body: Answer, **query: str) -> Answer:
        """As `ask`; a repetition whose first answer was lost does not find its own thing in its way."""
        return self.ask(request, body, **query, requestId=str(uuid.uuid4()))

    def pages(self, request: str, body: Answer | None = None, **query: str) -> Iterator[Answer]:
        """As `ask`, for a method whose answer comes in pages."""
        token: Answer = {}
        while True:
            page = self.ask(request, body and {**body, **token}, **query, **({} if body else token))
            yield page
            if not page.get("nextPageToken"):
                return
            token = {"pageToken": page["nextPageToken"]}

    def log_entries(self, filter_: str, since: datetime) -> Iterator[Answer]:
        """The entries of logs that match `filter_` from `since` on, in the order of their times."""
        asked = {
            "resourceNames": [f"projects/{self.project}"],
            # Without a time the API gives the last day alone.
            "filter": f'({filter_}) AND timestamp>="{since.isoformat()}"',
            "orderBy": "timestamp asc",
            "pageSize": LOG_PAGE_ENTRIES,
        }
        for page in self.pages("POST logging/entries:list", asked):
            yield from page.get("entries", ())

    def _ask_once(self, request: str, body: Answer | None, query: dict[str, str]) -> Answer:
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
            raise refusal(None, _innermost(error), request, self.project) from error
        except GoogleAuthError as error:
            raise NoPermissionError(
                f"{request}: no usable Google credentials ({_innermost(error)}): {LOGIN}"
            ) from error
        raise refusal(answer.status_code, _refusal_text(answer), request, self.project)


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
    found = shortage(reason)
    if found is None:
        is_refused = status is not None and 400 <= status < 500 and "rateLimitExceeded" not in reason
        found = _STATUSES.get(status or 0, _OTHER_STATUS) if is_refused else _AWAY
    reason = textwrap.shorten(reason, _LONGEST_REASON, placeholder=" …")
    return found.error(f"{what}: {found.said} ({reason}): {found.remedy.format(project=project)}")


def shortage(text: str) -> _Refusal | None:
    """What a machine that cannot be had is for want of; None if the text says nothing of the kind."""
    return next((found for pattern, found in _SHORTAGES.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _refusal_text(answer: Any) -> str:
    """What a refusal says (cloud.google.com/apis/design/errors, and Compute Engine's words with it)."""
    try:
        error = answer.json()["error"]
        words = [str(error["message"]), *(str(item.get("reason", "")) for item in error.get("errors", ()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(answer.text or answer.reason)
    return " ".join(dict.fromkeys(words))


def _innermost(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def utc_text(at: str) -> str:
    """A time of an API as ISO 8601 in UTC, to the second."""
    return datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

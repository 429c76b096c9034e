"""The APIs of Google Cloud that jobs need: their clients, and their errors as ones that a person can act on.

Endpoints are those of the services, or what gcloud's own variables say, such as a private endpoint:
`CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`, `…_BATCH`, `…_LOGGING`. One in plain http is a server on a developer's
machine: no credentials go there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import NoCapacityError

T = TypeVar("T")

PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Between attempts, while an API does not answer or says that it is too busy."""
TIMEOUT_SECONDS = 30.0
HURRIED_SECONDS = 4.0
ENDPOINT_VARIABLE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_"
_STOCK_OUT = re.compile(r"RESOURCE_POOL_EXHAUSTED|does not have enough resources|STOCKOUT|resource_availability", re.I)
_QUOTA = re.compile(r"QUOTA_EXCEEDED|quotaExceeded|Quota '[A-Z0-9_-]+' exceeded", re.I)
_PERMISSION = re.compile(r"'?([a-z]+(?:\.[a-zA-Z]+)+)'? permission|permission:? '?([a-z]+(?:\.[a-zA-Z]+)+)", re.I)
_REQUEST = re.compile(r"^(?:\d{3} )?(?:(?:GET|POST|PUT|DELETE) \S+: )?")
_REASON_CHARACTERS = 400
LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"


class NotThereError(MissingInputError):
    """Google answered 404."""


class GoogleApis:
    """Clients for one project, each made when it is first needed.

    Every attribute raises `NoPermissionError` if there are no credentials.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._is_hurried = False

    def hurry(self) -> None:
        """Has each request tried once, and not for long: somebody waits for the answers."""
        self._is_hurried = True

    @cached_property
    def instances(self) -> Any:
        """Of Compute Engine."""
        from google.cloud import compute_v1

        return self._client("COMPUTE", compute_v1.InstancesClient)

    @cached_property
    def zone_operations(self) -> Any:
        """Of Compute Engine: the client of instances would ask the public endpoint, wherever it was told to go."""
        from google.cloud import compute_v1

        return self._client("COMPUTE", compute_v1.ZoneOperationsClient)

    @cached_property
    def regions(self) -> Any:
        """Of Compute Engine, with their quotas."""
        from google.cloud import compute_v1

        return self._client("COMPUTE", compute_v1.RegionsClient)

    @cached_property
    def projects(self) -> Any:
        """Of Compute Engine, with the quotas that hold over all regions."""
        from google.cloud import compute_v1

        return self._client("COMPUTE", compute_v1.ProjectsClient)

    @cached_property
    def batch(self) -> Any:
        """Of Batch."""
        from google.cloud import batch_v1

        return self._client("BATCH", batch_v1.BatchServiceClient)

    @cached_property
    def logging(self) -> Any:
        """Of Cloud Logging."""
        from google.cloud import logging

        options, credentials = self._access("LOGGING")
        return logging.Client(project=self.project, credentials=credentials, client_options=options, _use_grpc=False)

    def ask(self, what: str, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Calls a method of a client, again if the API is away or too busy.

        Args:
            what: the thing that it is about, for messages.
            call: a method that takes `retry` and `timeout`, and bears repetition.
            arguments: of it.
            named: of it.

        Raises:
            NotThereError: 404.
            JobError: as `translated`.
        """
        return self.insist(what, lambda: call(*arguments, retry=None, timeout=self._timeout_seconds, **named))

    def ask_for_all(self, what: str, call: Callable[..., Iterable[T]], request: dict[str, Any]) -> list[T]:
        """As `ask`, for a method whose answer comes in pages: all of it, of one moment as far as the API goes."""
        return self.insist(what, lambda: [*call(request=request, retry=None, timeout=self._timeout_seconds)])

    def service_account(self, email: str) -> None:
        """Returns if there is such a service account.

        Raises:
            NotThereError: there is none.
            JobError: as `translated`.
        """
        from google.auth.transport.requests import AuthorizedSession

        options, credentials = self._access("IAM")
        base, what = options.get("api_endpoint", "https://iam.googleapis.com"), f"service account {email}"

        def look() -> None:
            url = f"{base}/v1/projects/-/serviceAccounts/{quote(email)}"
            answer = AuthorizedSession(credentials).get(url, timeout=self._timeout_seconds)
            if answer.status_code != 200:
                raise refusal(answer.status_code, " ".join(answer.text.split())[:200], what, self.project)

        self.insist(what, look)

    @property
    def _timeout_seconds(self) -> float:
        return HURRIED_SECONDS if self._is_hurried else TIMEOUT_SECONDS

    def insist(self, what: str, work: Callable[[], T]) -> T:
        """As `ask`, for anything that asks these APIs."""
        for pause in (None,) if self._is_hurried else (*PAUSES_SECONDS, None):
            try:
                with self._translating(what):
                    return work()
            except BucketAwayError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt raises or returns")

    @contextmanager
    def _translating(self, what: str) -> Any:
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError

        try:
            yield
        except (GoogleAPIError, GoogleAuthError, requests.RequestException, ConnectionError, TimeoutError) as error:
            raise translated(error, what, self.project) from error

    def _client(self, api: str, kind: Callable[..., Any]) -> Any:
        options, credentials = self._access(api)
        return kind(credentials=credentials, client_options=options, transport="rest")

    def _access(self, api: str) -> tuple[dict[str, str], Any]:
        endpoint = os.environ.get(ENDPOINT_VARIABLE + api, "")
        url = urlsplit(endpoint)
        # gcloud's values end with a path, such as /compute/v1/, which the clients add by themselves.
        options = {"api_endpoint": f"{url.scheme}://{url.netloc}"} if endpoint else {}
        if url.scheme == "http":
            from google.auth.credentials import AnonymousCredentials

            return options, AnonymousCredentials()
        return options, self._credentials

    @cached_property
    def _credentials(self) -> Any:
        import warnings

        import google.auth

        with warnings.catch_warnings(), self._translating(f"project {self.project}"):
            # It is about quotas of users without a project; ours is named in each request.
            warnings.simplefilter("ignore")
            return google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])[0]


def translated(error: BaseException, what: str, project: str) -> JobError:
    """The error of a client as one that a person can act on.

    `NotThereError` for 404, `NoPermissionError` for 401, 403 and credentials that are not there or no longer valid,
    `NoCapacityError` for a machine that is out of stock, `BadRequestError` for a quota and every other refusal, and
    `BucketAwayError` for no answer, 408, 429 and 5xx.
    """
    from google.auth.exceptions import GoogleAuthError, TransportError

    status, reason = getattr(error, "code", None), _reason(error)
    if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
        return NoPermissionError(f"{what}: no usable Google credentials ({reason}): {LOGIN}")
    return refusal(int(status) if status else None, reason, what, project)


def refusal(status: int | None, reason: str, what: str, project: str) -> JobError:
    """As `translated`, for what an API or an operation of it says; a `status` of None is no answer at all."""
    if _STOCK_OUT.search(reason):
        return NoCapacityError(
            f"{what}: there is no such machine now ({reason}): try another zone or region, later, or --on-demand"
        )
    if _QUOTA.search(reason) and "rate" not in reason.lower():
        return BadRequestError(
            f"{what}: the quota of project {project} does not allow it ({reason}): ask for more at "
            f"https://console.cloud.google.com/iam-admin/quotas?project={project}; spot machines have their own quota"
        )
    if status == 404:
        return NotThereError(f"{what} is not there ({reason})")
    if status == 401:
        return NoPermissionError(f"{what}: Google does not know who asks ({reason}): {LOGIN}")
    if status == 403 and "rateLimitExceeded" not in reason:
        found = _PERMISSION.search(reason)
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


def _reason(error: BaseException) -> str:
    """One line: what the server said, or the innermost cause."""
    text = _REQUEST.sub("", str(getattr(error, "message", "") or error))
    reasons = {str(item.get("reason")) for item in getattr(error, "errors", ()) or () if isinstance(item, dict)}
    if getattr(error, "code", None) is None:
        while inner := error.__cause__ or error.__context__:
            error = inner
        text = str(error) or type(error).__name__
    text = " ".join([text, *sorted(reason for reason in reasons - {"None"} if reason not in text)]).strip()
    text = " ".join(text.split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}…"

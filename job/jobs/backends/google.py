"""The common part of jobs on Compute Engine and on Batch: targets, APIs and their errors, logs, the doctor.

Requests to the APIs are JSON. Endpoints are those of the services, or those in gcloud's own variables, such as private
ones: `CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`, `…_BATCH`, `…_LOGGING`, `…_IAM`. One in plain http is a server on a
developer's machine, which gets no credentials.
"""

from __future__ import annotations

import abc
import math
import os
import re
import textwrap
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError, needs_extra
from job.jobs.backends import Check, JsonObject, LabelValue, NoCapacityError, Target, Terms, Word
from job.jobs.machines import Hourly, Machine, listed_price, machine_for
from job.jobs.spec import IMAGE_USER, JobSpec, docker_options, scratch_variables

API_RETRY_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Between attempts, while an API does not answer or is too busy."""
API_TIMEOUT_SECONDS = 30.0
HURRIED_TIMEOUT_SECONDS = 4.0
LOG_PAGE_ENTRIES = 1000
ENDPOINT_VARIABLE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_"
LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""The scope of tokens, here and on machines: only its roles decide what an account may do."""
QUOTA_PAGE = "https://console.cloud.google.com/iam-admin/quotas"
_PATHS = {"compute": "compute/v1", "batch": "v1", "logging": "v2", "iam": "v1"}
_LONGEST_REASON = 400
CONTAINER_GRACE_SECONDS = 25
"""From SIGTERM to SIGKILL: Compute Engine gives a spot machine 30 s in all."""
_CONFINED = docker_options(IMAGE_USER, IMAGE_USER, CONTAINER_GRACE_SECONDS)
CONTAINER_OPTIONS = ["--ipc=host", *_CONFINED, "--ulimit=memlock=-1"]
"""Of `docker run`, on both engines."""

LOG_POLL_SECONDS = 5.0
"""Cloud Logging answers sixty requests a minute and project."""
LOG_SETTLE_SECONDS = 15.0
"""The time after a job's end in which its last lines may still arrive."""
LOG_OVERLAP = timedelta(seconds=30)
"""Requested again, because entries of several machines do not arrive in the order of their times."""
CHANGE_POLL_SECONDS = 1.0
CHANGE_SECONDS = 600.0
"""The limit of making or deleting machines: a job saves first, and a shutdown alone takes up to two minutes."""


class GoogleNotFoundError(MissingInputError):
    """Google answered 404."""


_REFUSALS = {
    400: (BadRequestError, "Google refused it: change what it names"),
    401: (NoPermissionError, f"Google does not accept the credentials: {LOGIN}"),
    403: (NoPermissionError, "no permission: have an owner of the project grant a role that has it"),
    404: (GoogleNotFoundError, "not found: check its name, and project and place in the target"),
}
"""By status; another one below 500 is as 400."""
_SHORTAGES: dict[str, tuple[type[JobError], str]] = {
    "(?i)RESOURCE_POOL_EXHAUSTED|does not have enough resources|STOCKOUT|resource_availability": (
        NoCapacityError,
        "such machines are out of stock: try --on-demand, another zone or region, or --watch, which tries on",
    ),
    "(?i)QUOTA_?EXCEEDED|Quota '[A-Z0-9_-]+' exceeded": (
        BadRequestError,
        f"the project's quota does not allow it: request more at {QUOTA_PAGE}; spot has its own",
    ),
}
"""By the words of Compute Engine, whatever its status; Batch passes the same words on."""


@cache
def _authorized_session() -> Any:
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    with warnings.catch_warnings():
        # The warning is about quotas of users without a project, and each request here names one.
        warnings.simplefilter("ignore")
        return AuthorizedSession(google.auth.default(scopes=[CLOUD_SCOPE])[0])


def refusal(status: int | None, reason: str, what: str) -> JobError:
    """Returns the refusal of an API or an operation as an error that a person can act on; no answer has no status.

    `GoogleNotFoundError` for 404, `NoPermissionError` for 401 and 403, `NoCapacityError` for a machine out of stock,
    `BadRequestError` for a quota and every other refusal, and `BucketAwayError` for no answer, 408, 429 and 5xx.
    """
    is_away = status is None or status in (408, 429) or status >= 500 or "rateLimitExceeded" in reason
    error: type[JobError] = BucketAwayError
    why = "Google's API is away or too busy: check the network, or try again later"
    if short := shortage(reason):
        error, why = short
    elif not is_away:
        error, why = _REFUSALS.get(status or 0, _REFUSALS[400])
    problem, _, remedy = why.partition(": ")
    return error(f"{what}: {problem} ({textwrap.shorten(reason, _LONGEST_REASON, placeholder=' …')}): {remedy}")


def shortage(text: str) -> tuple[type[JobError], str] | None:
    """Returns the error about a machine that is not available, and its text; None for any other text."""
    return next((meaning for words, meaning in _SHORTAGES.items() if re.search(words, text)), None)


def _refusal_text(answer: Any) -> str:
    """Returns the text of a refusal (cloud.google.com/apis/design/errors, and Compute Engine's reasons with it)."""
    try:
        error = answer.json()["error"]
        words = [str(error["message"]), *(str(item.get("reason", "")) for item in error.get("errors", ()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(answer.text or answer.reason)
    return " ".join(dict.fromkeys(words))


class GoogleTarget(Target):
    """The common part of targets on Google Cloud: a job goes to a zone or region, its `place`; all else covers all."""

    engine: ClassVar[str]
    """Google's name for it."""
    limit: ClassVar[tuple[str, int] | tuple[str, int, str]]
    """The fields of `Terms` about the limit."""
    project: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
    service_account: Word = ""
    """The e-mail address of the account that the job runs as."""
    network: Word = ""
    subnetwork: Word = ""
    machine_type: LabelValue = "g2-standard-8"
    gpu_type: LabelValue = "nvidia-l4"
    boot_disk_gigabytes: int = Field(100, ge=30, le=2000)
    _is_hurried: bool = PrivateAttr(False)
    """Whether each request is tried once, and briefly, because a person waits."""
    _first: int = PrivateAttr(0)
    """The number of `place` among the places."""

    @property
    def places(self) -> list[str]:
        """Returns the zones or regions where a job may run, which are tried in this order."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """Returns the zone or region to which jobs are submitted."""
        return self.places[self._first]

    def terms(self, spec: JobSpec) -> Terms:
        """See `Target.terms`."""
        return Terms(self.machine_type, (f"project {self.project}", ", then ".join(self.places)), *self.limit)

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """See `Target.list_price`."""
        return listed_price(self.machine_type, [re.sub("-[a-z]$", "", place) for place in self.places])

    def network_in(self, region: str) -> dict[str, str]:
        """Returns `network` and `subnetwork` of a machine's interface, as paths, if the target names them."""
        found = {}
        for key, folder in (("network", "global/networks"), ("subnetwork", f"regions/{region}/subnetworks")):
            if name := getattr(self, key):
                found[key] = name if "/" in name else f"projects/{self.project}/{folder}/{name}"
        return found

    def ask(self, request: str, body: JsonObject | None = None, **query: str) -> JsonObject:
        """Returns the answer of an API; repeats the request while the API is away or too busy.

        Args:
            request: method, API and path, such as `GET compute/projects/p`; it must bear repetition.
            body: of the request.
            query: parameters in the URL.

        Raises:
            JobError: see `refusal`.
        """
        for pause_seconds in () if self._is_hurried else API_RETRY_PAUSES_SECONDS:
            with suppress(BucketAwayError):
                return self._ask_once(request, body, query)
            time.sleep(pause_seconds)
        return self._ask_once(request, body, query)

    def create(self, request: str, body: JsonObject, **query: str) -> JsonObject:
        """As `ask`; a repetition whose first answer was lost does not collide with its own object."""
        return self.ask(request, body, **query, requestId=str(uuid.uuid4()))

    def pages(self, request: str, body: JsonObject | None = None, **query: str) -> Iterator[JsonObject]:
        """As `ask`, for a method whose answer comes in pages."""
        token: JsonObject = {}
        while True:
            page = self.ask(request, body and {**body, **token}, **query, **({} if body else token))
            yield page
            if not page.get("nextPageToken"):
                return
            token = {"pageToken": page["nextPageToken"]}

    def log_entries(self, filter_: str, since: datetime) -> Iterator[JsonObject]:
        """Yields the entries of logs that match `filter_` from `since` on, in the order of their times."""
        asked = {
            "resourceNames": [f"projects/{self.project}"],
            # Without a time the API returns the last day alone.
            "filter": f'({filter_}) AND timestamp>="{since.isoformat()}"',
            "orderBy": "timestamp asc",
            "pageSize": LOG_PAGE_ENTRIES,
        }
        for page in self.pages("POST logging/entries:list", asked):
            yield from page.get("entries", ())

    @needs_extra("google", "the target")
    def _ask_once(self, request: str, body: JsonObject | None, query: dict[str, str]) -> JsonObject:
        import requests
        from google.auth.exceptions import GoogleAuthError, TransportError

        method, _, target = request.partition(" ")
        api, _, path = target.partition("/")
        endpoint = urlsplit(os.environ.get(ENDPOINT_VARIABLE + api.upper()) or f"https://{api}.googleapis.com")
        # gcloud's values end with a path, such as /compute/v1/, or do not.
        url = f"{endpoint.scheme}://{endpoint.netloc}/{_PATHS[api]}/{path}"
        timeout_seconds = HURRIED_TIMEOUT_SECONDS if self._is_hurried else API_TIMEOUT_SECONDS
        try:
            session = requests.Session() if endpoint.scheme == "http" else _authorized_session()
            answer = session.request(method, url, params=query, json=body, timeout=timeout_seconds)
            if answer.ok:
                return dict(answer.json())
        except (requests.RequestException, TransportError) as error:
            raise refusal(None, str(error), request) from error
        except GoogleAuthError as error:
            raise NoPermissionError(f"{request}: no usable Google credentials ({error}): {LOGIN}") from error
        raise refusal(answer.status_code, _refusal_text(answer), request)

    def elsewhere(self) -> Self | None:
        """See `Target.elsewhere`."""
        if self._first + 1 == len(self.places):
            return None
        following = self.model_copy()
        following._first += 1
        return following

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns the bodies of the requests that make the job in the place of this engine."""
        if not spec.image or spec.image.startswith("localhost/"):
            raise BadRequestError(
                f"image {spec.image!r}: set the target's image to one in a registry (`make push-image`)"
            )
        for word in (*spec.argv, *spec.env.values()):
            if "\n" in word:
                raise BadRequestError(f"{word!r} has a line break, which no word or variable of a job may have")
        machine = machine_for(self.machine_type, spec.gpu_type or self.gpu_type, spec.gpus)
        return self.requests_for(spec, machine)

    @abc.abstractmethod
    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `render`, for a job that both engines could run."""

    @abc.abstractmethod
    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """Returns the filter of a job's entries in Cloud Logging, their earliest time, and whether slices wrote them.

        Raises:
            MissingInputError: the engine does not know the job, or its output is gone.
        """

    @abc.abstractmethod
    def slice_of(self, entry: JsonObject) -> str:
        """Returns the number of the slice that wrote an entry."""

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Target.logs`: each entry once, in the order in which they arrive."""
        filter_, since, has_slices = self.log_of(name)
        seen: set[str] = set()
        newest, over_at = since, math.inf
        while True:
            if follow and over_at == math.inf and self.alive(name).state.is_over:
                over_at = time.monotonic()
            # Determined before the request, so that it has all entries until the end.
            is_last = not follow or time.monotonic() - over_at >= LOG_SETTLE_SECONDS
            for entry in self.log_entries(filter_, max(since, newest - LOG_OVERLAP)):
                if entry["insertId"] not in seen:
                    seen.add(entry["insertId"])
                    newest = max(newest, datetime.fromisoformat(entry["timestamp"]))
                    text = str(entry.get("jsonPayload", {}).get("message") or entry.get("textPayload", ""))
                    yield (f"[{self.slice_of(entry)}] " if has_slices else "") + text.rstrip("\r\n")
            if is_last:
                return
            time.sleep(LOG_POLL_SECONDS)

    def patience(self, what: str) -> Iterator[None]:
        """Yields at intervals while an engine changes something; the caller leaves the loop when it is done.

        Raises:
            BucketAwayError: it takes too long.
        """
        until = time.monotonic() + CHANGE_SECONDS
        while time.monotonic() < until:
            yield
            time.sleep(CHANGE_POLL_SECONDS)
        raise BucketAwayError(f"{what}: not ready after {CHANGE_SECONDS:.0f} s: look later")

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Target.checks`: the API, the machine type, the account."""
        self._is_hurried = True
        yield (engine := Check.of(self.engine, self._look_at_engine))
        if engine.passed and self.service_account:
            account = f"GET iam/projects/-/serviceAccounts/{self.service_account}"
            yield Check.unless_hidden("service account", lambda: f"{self.ask(account)['email']} is there")

    def _look_at_engine(self) -> str:
        machine_for(self.machine_type, self.gpu_type, self.gpus)
        return f"project {self.project} answers; {len(self.jobs()):,} jobs"


def container_variables(spec: JobSpec) -> dict[str, str]:
    """Returns the variables of the container, in the order of their names."""
    return dict(sorted({**scratch_variables(CONTAINER_GRACE_SECONDS), **spec.env}.items()))

"""What jobs on Compute Engine and on Batch have in common: the APIs, their errors, the container, logs, the doctor.

APIs are asked in JSON. Endpoints are those of the services, or what gcloud's own variables say, such as a private one:
`CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE`, `…_BATCH`, `…_LOGGING`, `…_IAM`. One in plain http is a server on a
developer's machine: no credentials go there.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import Backend, Check, JsonObject, NoCapacityError
from job.jobs.backends.confinement import IMAGE_USER, docker_options, scratch_variables
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, Target

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
CONTAINER_GRACE_SECONDS = 25
"""From SIGTERM to SIGKILL: Compute Engine gives a spot machine 30 s in all."""
CONTAINER_OPTIONS = [
    "--ipc=host",
    *docker_options(IMAGE_USER, IMAGE_USER, CONTAINER_GRACE_SECONDS),
    "--ulimit=memlock=-1",
]
"""Of `docker run`, on both."""

LOG_POLL_SECONDS = 5.0
"""Cloud Logging answers sixty requests a minute and project."""
LOG_SETTLE_SECONDS = 15.0
"""So long after its end a job's last lines may still be on their way."""
LOG_OVERLAP = timedelta(seconds=30)
"""Entries of several machines do not arrive in the order of their times."""
CHANGE_POLL_SECONDS = 1.0
CHANGE_SECONDS = 600.0
"""How long making or deleting machines may take: a job saves first, and a shutdown alone takes up to two minutes."""


class GoogleNotFoundError(MissingInputError):
    """Google answered 404."""


_Refusal = tuple[type[JobError], str, str]
"""What an answer means: the error, and in it what is wrong and what to do."""
_AWAY: _Refusal = (BucketAwayError, "Google's API is away or too busy", "check the network, or try again later")
_STATUSES: dict[int, _Refusal] = {
    401: (NoPermissionError, "Google does not know who asks", LOGIN),
    403: (NoPermissionError, "no permission", "have an owner of the project grant a role that has it"),
    404: (GoogleNotFoundError, "it is not there", "check its name, and project and place in the target"),
    408: _AWAY,
    429: _AWAY,
}
_OTHER_STATUS: _Refusal = (BadRequestError, "Google refused it", "change what it names")
_SHORTAGES: dict[str, _Refusal] = {
    r"RESOURCE_POOL_EXHAUSTED|does not have enough resources|STOCKOUT|resource_availability": (
        NoCapacityError,
        "there is no such machine now",
        "try another zone or region, later, or --on-demand",
    ),
    r"QUOTA_?EXCEEDED|Quota '[A-Z0-9_-]+' exceeded": (
        BadRequestError,
        "the project's quota does not allow it",
        f"ask for more at {QUOTA_PAGE}; spot has its own",
    ),
}
"""By what Compute Engine says, whatever its status; Batch passes the same words on."""


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
    is_refused = 400 <= (status or 0) < 500 and "rateLimitExceeded" not in reason
    by_status = _STATUSES.get(status or 0, _OTHER_STATUS) if is_refused else _AWAY
    error, said, remedy = shortage(reason) or by_status
    reason = textwrap.shorten(reason, _LONGEST_REASON, placeholder=" …")
    return error(f"{what}: {said} ({reason}): {remedy.format(project=project)}")


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


class GoogleBackend(Backend):
    """A backend of one zone or region, its `place`: there it submits; all else looks into all of the target's."""

    engine: ClassVar[str]
    """As Google calls it."""
    target: GoogleTarget
    is_hurried = False
    """Whether each request is tried once, and not for long: somebody waits for the answers."""

    def __init__(self, target: Target, first: int = 0) -> None:
        """`first` is the number of its place among those of the target."""
        super().__init__(target)
        self._places = self.target.places
        self.place, *self._others = self._places[first:]

    def ask(self, request: str, body: JsonObject | None = None, **query: str) -> JsonObject:
        """What an API answers; it is asked again while it is away or too busy.

        Args:
            request: method, API and path, such as `GET compute/projects/p`; it has to bear repetition.
            body: of the request.
            query: parameters in the URL.

        Raises:
            JobError: see `refusal`.
        """
        for pause_seconds in () if self.is_hurried else API_RETRY_PAUSES_SECONDS:
            with suppress(BucketAwayError):
                return self._ask_once(request, body, query)
            time.sleep(pause_seconds)
        return self._ask_once(request, body, query)

    def create(self, request: str, body: JsonObject, **query: str) -> JsonObject:
        """As `ask`; a repetition whose first answer was lost does not find its own thing in its way."""
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
        """The entries of logs that match `filter_` from `since` on, in the order of their times."""
        asked = {
            "resourceNames": [f"projects/{self.target.project}"],
            # Without a time the API gives the last day alone.
            "filter": f'({filter_}) AND timestamp>="{since.isoformat()}"',
            "orderBy": "timestamp asc",
            "pageSize": LOG_PAGE_ENTRIES,
        }
        for page in self.pages("POST logging/entries:list", asked):
            yield from page.get("entries", ())

    def _ask_once(self, request: str, body: JsonObject | None, query: dict[str, str]) -> JsonObject:
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
                return dict(answer.json())
        except (requests.RequestException, TransportError) as error:
            raise refusal(None, str(error), request, self.target.project) from error
        except GoogleAuthError as error:
            said = f"{request}: no usable Google credentials ({error})"
            raise NoPermissionError(f"{said}: {LOGIN}") from error
        raise refusal(answer.status_code, _refusal_text(answer), request, self.target.project)

    def elsewhere(self) -> Self | None:
        """See `Backend.elsewhere`."""
        return type(self)(self.target, -len(self._others)) if self._others else None

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """See `Backend.render`: the bodies of the requests that make the job in the place of this backend."""
        target = self.target
        if not spec.image or spec.image.startswith("localhost/"):
            how = "set image in the target to one that machines can pull (`make push-image`)"
            raise BadRequestError(f"image {spec.image!r}: {how}")
        for word in (*spec.argv, *spec.env.values()):
            if "\n" in word:
                raise BadRequestError(f"{word!r} has a line break, which no word or variable of a job may have")
        machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus)
        return self.requests_for(spec, machine)

    @abc.abstractmethod
    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `render`, for a job that both engines could run."""

    @abc.abstractmethod
    def find(self, name: str) -> list[JsonObject]:
        """What the engine holds of a job, in any place of the target; empty if it does not know it."""

    def known(self, name: str) -> list[JsonObject]:
        """As `find`.

        Raises:
            MissingInputError: it is empty.
        """
        if found := self.find(name):
            return found
        raise self.unknown(name)

    @abc.abstractmethod
    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """What finds a job's entries in Cloud Logging, since when there are any, and whether slices wrote them.

        Raises:
            MissingInputError: there is no such job, or its output is gone.
        """

    @abc.abstractmethod
    def slice_of(self, entry: JsonObject) -> str:
        """The number of the slice that wrote this."""

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Backend.logs`: each entry once, in the order in which they arrive."""
        filter_, since, has_slices = self.log_of(name)
        seen: set[str] = set()
        newest, over_at = since, math.inf
        while True:
            if follow and over_at == math.inf and self.status(name).state.is_over:
                over_at = time.monotonic()
            # Decided before the entries are asked for: what was written before the end is among them.
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
        """Comes round while an engine changes something; whoever has seen it done leaves the loop.

        Raises:
            BucketAwayError: it takes too long.
        """
        until = time.monotonic() + CHANGE_SECONDS
        while time.monotonic() < until:
            yield
            time.sleep(CHANGE_POLL_SECONDS)
        raise BucketAwayError(f"{what}: not ready after {CHANGE_SECONDS:.0f} s: look later")

    def checks(self) -> Iterator[Check]:
        """See `Backend.checks`: the API, the machine type, quotas of its GPUs, the account, the image."""
        target = self.target
        self.is_hurried = True
        yield (engine := Check.of(self.engine, self._engine_answers))
        if not engine.passed:
            return
        if target.gpus:
            regions = [f"/regions/{region}" for region in target.all_regions]
            metric = quota_metric(self._machine().gpu_type, target.spot)
            yield Check.of("GPU quota", lambda: self._quota(metric, regions))
            # A project has a quota over all regions besides that of each: 0 in a new one.
            yield Check.of("GPU quota, everywhere", lambda: self._quota("GPUS_ALL_REGIONS", [""]))
        if target.service_account:
            yield Check.unless_hidden("service account", self._account_is_there)
        yield Check.of_image(target.image)

    def _engine_answers(self) -> str:
        jobs, _ = self.jobs(), self._machine()
        return f"project {self.target.project} answers; {len(jobs):,} jobs"

    def _machine(self) -> Machine:
        return machine_for(self.target.machine_type, self.target.gpu_type, self.target.gpus)

    def _quota(self, metric: str, places: Sequence[str]) -> str:
        """Whether one of the places, regions or all of them, has the GPUs of a job left."""
        gpus, fits, said = self.target.gpus, False, []
        for place in places:
            quotas = self.ask(f"GET compute/projects/{self.target.project}{place}").get("quotas", ())
            found = next((quota for quota in quotas if quota.get("metric") == metric), None)
            if found is None:
                # Some GPUs have a quota that this API does not tell.
                return f"{metric}: not known before a job asks"
            free = found["limit"] - found.get("usage", 0)
            fits = fits or free >= gpus
            said.append(f"{place.removeprefix('/regions/')} {free:g} of {found['limit']:g} free".strip())
        message = f"{metric}: {', '.join(said)}; a job takes {gpus}"
        if not fits:
            raise BadRequestError(f"{message}: ask for more at {QUOTA_PAGE.format(project=self.target.project)}")
        return message

    def _account_is_there(self) -> str:
        account = self.ask(f"GET iam/projects/-/serviceAccounts/{self.target.service_account}")
        return f"{account['email']} is there"


def network_of(target: GoogleTarget, region: str) -> dict[str, str]:
    """`network` and `subnetwork` of a machine's interface, as paths, where the target names them."""
    found = {}
    for key, folder in (("network", "global/networks"), ("subnetwork", f"regions/{region}/subnetworks")):
        if name := getattr(target, key):
            found[key] = name if "/" in name else f"projects/{target.project}/{folder}/{name}"
    return found


def container_variables(spec: JobSpec) -> dict[str, str]:
    """The variables of the container, in the order of their names."""
    return dict(sorted({**scratch_variables(CONTAINER_GRACE_SECONDS), **spec.env}.items()))


def quota_metric(gpu_type: str, spot: bool) -> str:
    """The name under which Compute Engine counts these GPUs: `PREEMPTIBLE_NVIDIA_L4_GPUS`."""
    kind = gpu_type.removeprefix("nvidia-").removeprefix("tesla-").upper().replace("-", "_")
    # The first H100s are counted without the size of their memory, and A100s of 40 GB as well.
    kind = {"H100_80GB": "H100"}.get(kind, kind)
    return f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{kind}_GPUS"

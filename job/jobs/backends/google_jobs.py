"""What jobs on Compute Engine and on Batch have in common: their container, what is refused, their logs, the doctor."""

from __future__ import annotations

import abc
import math
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Self

from job.exits import TABLE, BadRequestError, BucketAwayError, Exit, MissingInputError
from job.jobs.backends.base import Backend, JobStatus, JsonObject, State
from job.jobs.backends.google import QUOTA_PAGE, Answer, GoogleApis
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.checks import Check, looked_at, unchecked_image
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, Target, VmTarget

CONTAINER_USER = "10001:10001"
"""Whom the program runs as: nobody that a machine knows."""
CONTAINER_GRACE_SECONDS = 25
"""From SIGTERM to SIGKILL: Compute Engine gives a spot machine 30 s in all."""
CONTAINER_SCRATCH = "/scratch"
CONFINEMENT = (
    "--ipc=host",
    f"--stop-timeout={CONTAINER_GRACE_SECONDS}",
    "--read-only",
    # Compiled kernels are loaded from there.
    "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
    f"--user={CONTAINER_USER}",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--ulimit=memlock=-1",
)
"""Options of `docker run` that hold on both: nothing to write but scratch and /tmp, no rights, no root."""

LOG_POLL_SECONDS = 5.0
"""Cloud Logging answers sixty requests a minute and project."""
LOG_SETTLE_SECONDS = 15.0
"""So long after its end a job's last lines may still be on their way."""
LOG_OVERLAP = timedelta(seconds=30)
"""Entries of several machines do not arrive in the order of their times."""
CHANGE_POLL_SECONDS = 1.0
CHANGE_SECONDS = 600.0
"""How long making or deleting machines may take: a job saves first, and a shutdown alone takes up to two minutes."""
_IMAGE = re.compile(r"(?!localhost/)[a-z0-9][A-Za-z0-9._:/@-]{1,400}")


class GoogleBackend(Backend):
    """A backend of one zone or region, its `place`: there it submits; all else looks into all of the target's."""

    engine: ClassVar[str]
    """As Google calls it."""
    target: GoogleTarget

    def __init__(self, target: Target, place: int = 0) -> None:
        super().__init__(target)
        self._apis = GoogleApis(self.target.project)
        self._places = self.target.zones if isinstance(self.target, VmTarget) else self.target.all_regions
        self._number, self.place = place, self._places[place]

    def elsewhere(self) -> Self | None:
        """See `Backend.elsewhere`."""
        return type(self)(self.target, self._number + 1) if self._number + 1 < len(self._places) else None

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """See `Backend.render`: the bodies of the requests that make the job in the place of this backend."""
        target = self.target
        if spec.nodes > 1:
            raise BadRequestError(
                f"--nodes {spec.nodes}: a {target.backend} target has no machines that train together; use a "
                "kubernetes target, or one machine with more GPUs (--gpus 8)"
            )
        if not _IMAGE.fullmatch(spec.image):
            raise BadRequestError(
                f"image {spec.image!r}: set image in the target to one that machines can pull (`make push-image`), "
                "such as us-central1-docker.pkg.dev/PROJECT/ddpm/ddpm:latest"
            )
        for word in (*spec.argv, *spec.env.values()):
            if "\n" in word:
                raise BadRequestError(f"{word!r} has a line break, which no word or variable of a job may have")
        machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus)
        return self.requests_for(spec, machine)

    @abc.abstractmethod
    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `render`, for a job that both engines could run."""

    @abc.abstractmethod
    def find(self, name: str) -> list[Answer]:
        """What the engine holds of a job, in any place of the target; empty if it does not know it."""

    def known(self, name: str) -> list[Answer]:
        """As `find`.

        Raises:
            MissingInputError: it is empty.
        """
        if found := self.find(name):
            return found
        raise MissingInputError(f"no job {name!r} in project {self.target.project} in {', '.join(self._places)}")

    @abc.abstractmethod
    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """What finds a job's entries in Cloud Logging, since when there are any, and whether slices wrote them.

        Raises:
            MissingInputError: there is no such job, or its output is gone.
        """

    @abc.abstractmethod
    def slice_of(self, entry: Answer) -> str:
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
            for entry in self._apis.log_entries(filter_, max(since, newest - LOG_OVERLAP)):
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
        self._apis.is_hurried = True
        engine = looked_at(self.engine, self._engine_answers)
        yield engine
        if not engine.passed:
            return
        if target.gpus:
            regions = [f"/regions/{region}" for region in target.all_regions]
            metric = quota_metric(target.gpu_type, target.spot)
            yield looked_at("GPU quota", lambda: self._quota(metric, regions))
            # A project has a quota over all regions besides that of each: 0 in a new one.
            yield looked_at("GPU quota, everywhere", lambda: self._quota("GPUS_ALL_REGIONS", [""]))
        if target.service_account:
            yield looked_at("service account", self._account_is_there)
        yield unchecked_image(target.image)

    def _engine_answers(self) -> str:
        jobs, target = self.jobs(), self.target
        machine_for(target.machine_type, target.gpu_type, target.gpus)
        return f"project {target.project} answers; {len(jobs)} jobs"

    def _quota(self, metric: str, places: Sequence[str]) -> str:
        """Whether one of the places, regions or all of them, has the GPUs of a job left."""
        gpus, fits, said = self.target.gpus, False, []
        for place in places:
            quotas = self._apis.ask(f"GET compute/projects/{self.target.project}{place}").get("quotas", ())
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
        email = self.target.service_account
        return f"{self._apis.ask(f'GET iam/projects/-/serviceAccounts/{email}')['email']} is there"


def network_of(target: GoogleTarget, region: str) -> dict[str, str]:
    """`network` and `subnetwork` of a machine's interface, as paths, where the target names them."""
    found = {}
    for key, folder in (("network", "global/networks"), ("subnetwork", f"regions/{region}/subnetworks")):
        if name := getattr(target, key):
            found[key] = name if "/" in name else f"projects/{target.project}/{folder}/{name}"
    return found


def container_variables(spec: JobSpec) -> dict[str, str]:
    """The variables of the container, in the order of their names."""
    own = {
        # On these machines /tmp is memory.
        "TMPDIR": CONTAINER_SCRATCH,
        "XDG_CACHE_HOME": f"{CONTAINER_SCRATCH}/cache",
        "DDPM_CACHE": f"{CONTAINER_SCRATCH}/ddpm",
        "DDPM_GRACE_SECONDS": str(CONTAINER_GRACE_SECONDS),
    }
    return dict(sorted({**own, **spec.env}.items()))


def ended_status(name: str, code: int) -> JobStatus:
    """How a job, or a slice of one, is whose program ended with `code`."""
    if code == Exit.FINISHED:
        return JobStatus(name, State.FINISHED, exit_code=code)
    meaning = TABLE[Exit(code)].text if code in TABLE else f"killed by signal {code - 128}" if code > 128 else "crashed"
    return JobStatus(name, State.FAILED, f"ended with code {code}: {meaning}", code)


def quota_metric(gpu_type: str, spot: bool) -> str:
    """The name under which Compute Engine counts these GPUs: `PREEMPTIBLE_NVIDIA_L4_GPUS`."""
    kind = gpu_type.removeprefix("nvidia-").removeprefix("tesla-").upper().replace("-", "_")
    # The first H100s are counted without the size of their memory, and A100s of 40 GB as well.
    kind = {"H100_80GB": "H100"}.get(kind, kind)
    return f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{kind}_GPUS"

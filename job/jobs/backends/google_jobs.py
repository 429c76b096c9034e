"""What jobs on Compute Engine and on Batch have in common: their container, what is refused, what doctor looks at."""

from __future__ import annotations

import abc
import math
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Self

from job.exits import TABLE, BadRequestError, Exit, JobError, NoPermissionError
from job.jobs.backends.base import Backend, JobStatus
from job.jobs.backends.google import Answer, GoogleApis, log_entries, quota_page
from job.jobs.backends.machines import machine_for
from job.jobs.checks import Check, unchecked_image
from job.jobs.spec import JobSpec
from job.jobs.targets import GoogleTarget, Target, VmTarget

CONTAINER_USER = "10001:10001"
"""Whom the program runs as: nobody that a machine knows."""
CONTAINER_GRACE_SECONDS = 25
"""From SIGTERM to SIGKILL: Compute Engine gives a spot machine 30 s in all."""
CONTAINER_SCRATCH = "/scratch"

LOG_POLL_SECONDS = 5.0
"""Cloud Logging answers sixty requests a minute and project."""
LOG_SETTLE_SECONDS = 15.0
"""So long after its end a job's last lines may still be on their way."""
LOG_OVERLAP = timedelta(seconds=30)
"""Entries of several machines do not arrive in the order of their times."""
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{1,400}")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_GPU = re.compile(r"nvidia-(?:tesla-)?([a-z0-9-]+?)")


class GoogleBackend(Backend):
    """A backend of one place, a zone or a region: there it submits; everything else looks into all of the target's."""

    engine: ClassVar[str]
    """As Google calls it."""
    target: GoogleTarget

    def __init__(self, target: Target, place: int = 0) -> None:
        super().__init__(target)
        self._apis = GoogleApis(self.target.project)
        self._places = self.target.zones if isinstance(self.target, VmTarget) else self.target.all_regions
        self._number = place

    @property
    def place(self) -> str:
        """Where `submit` makes jobs."""
        return self._places[self._number]

    def elsewhere(self) -> Self | None:
        """See `Backend.elsewhere`."""
        return type(self)(self.target, self._number + 1) if self._number + 1 < len(self._places) else None

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
            for entry in log_entries(self._apis, filter_, max(since, newest - LOG_OVERLAP)):
                if entry["insertId"] not in seen:
                    seen.add(entry["insertId"])
                    newest = max(newest, datetime.fromisoformat(entry["timestamp"]))
                    text = str(entry.get("jsonPayload", {}).get("message") or entry.get("textPayload", ""))
                    yield (f"[{self.slice_of(entry)}] " if has_slices else "") + text.rstrip("\r\n")
            if is_last:
                return
            time.sleep(LOG_POLL_SECONDS)

    def checks(self) -> Iterator[Check]:
        """See `Backend.checks`: the API, the machine type, quotas of its GPUs, the account, the image."""
        target = self.target
        self._apis.is_hurried = True
        try:
            jobs = self.jobs()
            machine = machine_for(target.machine_type, target.gpu_type, target.gpus, target.spot)
        except JobError as error:
            yield Check.of_error(self.engine, error)
            return
        yield Check(self.engine, True, f"project {target.project} answers; {len(jobs)} jobs")
        quotas = {
            "GPU quota": (
                quota_metric(machine.gpu_type, target.spot),
                [f"regions/{name}" for name in target.all_regions],
            ),
            # A project has a quota over all regions besides that of each: 0 in a new one.
            "GPU quota, everywhere": ("GPUS_ALL_REGIONS", [""]),
        }
        for name, (metric, places) in quotas.items() if machine.gpus else ():
            try:
                yield self._quota(name, metric, places, machine.gpus)
            except JobError as error:
                yield Check.of_error(name, error)
        yield self._account()
        yield unchecked_image(target.image)

    def _quota(self, name: str, metric: str, places: Sequence[str], gpus: int) -> Check:
        """Whether one of the places, regions or all of them, has so many GPUs left."""
        project, said, fits = self.target.project, [], False
        for place in places:
            found = self._apis.ask(place or f"project {project}", f"GET compute/projects/{project}/{place}".rstrip("/"))
            quota = next((quota for quota in found.get("quotas", ()) if quota.get("metric") == metric), None)
            if quota is None:
                # Some GPUs have a quota that this API does not tell.
                return Check(name, True, f"{metric}: not known before a job asks")
            free = quota["limit"] - quota.get("usage", 0)
            fits = fits or free >= gpus
            said.append(f"{place.partition('/')[2]} {free:g} of {quota['limit']:g} free".strip())
        message = f"{metric}: {', '.join(said)}; a job takes {gpus}"
        return Check(name, fits, message, f"ask for more at {quota_page(project)}", Exit.BAD_REQUEST)

    def _account(self) -> Check:
        name, email = "service account", self.target.service_account
        if not email:
            return Check(name, True, "none is named: machines act as the project's default account")
        try:
            self._apis.ask(f"{name} {email}", f"GET iam/projects/-/serviceAccounts/{email}")
        except NoPermissionError:
            return Check(name, True, f"{email}: these credentials may not look whether it is there")
        except JobError as error:
            return Check.of_error(name, error)
        return Check(name, True, f"{email} is there")


def check_google_job(spec: JobSpec, target: GoogleTarget, max_slices: int) -> None:
    """Refuses what neither of the two can run.

    Raises:
        BadRequestError: naming the option, or the field of the target.
    """
    if spec.nodes > 1:
        raise BadRequestError(
            f"--nodes {spec.nodes}: a {target.backend} target has no machines that train together; use a kubernetes "
            "target, or one machine with more GPUs (--gpus 8)"
        )
    if spec.slices > max_slices:
        raise BadRequestError(f"--slices {spec.slices}: {max_slices} are the limit on a {target.backend} target")
    if not _IMAGE.fullmatch(spec.image) or spec.image.startswith("localhost/"):
        raise BadRequestError(
            f"image {spec.image!r}: set image in the target to one that machines can pull (`make push-image`), such as "
            "us-central1-docker.pkg.dev/PROJECT/ddpm/ddpm:latest"
        )
    for what, word in (*(("an argument", word) for word in spec.argv), *spec.env.items()):
        if _CONTROL_CHARACTER.search(word):
            raise BadRequestError(f"{what} ({word!r}) has a control character, such as a line break")


def busy(status: JobStatus) -> BadRequestError:
    """What to say to who submits a job that is not over."""
    return BadRequestError(
        f"job {status.name!r} is {status.state} in {status.place}: follow it with `ddpm jobs logs -f {status.name}`, "
        f"or end it with `ddpm jobs cancel {status.name}`"
    )


def network_of(target: GoogleTarget, region: str) -> dict[str, str]:
    """`network` and `subnetwork` of a machine's interface, as paths, where the target names them."""
    home, found = f"projects/{target.project}", {}
    if target.network:
        found["network"] = target.network if "/" in target.network else f"{home}/global/networks/{target.network}"
    if target.subnetwork:
        own = f"{home}/regions/{region}/subnetworks/{target.subnetwork}"
        found["subnetwork"] = target.subnetwork if "/" in target.subnetwork else own
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


def code_meaning(code: int) -> str:
    """What an exit code of the program says, in a few words."""
    if code in TABLE:
        return TABLE[Exit(code)].text
    return f"killed by signal {code - 128}" if 128 < code < 160 else "crashed"


def quota_metric(gpu_type: str, spot: bool) -> str:
    """The name under which Compute Engine counts these GPUs: `PREEMPTIBLE_NVIDIA_L4_GPUS`."""
    match = _GPU.fullmatch(gpu_type)
    kind = (match[1] if match else gpu_type).upper().replace("-", "_")
    # The first H100s are counted without the size of their memory, and A100s of 40 GB as well.
    kind = {"H100_80GB": "H100"}.get(kind, kind)
    return f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{kind}_GPUS"

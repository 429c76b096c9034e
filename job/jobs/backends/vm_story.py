"""How a job on VMs is going: what its machines say while they are there, and what they left in Cloud Logging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from job.jobs.backends import google_logs
from job.jobs.backends.base import Cause, JobStatus, State, severity
from job.jobs.backends.google import GoogleApis
from job.jobs.backends.google_container import meaning
from job.jobs.backends.google_logs import Entry, quoted
from job.jobs.backends.vm_manifests import SLICE_LABEL, SLICES_LABEL

LOG = "ddpm-jobs"
"""Log of what machines say about themselves: events of `vm_supervise.sh`, and `submitted` and `cancelled` of ours."""
LOG_LABEL = "ddpm-job"
OUTPUT_LOG = "gcplogs-docker-driver"
LOOK_BACK = timedelta(days=30)
"""As long as Cloud Logging keeps entries, unless it was told otherwise."""
_BEGINNINGS = ("submitted", "started")
_BEING_MADE = {"PROVISIONING", "STAGING", "PENDING", "REPAIRING"}
_SWITCHED_OFF = {"TERMINATED", "STOPPED", "SUSPENDED"}
_PHASES = {
    "": "the machine is starting",
    "driver": "the GPU driver is being installed",
    "image": "the image is being pulled",
}
_ORDER = (State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED, State.GONE, State.FINISHED)
"""What a job of several slices is: the first of these that one of its slices is."""


@dataclass(frozen=True)
class Machine:
    """A VM of a job, and what it says about itself.

    Attributes:
        zone: where it is.
        instance: as Compute Engine describes it.
        said: its guest attributes, by key.
    """

    zone: str
    instance: Any
    said: Mapping[str, str]

    @property
    def slice(self) -> int:
        """Number of the slice that it makes; 0 if there are none."""
        return int(self.instance.labels.get(SLICE_LABEL, "0"))

    @property
    def slices(self) -> int:
        """How many there are; 0 if there are none."""
        return int(self.instance.labels.get(SLICES_LABEL, "0"))

    @property
    def created(self) -> datetime:
        """When it was asked for."""
        return datetime.fromisoformat(self.instance.creation_timestamp).astimezone(UTC)

    @property
    def is_leaving(self) -> bool:
        """Whether it is on its way out, or off."""
        return self.instance.status in {"STOPPING", "PENDING_STOP", "SUSPENDING", "DEPROVISIONING", *_SWITCHED_OFF}

    @property
    def is_off(self) -> bool:
        """Whether it does nothing but cost the price of its disk."""
        return self.instance.status in _SWITCHED_OFF


def filter_of(apis: GoogleApis, name: str, log: str = LOG) -> str:
    """What finds the entries of a job in one of the two logs."""
    field = f'labels."{LOG_LABEL}"' if log == LOG else f'jsonPayload.container.metadata."{LOG_LABEL}"'
    return f"logName={quoted(f'projects/{apis.project}/logs/{log}')} AND {field}={quoted(name)}"


def events(apis: GoogleApis, name: str) -> list[Entry]:
    """What the machines of a job said about themselves, the oldest first."""
    since = datetime.now(UTC) - LOOK_BACK
    return google_logs.entries(apis, filter_of(apis, name), since, newest_first=True, limit=1000)[::-1]


def tell_cancelled(apis: GoogleApis, name: str, machines: Sequence[Machine]) -> None:
    """Leaves word that somebody ended the job, so that nobody takes it for lost and starts it again."""
    _tell(apis, name, "cancelled", [(machine.slice, machine.slices) for machine in machines])


def tell_submitted(apis: GoogleApis, name: str, slices: int) -> None:
    """Leaves word that whatever is said about an earlier job of this name is past."""
    _tell(apis, name, "submitted", [(index, slices) for index in range(slices or 1)])


def _tell(apis: GoogleApis, name: str, event: str, parts: Sequence[tuple[int, int]]) -> None:
    logger = apis.logging.logger(LOG)
    for index, slices in parts:
        labels = {LOG_LABEL: name, SLICE_LABEL: str(index), SLICES_LABEL: str(slices)}
        fields = {"event": event, "message": event}
        apis.insist(f"the log of job {name!r}", partial(logger.log_struct, fields, labels=labels))


def latest_start(entries: Sequence[Entry]) -> datetime | None:
    """When the machines of the job's last submission began; None if none ever did."""
    starts: dict[str, datetime] = {}
    for entry in entries:
        if _event(entry) in _BEGINNINGS:
            starts[entry.labels.get(SLICE_LABEL, "0")] = entry.at
    return min(starts.values(), default=None)


def status(name: str, machines: Sequence[Machine], entries: Sequence[Entry]) -> JobStatus:
    """How a job is going.

    Args:
        name: of the job.
        machines: of it, as they are now.
        entries: of `events`.
    """
    by_slice = {machine.slice: machine for machine in machines}
    told = [int(entry.labels.get(SLICES_LABEL, "0") or 0) for entry in entries]
    slices = max((machine.slices for machine in machines), default=told[-1] if told else 0)
    parts = []
    for index in range(slices or 1):
        own = [entry for entry in entries if entry.labels.get(SLICE_LABEL, "0") == str(index)]
        machine = by_slice.get(index)
        part = from_log(name, own) if machine is None or machine.is_leaving else from_machine(name, machine)
        if machine is not None:
            part = _with_machine(part, machine)
        parts.append(part)
    return parts[0] if len(parts) == 1 else combined(name, parts)


def from_machine(name: str, machine: Machine) -> JobStatus:
    """What a machine that is there says."""
    if machine.instance.status in _BEING_MADE:
        return JobStatus(name, State.WAITING, "the machine is being made")
    phase, attempts = machine.said.get("phase", ""), _number(machine.said.get("attempts"))
    if phase == "over":
        return _ended(name, _number(machine.said.get("exit-code"), 1), attempts, "")
    if phase in _PHASES:
        return JobStatus(name, State.WAITING, _PHASES[phase], attempts=attempts, has_machine=True)
    return JobStatus(name, State.RUNNING, attempts=attempts)


def from_log(name: str, entries: Sequence[Entry]) -> JobStatus:
    """What is known about a job, or a slice of one, whose machine is no more."""
    # An old entry says nothing about a machine that was made since.
    starts = [number for number, entry in enumerate(entries) if _event(entry) in _BEGINNINGS]
    entries = entries[starts[-1] :] if starts else entries
    if not entries:
        return JobStatus(name, State.GONE, "its machine is gone, and left no word")
    return replace(_last_told(name, entries), created=_utc(entries[0].at))


def _last_told(name: str, entries: Sequence[Entry]) -> JobStatus:
    # Whoever cancels says so before the machine has heard of it.
    words = {_event(entry): entry for entry in entries}
    last = entries[-1]
    fields = last.payload if isinstance(last.payload, dict) else {}
    attempts = _number(fields.get("attempts"))
    if "over" in words:
        fields = words["over"].payload
        return _ended(name, _number(fields.get("code"), 1), attempts, str(fields.get("message", "")))
    if "cancelled" in words:
        return JobStatus(name, State.CANCELLED, "cancelled", attempts=attempts)
    if "stopped" in words:
        return JobStatus(name, State.GONE, "its machine was taken away", attempts=attempts, cause=Cause.TAKEN_AWAY)
    return JobStatus(name, State.GONE, "its machine is gone", attempts=attempts)


def combined(name: str, parts: Sequence[JobStatus]) -> JobStatus:
    """The slices of a job as one."""
    finished = sum(part.state is State.FINISHED for part in parts)
    state = min((part.state for part in parts), key=_ORDER.index)
    alike = [part for part in parts if part.state is state]
    worst = max(alike, key=lambda part: severity(part.retried))
    # One slice that waits for an image holds up no other that only waits.
    is_held_up = state is not State.WAITING or len({part.cause for part in alike}) == 1
    message = f"{finished} of {len(parts)} slices finished"
    if worst.message and worst.state is not State.FINISHED:
        message += f"; slice {parts.index(worst)}: {worst.message}"
    return JobStatus(
        name,
        worst.state,
        message,
        worst.exit_code,
        sum(part.attempts for part in parts),
        min((part.created for part in parts if part.created), default=""),
        ",".join(sorted({part.place for part in parts if part.place})),
        worst.cause if is_held_up else None,
        any(part.has_machine for part in parts),
    )


def line(entry: Entry, slices: int) -> str:
    """An entry of either log as a line for a person."""
    if _event(entry):
        fields = entry.payload
        text = f"ddpm-vm: {fields.get('message') or _event(entry)}"
        if _event(entry) == "again":
            text += f" with code {_number(fields.get('code'))} ({meaning(_number(fields.get('code')))})"
        index = entry.labels.get(SLICE_LABEL, "0")
    else:
        text = entry.text
        container = entry.payload.get("container", {}) if isinstance(entry.payload, dict) else {}
        index = (container.get("metadata") or {}).get(SLICE_LABEL, "0")
    return f"[{index}] {text}" if slices else text


def _ended(name: str, code: int, attempts: int, message: str) -> JobStatus:
    if code == 0:
        return JobStatus(name, State.FINISHED, "finished", 0, attempts)
    said = message if message and "not retried" not in message else f"ended with code {code}: {meaning(code)}"
    return JobStatus(name, State.FAILED, said, code, attempts)


def _with_machine(part: JobStatus, machine: Machine) -> JobStatus:
    part = replace(part, created=_utc(machine.created), place=machine.zone)
    if machine.is_off:
        off = f"its machine is switched off, and its disk costs money: `ddpm jobs cancel {part.name}` deletes both"
        return replace(part, message=f"{part.message}; {off}")
    if machine.is_leaving and part.state is State.GONE:
        return replace(part, state=State.RUNNING, message="its machine is being taken away")
    return part


def _utc(at: datetime) -> str:
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")


def _event(entry: Entry) -> str:
    return str(entry.payload.get("event", "")) if isinstance(entry.payload, dict) else ""


def _number(value: Any, otherwise: int = 0) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return otherwise

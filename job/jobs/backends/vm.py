"""Compute Engine: a VM for each job, or one for each slice, which runs its container once and deletes itself.

A VM is what `instances.insert` takes (cloud.google.com/compute/docs/reference/rest/v1). It runs Container-Optimized OS,
which starts `vm_start.sh`. No value of a user is part of that script: it finds the words of `docker run` in the VM's
metadata. Compute Engine deletes the VM at `maxRunDuration`, whatever it does.

What a VM says of itself is in Cloud Logging for 30 days, in a log of its own; its last word has the exit code.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from job.exits import BucketAwayError, JobError, MissingInputError, retried
from job.jobs.backends import google, google_jobs
from job.jobs.backends.base import Cause, JobStatus, Manifest, State, cancelled, severity
from job.jobs.backends.google import Answer, GoogleNotFoundError, quoted
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.spec import JobSpec
from job.jobs.targets import VmTarget

VM_POLL_SECONDS = 1.0
OPERATION_SECONDS = 300.0
"""How long making or deleting a machine may take: a shutdown alone takes up to two minutes."""
VM_IMAGE = "projects/cos-cloud/global/images/family/cos-stable"
VM_LOG = "ddpm-jobs"
JOB_LABEL, SLICE_LABEL, SLICES_LABEL = "ddpm-job", "ddpm-slice", "ddpm-slices"
LOG_LOOK_BACK = timedelta(days=30)
"""As long as Cloud Logging keeps entries, unless it was told otherwise."""
_BEING_MADE = {"PROVISIONING", "STAGING", "PENDING", "REPAIRING"}
_SWITCHED_OFF = {"TERMINATED", "STOPPED", "SUSPENDED"}
_LEAVING = {"STOPPING", "PENDING_STOP", "SUSPENDING", "DEPROVISIONING", *_SWITCHED_OFF}
_ORDER = (State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED, State.GONE, State.FINISHED)
"""What a job of several slices is: the first of these that one of its slices is."""


class VmBackend(google_jobs.GoogleBackend):
    """See `Backend`. A job is made in one zone; `elsewhere` is the target's next one."""

    engine = "Compute Engine"
    target: VmTarget

    def render(self, spec: JobSpec) -> list[Manifest]:
        """See `Backend.render`: the bodies of `instances.insert`, in the zone of this backend."""
        return vm_instances(spec, self.target, self.place)

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`."""
        manifests = self.render(spec)
        before = self._machines(spec.name)
        if any(machine["status"] not in _LEAVING for machine in before):
            raise google_jobs.busy(vm_status(spec.name, before, {}))
        self._delete([(_zone(machine), machine["name"]) for machine in before])
        made: list[tuple[str, str]] = []
        try:
            operations = []
            for manifest in manifests:
                # Before the request: one without an answer may have been met.
                made.append((self.place, manifest["name"]))
                # A repetition whose first answer was lost must not find a machine in its way.
                query, once = f"POST {self._path(self.place)}/instances", str(uuid.uuid4())
                operations.append(self._apis.ask(f"machine {manifest['name']}", query, manifest, requestId=once))
            self._wait(operations)
        except BaseException as error:
            if "alreadyExists" in str(error):
                # It is somebody else's, who was faster.
                made.pop()
            with suppress(JobError):
                self._delete(made)
            raise
        # What an earlier job of this name said is past.
        self._tell(spec.name, spec.slices, "submitted")

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`."""
        machines = self._machines(name)
        staying = [machine for machine in machines if machine["status"] not in _LEAVING]
        # A machine that is there knows best, and logs may be asked only so often.
        is_complete = len(staying) == max([1, *map(_slices, machines)])
        return vm_status(name, machines, {} if is_complete else self._last_words(name))

    def jobs(self) -> list[JobStatus]:
        """See `Backend.jobs`: those that have a machine."""
        names: dict[str, list[Answer]] = {}
        for machine in self._machines():
            names.setdefault(machine["labels"][JOB_LABEL], []).append(machine)
        found = [vm_status(name, machines, {}) for name, machines in names.items()]
        return sorted(found, key=lambda status: status.created, reverse=True)

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: every target sees all zones of its project."""
        return ("vm", self.target.project, status.name)

    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """See `GoogleBackend.log_of`: what docker sent, and what the machines said themselves."""
        machines, told = self._machines(name), self._last_words(name)
        found = vm_status(name, machines, told)
        if not found.created:
            where = self.target.name or "vm"
            raise MissingInputError(f"no job {name!r} on {where}, or its output is older than 30 days")
        docker = f"logName={self._log('gcplogs-docker-driver')} AND jsonPayload.container.metadata.{_labelled(name)}"
        has_slices = len(told) > 1 or any(map(_slices, machines))
        return f"({docker}) OR ({self._words_filter(name)})", datetime.fromisoformat(found.created), has_slices

    def slice_of(self, entry: Answer) -> str:
        """See `GoogleBackend.slice_of`."""
        container = entry["jsonPayload"].get("container", {})
        return str((container.get("metadata") or entry["labels"]).get(SLICE_LABEL, "all"))

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: deleting a machine switches it off first, which stops the container."""
        machines = self._known(name)
        # So that nobody takes it for lost, and starts it again.
        self._tell(name, _slices(machines[0]), "cancelled")
        self._delete([(_zone(machine), machine["name"]) for machine in machines])
        return cancelled(vm_status(name, machines, {}).state)

    def describe(self, name: str) -> Manifest:
        """See `Backend.describe`: the instances of the job."""
        return {"instances": self._known(name)}

    def _path(self, zone: str) -> str:
        return f"compute/projects/{self.target.project}/zones/{zone}"

    def _log(self, name: str) -> str:
        return quoted(f"projects/{self.target.project}/logs/{name}")

    def _words_filter(self, name: str) -> str:
        return f"logName={self._log(VM_LOG)} AND labels.{_labelled(name)}"

    def _machines(self, name: str = "") -> list[Answer]:
        """Those of one job, or of all, in any zone of the project."""
        project = self.target.project
        what, request = f"the machines of project {project}", f"GET compute/projects/{project}/aggregated/instances"
        wanted = f"={name}" if name else ":*"
        pages = self._apis.pages(what, request, filter=f"labels.{JOB_LABEL}{wanted}")
        return [one for page in pages for zone in page.get("items", {}).values() for one in zone.get("instances", ())]

    def _known(self, name: str) -> list[Answer]:
        machines = self._machines(name)
        if not machines:
            raise MissingInputError(f"no machine of job {name!r} in project {self.target.project}")
        return machines

    def _last_words(self, name: str) -> dict[int, JobStatus]:
        since = datetime.now(UTC) - LOG_LOOK_BACK
        # One page holds all that the machines of one job say.
        entries = google.log_entries(self._apis, self._words_filter(name), since, "desc")
        newest = [*islice(entries, google.LOG_PAGE_ENTRIES)]
        return last_words(name, newest[::-1])

    def _tell(self, name: str, slices: int, event: str) -> None:
        """Leaves word about a job; who may not write logs may do all else."""
        labels, said = {JOB_LABEL: name, SLICES_LABEL: str(slices)}, {"message": f"ddpm-vm: {event}", "event": event}
        log = f"projects/{self.target.project}/logs/{VM_LOG}"
        body = {"logName": log, "resource": {"type": "global"}, "entries": [{"labels": labels, "jsonPayload": said}]}
        with suppress(JobError):
            self._apis.ask(f"the log of job {name!r}", "POST logging/entries:write", body)

    def _delete(self, names: Iterable[tuple[str, str]]) -> None:
        """Deletes machines, by zone and name, and waits until they are gone. Those that are gone already count."""
        operations = []
        for zone, name in names:
            with suppress(GoogleNotFoundError):
                request = f"DELETE {self._path(zone)}/instances/{name}"
                operations.append(self._apis.ask(f"machine {name} in {zone}", request))
        self._wait(operations)

    def _wait(self, operations: Iterable[Answer]) -> None:
        """Waits for operations on machines.

        Raises:
            JobError: one failed.
            BucketAwayError: they take too long.
        """
        until = time.monotonic() + OPERATION_SECONDS
        for operation in operations:
            zone, what = _zone(operation), f"machine {operation['targetLink'].rpartition('/')[2]}"
            while operation["status"] != "DONE":
                if time.monotonic() > until:
                    raise BucketAwayError(f"{what}: not ready after {OPERATION_SECONDS:.0f} s: look later")
                time.sleep(VM_POLL_SECONDS)
                operation = self._apis.ask(what, f"GET {self._path(zone)}/operations/{operation['name']}")
            if problems := operation.get("error", {}).get("errors"):
                reason = "; ".join(f"{problem.get('code')}: {problem.get('message')}" for problem in problems)
                status = operation.get("httpErrorStatusCode", 400)
                raise google.refusal(status, reason, f"{what} in {zone}", self.target.project)


def _labelled(name: str) -> str:
    return f"{quoted(JOB_LABEL)}={quoted(name)}"


def _slices(machine: Answer) -> int:
    """How many slices its job has; 0 for none."""
    return int(machine["labels"][SLICES_LABEL])


def _zone(resource: Answer) -> str:
    return str(resource["zone"]).rpartition("/")[2]


def last_words(name: str, entries: Iterable[Answer]) -> dict[int, JobStatus]:
    """How each slice of a job ended, or the job where it has none, as the log has it, the oldest word first.

    What was said before the last submission, or the start of the slice's machine, is past. A slice of which there is no
    word since then is `State.GONE`.
    """
    parts: dict[int, JobStatus] = {}
    for entry in entries:
        labels, said = entry["labels"], entry["jsonPayload"]
        event, number = said.get("event"), int(labels.get(SLICE_LABEL, "0"))
        at = google.utc_text(datetime.fromisoformat(entry["timestamp"]))
        gone = JobStatus(name, State.GONE, "its machine is gone", created=at)
        if event == "submitted" or not parts:
            parts = dict.fromkeys(range(max(int(labels[SLICES_LABEL]), 1)), gone)
        match event:
            case "started":
                parts[number] = gone
            case "cancelled":
                parts = {number: _cancelled(part) for number, part in parts.items()}
            case "ended" | "taken":
                parts[number] = _ended(parts.get(number, gone), int(said["code"]), event == "taken")
    return parts


def _cancelled(part: JobStatus) -> JobStatus:
    return replace(part, state=State.CANCELLED, message="cancelled") if part.state is State.GONE else part


def _ended(part: JobStatus, code: int, was_taken: bool) -> JobStatus:
    if code == 0:
        return replace(part, state=State.FINISHED, exit_code=0, message="finished")
    # What would come again is no matter of the machine.
    if was_taken and retried(code) != "never":
        taken = replace(part, message="its machine was taken away", cause=Cause.TAKEN_AWAY)
        return part if part.state is State.CANCELLED else taken
    said = f"ended with code {code}: {google_jobs.code_meaning(code)}"
    return replace(part, state=State.FAILED, exit_code=code, message=said)


def vm_status(name: str, machines: Sequence[Answer], told: Mapping[int, JobStatus]) -> JobStatus:
    """How a job is going, all its slices together: by the machines that are there, and `last_words` of the others."""
    gone = JobStatus(name, State.GONE, "its machine is gone, and left no word")
    parts = [told.get(number, gone) for number in range(max([1, len(told), *map(_slices, machines)]))]
    for machine in machines:
        number = int(machine["labels"][SLICE_LABEL])
        parts[number] = _of_machine(machine, parts[number])
    if len(parts) == 1:
        return parts[0]
    worst = min(parts, key=lambda part: (_ORDER.index(part.state), -severity(part.retried)))
    message = f"{sum(part.state is State.FINISHED for part in parts)} of {len(parts)} slices finished"
    if worst.message and worst.state is not State.FINISHED:
        message += f"; slice {parts.index(worst)}: {worst.message}"
    created = min((part.created for part in parts if part.created), default="")
    places = ",".join(sorted({part.place for part in parts if part.place}))
    return replace(worst, message=message, created=created, place=places)


def _of_machine(machine: Answer, told: JobStatus) -> JobStatus:
    """How a job is whose machine is there; what it told counts once that is on its way out."""
    word, created = machine["status"], datetime.fromisoformat(machine["creationTimestamp"])
    told = replace(told, created=google.utc_text(created), place=_zone(machine))
    if word in _SWITCHED_OFF:
        off = f"its machine is switched off, and its disk costs money: `ddpm jobs cancel {told.name}` deletes both"
        return replace(told, message=f"{told.message}; {off}")
    if word in _LEAVING:
        going = replace(told, state=State.RUNNING, message="its machine is being taken away")
        return told if told.state in (State.FINISHED, State.FAILED) else going
    if word in _BEING_MADE:
        return replace(told, state=State.WAITING, message="the machine is being made")
    return replace(told, state=State.RUNNING, message="")


def vm_instances(spec: JobSpec, target: VmTarget, zone: str) -> list[Manifest]:
    """One VM, or one for each slice of a sampling job. Pure.

    Raises:
        BadRequestError: no VM can run such a job; the message names the option.
    """
    google_jobs.check_google_job(spec, target, max_slices=100)
    machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus, spec.spot)
    return [_instance(spec, target, zone, machine, number) for number in range(spec.machines)]


def _instance(spec: JobSpec, target: VmTarget, zone: str, machine: Machine, number: int) -> Manifest:
    labels = {JOB_LABEL: spec.name, SLICE_LABEL: str(number), SLICES_LABEL: str(spec.slices)}
    script = Path(__file__).with_name("vm_start.sh").read_text(encoding="utf-8")
    metadata = {
        "startup-script": script,
        "ddpm-words": _one_a_line(_docker_words(spec, machine.gpus, number)),
        "ddpm-environment": _one_a_line(
            f"{key}={value}" for key, value in google_jobs.container_variables(spec).items()
        ),
        "ddpm-image": spec.image,
        "ddpm-gpus": str(machine.gpus),
        "ddpm-labels": json.dumps(labels),
        "block-project-ssh-keys": "TRUE",
        # An update would restart the machine in the middle of a job.
        "cos-update-strategy": "update_disabled",
    }
    disk = {
        "sourceImage": VM_IMAGE,
        "diskSizeGb": str(target.boot_disk_gigabytes),
        "diskType": f"zones/{zone}/diskTypes/{machine.disk_type}",
        "labels": spec.all_labels,
    }
    interface: Manifest = {**google_jobs.network_of(target, zone.rpartition("-")[0]), "nicType": "GVNIC"}
    if len(interface) == 1:
        # Who names a network has one that reaches Google without external addresses; the default one does not.
        external = {"type": "ONE_TO_ONE_NAT", "name": "External NAT"}
        interface |= {"network": "global/networks/default", "accessConfigs": [external]}
    instance: Manifest = {
        "name": _machine_name(spec, number),
        "description": f"ddpm {spec.verb}, job {spec.name}",
        "machineType": f"zones/{zone}/machineTypes/{machine.machine_type}",
        "labels": {**spec.all_labels, **labels},
        "scheduling": {
            "provisioningModel": "SPOT" if spec.spot else "STANDARD",
            # A stopped machine's disk would cost money for as long as nobody looks.
            "instanceTerminationAction": "DELETE",
            # Machines with GPUs cannot move.
            "onHostMaintenance": "TERMINATE",
            "automaticRestart": False,
            "maxRunDuration": {"seconds": str(spec.max_seconds)},
        },
        "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}],
        "networkInterfaces": [interface],
        "serviceAccounts": [{"email": target.service_account or "default", "scopes": [google.CLOUD_SCOPE]}],
        "shieldedInstanceConfig": {"enableSecureBoot": True, "enableVtpm": True, "enableIntegrityMonitoring": True},
        "metadata": {"items": [{"key": key, "value": value} for key, value in metadata.items()]},
    }
    if machine.extra:
        kind = f"zones/{zone}/acceleratorTypes/{machine.gpu_type}"
        instance["guestAccelerators"] = [{"acceleratorType": kind, "acceleratorCount": machine.gpus}]
    return instance


def _machine_name(spec: JobSpec, number: int) -> str:
    return f"{spec.name}-{number}" if spec.slices else spec.name


def _docker_words(spec: JobSpec, gpus: int, number: int) -> list[str]:
    """What comes after `docker run`, less the options for the log."""
    options = [
        f"--hostname={_machine_name(spec, number)}",
        f"--label={JOB_LABEL}={spec.name}",
        f"--label={SLICE_LABEL}={number}",
        "--env-file=/run/ddpm/environment",
        *google_jobs.CONFINEMENT,
        f"--mount=type=bind,source=/var/lib/ddpm,target={google_jobs.CONTAINER_SCRATCH}",
    ]
    if gpus:
        # What `--gpus all` does elsewhere (cloud.google.com/container-optimized-os/docs/how-to/run-gpus).
        options += [f"--volume=/var/lib/nvidia/{folder}:/usr/local/nvidia/{folder}:ro" for folder in ("lib64", "bin")]
        devices = [*map(str, range(gpus)), "ctl", "-uvm"]
        options += [f"--device=/dev/nvidia{device}" for device in devices]
    return [*options, spec.image, *spec.argv_of_slice(number)]


def _one_a_line(words: Iterable[str]) -> str:
    return "".join(f"{word}\n" for word in words)

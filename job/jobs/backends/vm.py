"""Compute Engine: a VM for each job, or one for each slice, which runs its container once and deletes itself.

A VM is what `instances.insert` takes (cloud.google.com/compute/docs/reference/rest/v1). It runs Container-Optimized OS,
which starts `vm_start.sh`. No value of a user is part of that script: it finds the words of `docker run` in the VM's
metadata. Compute Engine deletes the VM at `maxRunDuration`, whatever it does.

What a VM says of itself is in Cloud Logging for 30 days, in a log of its own; its last word has the exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from job.exits import JobError, retried, severity
from job.jobs.backends import google
from job.jobs.backends.base import Cause, JobStatus, JsonObject, State
from job.jobs.backends.confinement import SCRATCH
from job.jobs.backends.google import GoogleNotFoundError
from job.jobs.backends.machines import Machine
from job.jobs.spec import JobSpec
from job.jobs.targets import VmTarget
from job.sealed import utc_text

VM_IMAGE = "projects/cos-cloud/global/images/family/cos-stable"
VM_LOG = "ddpm-jobs"
JOB_LABEL, SLICE_LABEL, SLICES_LABEL = "ddpm-job", "ddpm-slice", "ddpm-slices"
LOG_LOOK_BACK = timedelta(days=30)
"""As long as Cloud Logging keeps entries, unless it was told otherwise."""
_SWITCHED_OFF = {"TERMINATED", "STOPPED", "SUSPENDED"}
_LEAVING = {"STOPPING", "PENDING_STOP", "SUSPENDING", "DEPROVISIONING", *_SWITCHED_OFF}
_MACHINE_STATES = {
    **dict.fromkeys(("PROVISIONING", "STAGING", "PENDING", "REPAIRING"), (State.WAITING, "the machine is being made")),
    **dict.fromkeys(_LEAVING, (State.RUNNING, "its machine is being taken away")),
}
"""Of a job that has not said how it ended; with a machine in any other state it runs."""
_ORDER = (State.RUNNING, State.WAITING, State.FAILED, State.CANCELLED, State.GONE, State.FINISHED)
"""What a job of several slices is: the first of these that one of its slices is."""


class VmBackend(google.GoogleBackend):
    """See `Backend`. A job is made in one zone; `elsewhere` is the target's next one."""

    engine = "Compute Engine"
    target: VmTarget

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`."""
        manifests = self.render(spec)
        before = self.find(spec.name)
        for machine in before:
            if machine["status"] not in _LEAVING:
                raise self.runs_already(spec.name, f"in {_zone(machine)}")
        self._delete(before)
        made: list[JsonObject] = []
        try:
            operations = []
            for manifest in manifests:
                # Before the request: one without an answer may have been met.
                made.append({"name": manifest["name"], "zone": self.place})
                operations.append(self.create(f"POST {self._path(self.place)}/instances", manifest))
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
        return vm_status(name, self.find(name), self._last_words(name))

    def jobs(self) -> list[JobStatus]:
        """See `Backend.jobs`: those that have a machine."""
        machines: dict[str, list[JsonObject]] = {}
        for machine in self.find():
            machines.setdefault(machine["labels"][JOB_LABEL], []).append(machine)
        return [vm_status(name, own, {}) for name, own in machines.items()]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: every target sees all zones of its project."""
        return ("vm", self.target.project, status.name)

    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """See `GoogleBackend.log_of`: what docker sent, and what the machines said themselves."""
        machines, told = self.find(name), self._last_words(name)
        found = vm_status(name, machines, told)
        if not found.created:
            raise self.unknown(name)
        docker = self._filter("gcplogs-docker-driver", "jsonPayload.container.metadata", name)
        filter_ = f"({docker}) OR ({self._filter(VM_LOG, 'labels', name)})"
        return filter_, datetime.fromisoformat(found.created), len(told) > 1 or any(map(_slices, machines))

    def slice_of(self, entry: JsonObject) -> str:
        """See `GoogleBackend.slice_of`."""
        container = entry["jsonPayload"].get("container", {})
        return str((container.get("metadata") or entry["labels"]).get(SLICE_LABEL, "all"))

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: deleting a machine switches it off first, which stops the container."""
        machines = self.known(name)
        # So that nobody takes it for lost, and starts it again.
        self._tell(name, _slices(machines[0]), "cancelled")
        self._delete(machines)
        return vm_status(name, machines, {}).state.when_cancelled

    def find(self, name: str = "") -> list[JsonObject]:
        """The machines of one job, or of all, in any zone of the project."""
        request = f"GET compute/projects/{self.target.project}/aggregated/instances"
        pages = self.pages(request, filter=f"labels.{JOB_LABEL}" + (f"={name}" if name else ":*"))
        return [one for page in pages for zone in page.get("items", {}).values() for one in zone.get("instances", ())]

    def _path(self, zone: str) -> str:
        return f"compute/projects/{self.target.project}/zones/{zone}"

    def _log(self, name: str) -> str:
        return f"projects/{self.target.project}/logs/{name}"

    def _filter(self, log: str, labels: str, name: str) -> str:
        return f'logName="{self._log(log)}" AND {labels}."{JOB_LABEL}"="{name}"'

    def _last_words(self, name: str) -> dict[int, JobStatus]:
        since = datetime.now(UTC) - LOG_LOOK_BACK
        return last_words(name, self.log_entries(self._filter(VM_LOG, "labels", name), since))

    def _tell(self, name: str, slices: int, event: str) -> None:
        """Leaves word about a job; who may not write logs may do all else."""
        labels, said = {JOB_LABEL: name, SLICES_LABEL: str(slices)}, {"message": f"ddpm-vm: {event}", "event": event}
        entry = {"logName": self._log(VM_LOG), "resource": {"type": "global"}, "labels": labels, "jsonPayload": said}
        with suppress(JobError):
            self.ask("POST logging/entries:write", {"entries": [entry]})

    def _delete(self, machines: Iterable[JsonObject]) -> None:
        """Deletes machines, and waits until they are gone. Those that are gone already count."""
        operations = []
        for machine in machines:
            with suppress(GoogleNotFoundError):
                operations.append(self.ask(f"DELETE {self._path(_zone(machine))}/instances/{machine['name']}"))
        self._wait(operations)

    def _wait(self, operations: Iterable[JsonObject]) -> None:
        """Waits for operations on machines.

        Raises:
            JobError: one failed.
        """
        for operation in operations:
            machine, zone = operation["targetLink"].rpartition("/")[2], _zone(operation)
            for _ in self.patience(f"machine {machine}"):
                if operation["status"] == "DONE":
                    break
                operation = self.ask(f"GET {self._path(zone)}/operations/{operation['name']}")
            if problems := operation.get("error", {}).get("errors"):
                reason = "; ".join(f"{problem.get('code')}: {problem.get('message')}" for problem in problems)
                status = operation.get("httpErrorStatusCode", 400)
                raise google.refusal(status, reason, f"machine {machine} in {zone}", self.target.project)

    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `GoogleBackend.requests_for`: bodies of `instances.insert`, one, or one for each slice."""
        return [self._instance(spec, machine, number) for number in range(spec.machines)]

    def _instance(self, spec: JobSpec, machine: Machine, number: int) -> JsonObject:
        target, zone = self.target, self.place
        labels = {JOB_LABEL: spec.name, SLICE_LABEL: str(number), SLICES_LABEL: str(spec.slices)}
        variables = google.container_variables(spec)
        metadata = {
            "startup-script": Path(__file__).with_name("vm_start.sh").read_text(encoding="utf-8"),
            "ddpm-words": _one_a_line(_docker_words(spec, machine.gpus, number)),
            "ddpm-environment": _one_a_line(f"{key}={value}" for key, value in variables.items()),
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
        interface: JsonObject = {**google.network_of(target, zone.rpartition("-")[0]), "nicType": "GVNIC"}
        if len(interface) == 1:
            # Who names a network has one that reaches Google without external addresses; the default one does not.
            external = {"type": "ONE_TO_ONE_NAT", "name": "External NAT"}
            interface |= {"network": "global/networks/default", "accessConfigs": [external]}
        instance: JsonObject = {
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


def _slices(machine: JsonObject) -> int:
    """How many slices its job has; 0 for none."""
    return int(machine["labels"][SLICES_LABEL])


def _zone(resource: JsonObject) -> str:
    return str(resource["zone"]).rpartition("/")[2]


def last_words(name: str, entries: Iterable[JsonObject]) -> dict[int, JobStatus]:
    """How each slice of a job ended, or the job where it has none, as the log has it, the oldest word first.

    What was said before the last submission, or the start of the slice's machine, is past. A slice of which there is no
    word since then is `State.GONE`.
    """
    parts: dict[int, JobStatus] = {}
    for entry in entries:
        labels, said = entry["labels"], entry["jsonPayload"]
        event, code, number = said.get("event"), int(said.get("code", 0)), int(labels.get(SLICE_LABEL, 0))
        gone = JobStatus(name, State.GONE, "its machine is gone", created=utc_text(entry["timestamp"]))
        if event == "submitted" or not parts:
            parts = dict.fromkeys(range(max(int(labels[SLICES_LABEL]), 1)), gone)
        part = parts.get(number, gone)
        match event:
            case "started":
                parts[number] = gone
            case "cancelled":
                lost = [index for index, one in parts.items() if one.state is State.GONE]
                parts |= {index: replace(parts[index], state=State.CANCELLED, message="cancelled") for index in lost}
            # What would come again is no matter of the machine.
            case "taken" if retried(code) != "never":
                if part.state is not State.CANCELLED:
                    parts[number] = replace(part, message="its machine was taken away", cause=Cause.TAKEN_AWAY)
            case "ended" | "taken":
                parts[number] = replace(JobStatus.of_code(name, code), created=part.created)
    return parts


def vm_status(name: str, machines: Sequence[JsonObject], told: Mapping[int, JobStatus]) -> JobStatus:
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
    if worst.message:
        message += f"; slice {parts.index(worst)}: {worst.message}"
    created = min((part.created for part in parts if part.created), default="")
    places = ",".join(sorted({part.place for part in parts if part.place}))
    return replace(worst, message=message, created=created, place=places)


def _of_machine(machine: JsonObject, told: JobStatus) -> JobStatus:
    """How a job is whose machine is there; what it told counts once that is on its way out."""
    word = machine["status"]
    told = replace(told, created=utc_text(machine["creationTimestamp"]), place=_zone(machine))
    if word in _SWITCHED_OFF:
        off = f"its machine is switched off, and its disk costs money: `ddpm jobs cancel {told.name}` deletes both"
        return replace(told, message=f"{told.message}; {off}".removeprefix("; "))
    if word in _LEAVING and told.state in (State.FINISHED, State.FAILED):
        return told
    state, message = _MACHINE_STATES.get(word, (State.RUNNING, ""))
    return JobStatus(told.name, state, message, created=told.created, place=told.place)


def _machine_name(spec: JobSpec, number: int) -> str:
    return f"{spec.name}-{number}" if spec.slices else spec.name


def _docker_words(spec: JobSpec, gpus: int, number: int) -> list[str]:
    """What comes after `docker run`, less the options for the log."""
    options = [
        f"--hostname={_machine_name(spec, number)}",
        f"--label={JOB_LABEL}={spec.name}",
        f"--label={SLICE_LABEL}={number}",
        "--env-file=/run/ddpm/environment",
        *google.CONTAINER_OPTIONS,
        f"--mount=type=bind,source=/var/lib/ddpm,target={SCRATCH}",
    ]
    if gpus:
        # What `--gpus all` does elsewhere (cloud.google.com/container-optimized-os/docs/how-to/run-gpus).
        options += [f"--volume=/var/lib/nvidia/{folder}:/usr/local/nvidia/{folder}:ro" for folder in ("lib64", "bin")]
        devices = [*map(str, range(gpus)), "ctl", "-uvm"]
        options += [f"--device=/dev/nvidia{device}" for device in devices]
    return [*options, spec.image, *spec.argv_of_slice(number)]


def _one_a_line(words: Iterable[str]) -> str:
    return "".join(f"{word}\n" for word in words)

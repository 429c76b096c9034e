"""Compute Engine: a VM for each job, or for each slice, which runs its container once and deletes itself.

A VM is what `instances.insert` takes (cloud.google.com/compute/docs/reference/rest/v1). It runs Container-Optimized OS,
which starts `vm_start.sh`. No value of a user is part of that script: it reads the words of `docker run` in the VM's
metadata. Compute Engine deletes the VM at `maxRunDuration`, whatever the job does.

A VM logs its events in Cloud Logging, which keeps them for 30 days; the last one has the exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from job.coordination.sealed import utc_text
from job.exits import Exit, JobError, Restart, State, restart_after, state_after
from job.jobs.backends import Cause, JobStatus, JsonObject, google, joined
from job.jobs.machines import Machine
from job.jobs.spec import SCRATCH, JobSpec

VM_IMAGE = "projects/cos-cloud/global/images/family/cos-stable"
VM_LOG = "ddpm-jobs"
JOB_LABEL, SLICE_LABEL, SLICES_LABEL = "ddpm-job", "ddpm-slice", "ddpm-slices"
LOG_LOOK_BACK = timedelta(days=30)
"""The default retention of Cloud Logging."""
_COMING = {"PROVISIONING", "STAGING", "PENDING", "REPAIRING"}
_SWITCHED_OFF = {"TERMINATED", "STOPPED", "SUSPENDED"}
_LEAVING = {"STOPPING", "PENDING_STOP", "SUSPENDING", "DEPROVISIONING", *_SWITCHED_OFF}


class VmTarget(google.GoogleTarget):
    """A Compute Engine VM for each job, which deletes itself. `elsewhere` is the target's next zone."""

    engine = "Compute Engine"
    # It counts from a VM's first minute to its last.
    limit = ("for all attempts together, then the engine ends it", 1, "")
    backend: Literal["vm"]
    zones: list[Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+-[a-z]$")]] = Field(min_length=1)

    @property
    def places(self) -> list[str]:
        """See `GoogleTarget.places`."""
        return self.zones

    def submit(self, spec: JobSpec) -> None:
        """See `Target.submit`."""
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
                # Before the request, which may succeed without an answer.
                made.append({"name": manifest["name"], "zone": self.place})
                operations.append(self.create(f"POST {self._path(self.place)}/instances", manifest))
            self._wait(operations)
        except BaseException as error:
            if "alreadyExists" in str(error):
                # It belongs to another person, who was faster.
                made.pop()
            with suppress(JobError):
                self._delete(made)
            raise
        # Events of an earlier job of this name no longer count.
        self._log_event(spec.name, spec.slices, "submitted")

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`."""
        return vm_alive(name, self.find(name), self._last_events(name))

    def jobs(self) -> list[JobStatus]:
        """Returns the jobs that have a machine."""
        machines: dict[str, list[JsonObject]] = {}
        for machine in self.find():
            machines.setdefault(machine["labels"][JOB_LABEL], []).append(machine)
        return [vm_alive(name, own, {}) for name, own in machines.items()]

    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """See `GoogleTarget.log_of`: docker's output, and the events of the machines themselves."""
        machines, parts = self.find(name), self._last_events(name)
        found = vm_alive(name, machines, parts)
        if not found.created:
            raise self.unknown(name)
        docker = self._filter("gcplogs-docker-driver", "jsonPayload.container.metadata", name)
        filter_ = f"({docker}) OR ({self._filter(VM_LOG, 'labels', name)})"
        return filter_, datetime.fromisoformat(found.created), len(parts) > 1 or any(map(_slices, machines))

    def slice_of(self, entry: JsonObject) -> str:
        """See `GoogleTarget.slice_of`."""
        container = entry["jsonPayload"].get("container", {})
        return str((container.get("metadata") or entry["labels"]).get(SLICE_LABEL, "all"))

    def cancel(self, name: str) -> str:
        """See `Target.cancel`: deleting a machine switches it off first, which stops the container."""
        machines = self.known(name)
        # Otherwise a watch would count the machines as lost, and submit the job again.
        self._log_event(name, _slices(machines[0]), "cancelled")
        self._delete(machines)
        return self.effect_of_cancelling(vm_alive(name, machines, {}).state)

    def find(self, name: str = "") -> list[JsonObject]:
        """Returns the machines of one job, or of all, in any zone of the project."""
        request = f"GET compute/projects/{self.project}/aggregated/instances"
        pages = self.pages(request, filter=f"labels.{JOB_LABEL}" + (f"={name}" if name else ":*"))
        return [one for page in pages for zone in page.get("items", {}).values() for one in zone.get("instances", ())]

    def _path(self, zone: str) -> str:
        return f"compute/projects/{self.project}/zones/{zone}"

    def _filter(self, log: str, labels: str, name: str) -> str:
        return f'logName="projects/{self.project}/logs/{log}" AND {labels}."{JOB_LABEL}"="{name}"'

    def _last_events(self, name: str) -> dict[int, JobStatus]:
        since = datetime.now(UTC) - LOG_LOOK_BACK
        return last_events(name, self.log_entries(self._filter(VM_LOG, "labels", name), since))

    def _log_event(self, name: str, slices: int, event: str) -> None:
        """Logs an event about a job; without the right to write logs all else still works."""
        labels, log = {JOB_LABEL: name, SLICES_LABEL: str(slices)}, f"projects/{self.project}/logs/{VM_LOG}"
        entry = {"labels": labels, "jsonPayload": {"message": f"ddpm-vm: {event}", "event": event}}
        with suppress(JobError):
            self.ask("POST logging/entries:write", {"logName": log, "resource": {"type": "global"}, "entries": [entry]})

    def _delete(self, machines: Iterable[JsonObject]) -> None:
        """Deletes machines, and waits until all are gone."""
        operations = []
        for machine in machines:
            with suppress(google.GoogleNotFoundError):
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
                raise google.refusal(status, reason, f"machine {machine} in {zone}")

    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `GoogleTarget.requests_for`: bodies of `instances.insert`, one, or one for each slice."""
        return [self._instance(spec, machine, number) for number in range(spec.machines)]

    def _instance(self, spec: JobSpec, machine: Machine, number: int) -> JsonObject:
        zone = self.place
        labels = {JOB_LABEL: spec.name, SLICE_LABEL: str(number), SLICES_LABEL: str(spec.slices)}
        variables = google.container_variables(spec)
        metadata = {
            "startup-script": start_script(),
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
            "diskSizeGb": str(self.boot_disk_gigabytes),
            "diskType": f"zones/{zone}/diskTypes/{machine.disk_type}",
            "labels": spec.all_labels,
        }
        interface: JsonObject = {**self.network_in(zone.rpartition("-")[0]), "nicType": "GVNIC"}
        if len(interface) == 1:
            # A named network reaches Google without external addresses; the default one does not.
            external = {"type": "ONE_TO_ONE_NAT", "name": "External NAT"}
            interface |= {"network": "global/networks/default", "accessConfigs": [external]}
        instance: JsonObject = {
            "name": _machine_name(spec, number),
            "description": f"ddpm {spec.verb}, job {spec.name}",
            "machineType": f"zones/{zone}/machineTypes/{machine.machine_type}",
            "labels": {**spec.all_labels, **labels},
            "scheduling": {
                "provisioningModel": "SPOT" if spec.spot else "STANDARD",
                # The disk of a stopped machine would cost money until a person deletes it.
                "instanceTerminationAction": "DELETE",
                # Machines with GPUs cannot move.
                "onHostMaintenance": "TERMINATE",
                "automaticRestart": False,
                "maxRunDuration": {"seconds": str(spec.max_seconds)},
            },
            "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}],
            "networkInterfaces": [interface],
            "serviceAccounts": [{"email": self.service_account or "default", "scopes": [google.CLOUD_SCOPE]}],
            "shieldedInstanceConfig": {"enableSecureBoot": True, "enableVtpm": True, "enableIntegrityMonitoring": True},
            "metadata": {"items": [{"key": key, "value": value} for key, value in metadata.items()]},
        }
        if machine.extra:
            kind = f"zones/{zone}/acceleratorTypes/{machine.gpu_type}"
            instance["guestAccelerators"] = [{"acceleratorType": kind, "acceleratorCount": machine.gpus}]
        return instance


def start_script() -> str:
    """Returns the script that a VM runs: `vm_start.sh` behind the exit codes that it names."""
    codes = (Exit.STOPPED, Exit.BUCKET_AWAY, Exit.MISSING_INPUT)
    lines = "".join(f"{code.name.lower()}={code:d}\n" for code in codes)
    return f"#!/bin/bash\n{lines}{Path(__file__).with_name('vm_start.sh').read_text(encoding='utf-8')}"


def _slices(machine: JsonObject) -> int:
    """Returns the number of its job's slices; 0 for none."""
    return int(machine["labels"][SLICES_LABEL])


def _zone(resource: JsonObject) -> str:
    return str(resource["zone"]).rpartition("/")[2]


def last_events(name: str, entries: Iterable[JsonObject]) -> dict[int, JobStatus]:
    """Returns the status of each slice of a job, or of the job, by the events in the log, the oldest first.

    Events before the last submission, or before the start of the slice's machine, do not count. A slice without an
    event since then is `State.GONE`.
    """
    parts: dict[int, JobStatus] = {}
    for entry in entries:
        labels, payload = entry["labels"], entry["jsonPayload"]
        event, code, number = payload.get("event"), int(payload.get("code", 0)), int(labels.get(SLICE_LABEL, 0))
        gone = JobStatus(name, State.GONE, "its machine is gone", created=utc_text(entry["timestamp"]))
        if event == "submitted" or not parts:
            parts = dict.fromkeys(range(max(int(labels[SLICES_LABEL]), 1)), gone)
        part = parts.get(number, gone)
        match event:
            case "started":
                parts[number] = gone
            case "cancelled":
                lost = [index for index, one in parts.items() if one.state is State.GONE]
                parts |= {index: replace(parts[index], state=State.CANCELLED, message=event) for index in lost}
            # A code that would come again counts more than the loss of the machine.
            case "taken" if restart_after(code) is not Restart.NEVER:
                if part.state is not State.CANCELLED:
                    parts[number] = replace(part, message="its machine was taken away", cause=Cause.TAKEN_AWAY)
            case "ended" | "taken":
                parts[number] = replace(JobStatus(name, state_after(code), exit_code=code), created=part.created)
    return parts


def vm_alive(name: str, machines: Sequence[JsonObject], parts: Mapping[int, JobStatus]) -> JobStatus:
    """Returns the status of a job, all its slices together, by its machines, and by `last_events` of those gone."""
    gone = JobStatus(name, State.GONE, "its machine is gone, and logged no end")
    found = [parts.get(number, gone) for number in range(max([1, len(parts), *map(_slices, machines)]))]
    for machine in machines:
        number = int(machine["labels"][SLICE_LABEL])
        found[number] = _of_machine(machine, found[number])
    return JobStatus.of_slices(found)


def _of_machine(machine: JsonObject, logged: JobStatus) -> JobStatus:
    """Returns the status of a job whose machine exists; its logged end counts once the machine is leaving."""
    status = machine["status"]
    logged = replace(logged, created=utc_text(machine["creationTimestamp"]), place=_zone(machine))
    if status in _SWITCHED_OFF:
        off = f"its machine is switched off, and its disk costs money: `ddpm jobs cancel {logged.name}` deletes both"
        return replace(logged, message=joined(logged.message, off))
    if status in _LEAVING and logged.exit_code is not None:
        return logged
    state = State.WAITING if status in _COMING else State.RUNNING
    message = "the machine is being made" if status in _COMING else "its machine is being taken away"
    message *= status in _COMING | _LEAVING
    return JobStatus(logged.name, state, message, created=logged.created, place=logged.place)


def _machine_name(spec: JobSpec, number: int) -> str:
    return f"{spec.name}-{number}" if spec.slices else spec.name


def _docker_words(spec: JobSpec, gpus: int, number: int) -> list[str]:
    """Returns the words after `docker run`, without the options for the log."""
    options = [
        f"--hostname={_machine_name(spec, number)}",
        f"--label={JOB_LABEL}={spec.name}",
        f"--label={SLICE_LABEL}={number}",
        "--env-file=/run/ddpm/environment",
        *google.CONTAINER_OPTIONS,
        f"--mount=type=bind,source=/var/lib/ddpm,target={SCRATCH}",
    ]
    if gpus:
        # As `--gpus all` elsewhere (cloud.google.com/container-optimized-os/docs/how-to/run-gpus).
        options += [f"--volume=/var/lib/nvidia/{folder}:/usr/local/nvidia/{folder}:ro" for folder in ("lib64", "bin")]
        options += [f"--device=/dev/nvidia{device}" for device in (*range(gpus), "ctl", "-uvm")]
    return [*options, spec.image, *spec.argv_of_slice(number)]


def _one_a_line(words: Iterable[str]) -> str:
    return "".join(f"{word}\n" for word in words)

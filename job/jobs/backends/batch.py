"""Google Batch, which makes the machines, retries what may be retried, and keeps the record of a job for two months.

A job is what `jobs.create` takes (cloud.google.com/batch/docs/reference/rest). Batch has one policy about exit codes
with one action: it retries the listed codes alone (RETRY_TASK), or all others (FAIL_TASK). This program retries every
unknown code, which needs the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from job.coordination.sealed import utc_text
from job.exits import BadRequestError, Restart, State, failures, state_after
from job.jobs.backends import Cause, JobStatus, JsonObject, google
from job.jobs.machines import Machine
from job.jobs.spec import LABEL_PREFIX, SCRATCH, JobSpec

TASK_INDEX = "$BATCH_TASK_INDEX"
"""The variable in which Batch gives each task its number."""
MAX_RETRIES = 10
"""The most that Batch takes. It counts preemptions as well, and so `--watch` goes on after them."""
_STATES = {
    "RUNNING": State.RUNNING,
    "SUCCEEDED": State.FINISHED,
    "FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED,
    # Its program still runs, and saves.
    "DELETION_IN_PROGRESS": State.RUNNING,
    "CANCELLATION_IN_PROGRESS": State.RUNNING,
}
"""The states of a job; in every other one it waits."""
_RESERVED: dict[int, tuple[str, Cause | None]] = {
    50000: ("Batch gives no reason", None),
    50001: ("its spot machine was taken away", Cause.TAKEN_AWAY),
    50002: ("its machine stopped answering", Cause.TAKEN_AWAY),
    50003: ("its machine restarted", Cause.TAKEN_AWAY),
    50004: ("it could not be ended", Cause.STUCK),
    50005: ("it ran longer than --max-hours", Cause.OUT_OF_TIME),
    50006: ("its machine was made again", Cause.TAKEN_AWAY),
}
"""Batch's own exit codes (cloud.google.com/batch/docs/troubleshooting#reserved-exit-codes)."""
FAILING_CODES = [*failures(Restart.NEVER), 50004, 50005]
"""The exit codes, of the program and of Batch, after which a task is not tried again."""


class BatchTarget(google.GoogleTarget):
    """Google Batch. A job waits in one region; `elsewhere` is the target's next one."""

    engine = "Batch"
    # For 60 days after their end.
    keeps_ended = True
    limit = (
        f"for each attempt of a task, of which there may be {1 + MAX_RETRIES}, then Batch ends it",
        1 + MAX_RETRIES,
    )
    backend: Literal["batch"]
    regions: list[Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]] = Field(min_length=1)

    @property
    def places(self) -> list[str]:
        """See `GoogleTarget.places`."""
        return self.regions

    def submit(self, spec: JobSpec) -> None:
        """See `Target.submit`. Batch takes every job, and looks for machines afterwards: see `JobStatus.message`."""
        (manifest,) = self.render(spec)
        while before := self.find(spec.name):
            if not _state_of(before[0]).is_over and not _is_being_ended(before[0]):
                raise self.runs_already(spec.name, f"in {_region(before[0])}")
            self._delete(before[0])
        self.create(f"POST {self._path(self.place)}", manifest, jobId=spec.name)

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`."""
        if not (found := self.find(name)):
            return JobStatus(name, State.GONE, "Batch does not know it")
        return batch_alive(found[0], self._tasks(found[0]))

    def jobs(self) -> list[JobStatus]:
        """See `Target.jobs`."""
        pages = (page for region in self.places for page in self.pages(f"GET {self._path(region)}"))
        found = [job for page in pages for job in page.get("jobs", ())]
        return [batch_alive(job, ()) for job in found if job.get("labels", {}).get("app") == LABEL_PREFIX]

    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """See `GoogleTarget.log_of`."""
        found, log = self.known(name)[0], f"projects/{self.project}/logs/batch_task_logs"
        has_slices = int(found["taskGroups"][0]["taskCount"]) > 1
        return f'logName="{log}" AND labels.job_uid="{found["uid"]}"', _created(found), has_slices

    def slice_of(self, entry: JsonObject) -> str:
        """See `GoogleTarget.slice_of`: the label is task/JOB-group0-INDEX/RETRY/RUNNABLE."""
        return str(entry["labels"]["task_id"]).split("/")[1].rpartition("-")[2]

    def cancel(self, name: str) -> str:
        """See `Target.cancel`: Batch ends its tasks, deletes their machines, and keeps the record of the job.

        Raises:
            BadRequestError: it is over already.
        """
        found = self.known(name)[0]
        state = _state_of(found)
        if state.is_over:
            raise BadRequestError(f"job {name!r} is {state} already")
        if not _is_being_ended(found):
            self.ask(f"POST batch/{found['name']}:cancel", {})
        return self.effect_of_cancelling(state)

    def find(self, name: str) -> list[JsonObject]:
        """Returns the jobs of this name, one for each region: one that is not over first, then the newest."""
        found = []
        for region in self.places:
            with suppress(google.GoogleNotFoundError):
                found.append(self.ask(f"GET {self._path(region)}/{name}"))
        return sorted(found, key=lambda one: (not _state_of(one).is_over, _created(one)), reverse=True)

    def _path(self, region: str) -> str:
        return f"batch/projects/{self.project}/locations/{region}/jobs"

    def _tasks(self, found: JsonObject) -> list[JsonObject]:
        if _state_of(found) is State.WAITING:
            # A job that has only just been made has not even an empty list of tasks.
            return []
        pages = self.pages(f"GET batch/{found['name']}/taskGroups/group0/tasks")
        return [task for page in pages for task in page.get("tasks", ())]

    def _delete(self, found: JsonObject) -> None:
        """Deletes a job, and waits until Batch has forgotten it."""
        with suppress(google.GoogleNotFoundError):
            if found["status"]["state"] != "DELETION_IN_PROGRESS":
                self.ask(f"DELETE batch/{found['name']}")
            for _ in self.patience(found["name"]):
                self.ask(f"GET batch/{found['name']}")

    def requests_for(self, spec: JobSpec, machine: Machine) -> list[JsonObject]:
        """See `GoogleTarget.requests_for`: the body of `jobs.create`, whose `jobId` is the name of the job."""
        if spec.max_hours > 14 * 24:
            raise BadRequestError(f"--max-hours {spec.max_hours:g}: Batch runs nothing for longer than 336 hours")
        group = {
            "taskCount": str(spec.machines),
            "parallelism": str(spec.machines),
            "taskCountPerNode": "1",
            "runAsNonRoot": True,
            "taskSpec": _task(spec, machine),
        }
        allocation, logs = self._allocation(spec, machine), {"destination": "CLOUD_LOGGING"}
        made = {"labels": spec.all_labels, "taskGroups": [group], "allocationPolicy": allocation, "logsPolicy": logs}
        return [made]

    def _allocation(self, spec: JobSpec, machine: Machine) -> JsonObject:
        # Docker on batch-debian knows `--gpus`; that on batch-cos does not.
        disk = {"image": "batch-debian", "type": machine.disk_type, "sizeGb": str(self.boot_disk_gigabytes)}
        kind = "SPOT" if spec.spot else "STANDARD"
        policy: JsonObject = {"machineType": machine.machine_type, "provisioningModel": kind, "bootDisk": disk}
        if machine.extra:
            policy["accelerators"] = [{"type": machine.gpu_type, "count": str(machine.gpus)}]
        allocation: JsonObject = {
            "location": {"allowedLocations": [f"regions/{self.place}"]},
            "instances": [{"policy": policy, "installGpuDrivers": bool(machine.gpus), "blockProjectSshKeys": True}],
            "labels": spec.all_labels,
        }
        if self.service_account:
            allocation["serviceAccount"] = {"email": self.service_account, "scopes": [google.CLOUD_SCOPE]}
        if network := self.network_in(self.place):
            # A named network reaches Google without external addresses.
            allocation["network"] = {"networkInterfaces": [{**network, "noExternalIpAddress": True}]}
        return allocation


def _task(spec: JobSpec, machine: Machine) -> JsonObject:
    resources = {}
    if machine.shape:
        cpus, memory_mib = machine.shape
        resources = {"computeResource": {"cpuMilli": str(1000 * cpus), "memoryMib": str(memory_mib)}}
    words: JsonObject = {"commands": [*spec.argv]}
    if spec.slices:
        # All tasks get the same words, so a shell fills in the number of a slice.
        script = " ".join(("exec", "ddpm", *spec.shell_words(TASK_INDEX)))
        words = {"entrypoint": "/bin/sh", "commands": ["-c", script]}
    # Docker makes the volume, with the rights of the folder in the image, and removes it.
    scratch = f"--mount=type=volume,target={SCRATCH}"
    container = {
        "imageUri": spec.image,
        **words,
        # Only constants, because Batch splits the text at spaces.
        "options": " ".join((*google.CONTAINER_OPTIONS, scratch, *["--gpus=all"] * bool(machine.gpus))),
    }
    environment = {"variables": google.container_variables(spec)}
    return {
        "maxRetryCount": MAX_RETRIES,
        "maxRunDuration": f"{spec.max_seconds}s",
        **resources,
        "lifecyclePolicies": [{"action": "FAIL_TASK", "actionCondition": {"exitCodes": FAILING_CODES}}],
        "runnables": [{"displayName": spec.verb, "container": container, "environment": environment}],
    }


def batch_alive(found: JsonObject, tasks: Sequence[JsonObject]) -> JobStatus:
    """Returns whether a job lives by Batch's record of it, and by those of its tasks, if they were requested."""
    name, state = found["name"].rpartition("/")[2], _state_of(found)
    status = JobStatus(name, state, _message(found, state), 0 if state is State.FINISHED else None)
    codes = [(task["status"].get("state"), _codes_of(task)) for task in tasks]
    if state is State.FAILED:
        ends = [_ended_task(name, each[-1]) for ended, each in codes if ended == "FAILED" and each]
        status = max(ends, key=lambda end: end.restart, default=status)
    counted = (sum(_ended_task(name, code).restart is Restart.BOUNDED for code in each) for _, each in codes)
    created = utc_text(found["createTime"])
    return replace(status, failures=max(counted, default=0), created=created, place=_region(found))


def _ended_task(name: str, code: int) -> JobStatus:
    if code not in _RESERVED:
        return JobStatus(name, state_after(code), exit_code=code)
    reason, cause = _RESERVED[code]
    return JobStatus(name, State.FAILED, reason, cause=cause)


def _codes_of(task: JsonObject) -> list[int]:
    """Returns the exit codes of a task's failed attempts, the oldest first."""
    codes = (event.get("taskExecution", {}).get("exitCode", 0) for event in _events(task))
    return [code for code in codes if code]


def _message(found: JsonObject, state: State) -> str:
    if _is_being_ended(found):
        return "it is being ended"
    events = [str(event.get("description", "")) for event in _events(found)]
    if state is State.FAILED and events:
        return events[-1]
    shortages = [want[1].partition(":")[0] for event in events if (want := google.shortage(event))]
    return f"{shortages[-1]}, and Batch keeps trying" if state is State.WAITING and shortages else ""


def _state_of(found: JsonObject) -> State:
    return _STATES.get(found["status"].get("state", ""), State.WAITING)


def _is_being_ended(found: JsonObject) -> bool:
    return str(found["status"].get("state", "")).endswith("_IN_PROGRESS")


def _events(found: JsonObject) -> list[JsonObject]:
    """Returns the events of a job or a task, the oldest first."""
    return list(found["status"].get("statusEvents", ()))


def _region(found: JsonObject) -> str:
    return str(found["name"]).split("/")[3]


def _created(found: JsonObject) -> datetime:
    return datetime.fromisoformat(found["createTime"])

"""Google Batch: it makes the machines, retries what may be retried, and keeps the story of a job for two months.

A job is what `jobs.create` takes (cloud.google.com/batch/docs/reference/rest). Batch has one policy about exit codes,
of one action: it retries the listed codes alone (RETRY_TASK), or all but the listed ones (FAIL_TASK). This program has
every code retried that it does not know, which only the second one says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from job.exits import BadRequestError, BucketAwayError, MissingInputError, retried
from job.jobs.backends import google, google_jobs
from job.jobs.backends.base import Cause, JobStatus, Manifest, State, cancelled, severity
from job.jobs.backends.google import Answer, GoogleNotFoundError, quoted
from job.jobs.backends.machines import Machine, machine_for
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import BatchTarget
from job.requests import BATCH_TASK_INDEX

BATCH_POLL_SECONDS = 2.0
BATCH_DELETION_SECONDS = 600.0
"""How long removing a job may take: its machines save and are deleted first."""
MAX_RETRIES = 10
"""The most that Batch takes; it counts preemptions like everything else, and so `--watch` goes on where it stops."""
_BATCH_STATES = {
    "QUEUED": State.WAITING,
    "SCHEDULED": State.WAITING,
    "RUNNING": State.RUNNING,
    "SUCCEEDED": State.FINISHED,
    "FAILED": State.FAILED,
    "CANCELLED": State.CANCELLED,
    # Its program still runs, and saves.
    "DELETION_IN_PROGRESS": State.RUNNING,
    "CANCELLATION_IN_PROGRESS": State.RUNNING,
}
_RESERVED: dict[int, tuple[str, Cause | None]] = {
    50000: ("Batch does not say why", None),
    50001: ("its spot machine was taken away", Cause.TAKEN_AWAY),
    50002: ("its machine stopped answering", Cause.TAKEN_AWAY),
    50003: ("its machine restarted", Cause.TAKEN_AWAY),
    50004: ("it could not be ended", None),
    50005: ("it ran longer than --max-hours", Cause.OUT_OF_TIME),
    50006: ("its machine was made anew", Cause.TAKEN_AWAY),
}
"""Exit codes of Batch's own (cloud.google.com/batch/docs/troubleshooting#reserved-exit-codes)."""
FAILING_CODES = (*(code for code in range(1, 256) if retried(code) == "never"), 50004, 50005)
"""With which a task is not tried again: of the program, and of Batch itself."""
_SHORTAGES = {
    "RESOURCE_POOL_EXHAUSTED": "there is no such machine now",
    "QUOTA_EXCEEDED": "the project's quota does not allow it",
}
"""What Batch passes on from Compute Engine in an event of a job that waits."""


class BatchBackend(google_jobs.GoogleBackend):
    """See `Backend`. A job waits in one region; `elsewhere` is the target's next one."""

    engine = "Batch"
    # Jobs that are over for 60 days.
    keeps_ended = True
    target: BatchTarget

    def render(self, spec: JobSpec) -> list[Manifest]:
        """See `Backend.render`: the body of `jobs.create`, whose `jobId` is the name of the job."""
        return [batch_job(spec, self.target, self.place)]

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`. Batch takes every job, and looks for machines afterwards: see `JobStatus.message`."""
        (manifest,) = self.render(spec)
        while before := self._newest(spec.name):
            if not _job_state(before).is_over and not _is_ending(before):
                raise google_jobs.busy(batch_status(before, ()))
            self._delete(before)
        # A repetition whose first answer was lost must not find its own job in its way.
        query = {"jobId": spec.name, "requestId": str(uuid.uuid4())}
        self._apis.ask(f"job {spec.name} in {self.place}", f"POST {self._path(self.place)}", manifest, **query)

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`."""
        found = self._newest(name)
        if found is None:
            return JobStatus(name, State.GONE, "Batch does not know it")
        return batch_status(found, self._tasks(found))

    def jobs(self) -> list[JobStatus]:
        """See `Backend.jobs`."""
        asked = [self._apis.pages(f"the jobs in {region}", f"GET {self._path(region)}") for region in self._places]
        found = [job for pages in asked for page in pages for job in page.get("jobs", ())]
        own = [job for job in found if job.get("labels", {}).get("app") == LABEL_PREFIX]
        return [batch_status(job, ()) for job in sorted(own, key=_created, reverse=True)]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: each region has names of its own."""
        return ("batch", self.target.project, status.place, status.name)

    def log_of(self, name: str) -> tuple[str, datetime, bool]:
        """See `GoogleBackend.log_of`."""
        found = self._known(name)
        log = quoted(f"projects/{self.target.project}/logs/batch_task_logs")
        has_slices = int(found["taskGroups"][0]["taskCount"]) > 1
        return f"logName={log} AND labels.job_uid={quoted(found['uid'])}", _created(found), has_slices

    def slice_of(self, entry: Answer) -> str:
        """See `GoogleBackend.slice_of`: the label is task/JOB-group0-INDEX/RETRY/RUNNABLE."""
        task = str(entry["labels"].get("task_id", "")).removeprefix("task/").partition("/")[0]
        return task.rpartition("-")[2]

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: Batch ends its tasks, deletes their machines, and keeps the story of the job.

        Raises:
            BadRequestError: it is over already.
        """
        found = self._known(name)
        if _job_state(found).is_over:
            raise BadRequestError(f"job {name!r} is {_job_state(found)} already")
        if not _is_ending(found):
            self._apis.ask(f"job {name}", f"POST batch/{found['name']}:cancel", {})
        return cancelled(_job_state(found))

    def describe(self, name: str) -> Manifest:
        """See `Backend.describe`: the job, and its tasks."""
        found = self._known(name)
        return {**found, "tasks": self._tasks(found)}

    def _path(self, region: str) -> str:
        return f"batch/projects/{self.target.project}/locations/{region}/jobs"

    def _newest(self, name: str) -> Answer | None:
        """The job of this name in any region of the target: one that is not over, else the newest."""
        found = []
        for region in self._places:
            with suppress(GoogleNotFoundError):
                found.append(self._apis.ask(f"job {name} in {region}", f"GET {self._path(region)}/{name}"))
        return max(found, key=lambda one: (not _job_state(one).is_over, _created(one)), default=None)

    def _known(self, name: str) -> Answer:
        found = self._newest(name)
        if found is None:
            regions = ", ".join(self._places)
            raise MissingInputError(f"no job {name!r} in project {self.target.project} in {regions}")
        return found

    def _tasks(self, found: Answer) -> list[Answer]:
        if _job_state(found) is State.WAITING:
            # One that has only just been made has none, not even an empty list.
            return []
        pages = self._apis.pages(f"the tasks of {found['name']}", f"GET batch/{found['name']}/taskGroups/group0/tasks")
        return [task for page in pages for task in page.get("tasks", ())]

    def _delete(self, found: Answer) -> None:
        """Deletes a job, and waits until Batch has forgotten it."""
        what, until = f"job {found['name']}", time.monotonic() + BATCH_DELETION_SECONDS
        with suppress(GoogleNotFoundError):
            if found["status"]["state"] != "DELETION_IN_PROGRESS":
                self._apis.ask(what, f"DELETE batch/{found['name']}")
            while time.monotonic() < until:
                self._apis.ask(what, f"GET batch/{found['name']}")
                time.sleep(BATCH_POLL_SECONDS)
            raise BucketAwayError(f"{what}: not deleted after {BATCH_DELETION_SECONDS:.0f} s: look later")


def batch_status(found: Answer, tasks: Sequence[Answer]) -> JobStatus:
    """A job's status from what Batch says about it, and about its tasks if it was asked."""
    state = _job_state(found)
    starts = sum(event.get("taskState") == "RUNNING" for task in tasks for event in _status_events(task))
    code = _failure(tasks) if state is State.FAILED else 0 if state is State.FINISHED else None
    return JobStatus(
        found["name"].rpartition("/")[2],
        state,
        _batch_message(found, state, code),
        # A code of Batch's own is none of the program.
        code if code is None or code < 256 else None,
        starts,
        google.utc_text(_created(found)),
        _region(found),
        _RESERVED.get(code or 0, ("", None))[1],
    )


def _failure(tasks: Sequence[Answer]) -> int | None:
    """The code with which the job failed: of the slices that failed, that of the one that failed worst."""
    codes = []
    for task in tasks:
        ends = [event.get("taskExecution", {}).get("exitCode", 0) for event in _status_events(task)]
        ends = [code for code in ends if code]
        if ends and task["status"].get("state") == "FAILED":
            codes.append(ends[-1])

    def how_bad(code: int) -> int:
        cause = _RESERVED.get(code, ("", None))[1]
        return severity(JobStatus("", State.FAILED, exit_code=code, cause=cause).retried)

    return max(codes, key=how_bad, default=None)


def _batch_message(found: Answer, state: State, code: int | None) -> str:
    if _is_ending(found):
        return "it is being ended"
    if state is State.FAILED and code is not None:
        return f"ended with code {code}: {_RESERVED[code][0] if code in _RESERVED else google_jobs.code_meaning(code)}"
    events = [str(event.get("description", "")) for event in _status_events(found)]
    for event in reversed(events) if state in (State.WAITING, State.FAILED) else ():
        for word, said in _SHORTAGES.items():
            if word in event:
                return f"{said}, and Batch keeps trying" if state is State.WAITING else said
    return events[-1] if state is State.FAILED and events else ""


def _job_state(found: Answer) -> State:
    return _BATCH_STATES.get(found["status"].get("state", ""), State.WAITING)


def _is_ending(found: Answer) -> bool:
    return str(found["status"].get("state", "")).endswith("_IN_PROGRESS")


def _status_events(found: Answer) -> list[Answer]:
    """Of a job or a task, the oldest first."""
    events: list[Answer] = found["status"].get("statusEvents", [])
    return events


def _region(found: Answer) -> str:
    return str(found["name"]).split("/")[3]


def _created(found: Answer) -> datetime:
    return datetime.fromisoformat(found["createTime"])


def batch_job(spec: JobSpec, target: BatchTarget, region: str) -> Manifest:
    """One job in one region. Pure.

    Raises:
        BadRequestError: Batch cannot run such a job; the message names the option.
    """
    google_jobs.check_google_job(spec, target, max_slices=1000)
    if spec.max_hours > 14 * 24:
        raise BadRequestError(f"--max-hours {spec.max_hours:g}: Batch runs nothing for longer than 336 hours")
    machine = machine_for(target.machine_type, spec.gpu_type or target.gpu_type, spec.gpus, spec.spot)
    return {
        "labels": spec.all_labels,
        "taskGroups": [
            {
                "taskCount": str(spec.machines),
                "parallelism": str(spec.machines),
                "taskCountPerNode": "1",
                "runAsNonRoot": True,
                "taskSpec": _task(spec, machine),
            }
        ],
        "allocationPolicy": _allocation(spec, target, region, machine),
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def _task(spec: JobSpec, machine: Machine) -> dict[str, Any]:
    resources = {}
    if machine.shape:
        cpus, memory_mib = machine.shape
        resources = {"computeResource": {"cpuMilli": str(1000 * cpus), "memoryMib": str(memory_mib)}}
    # Docker makes the volume, with the rights that it has in the image, and removes it.
    options = [
        *google_jobs.CONFINEMENT,
        f"--mount=type=volume,target={google_jobs.CONTAINER_SCRATCH}",
        *["--gpus=all"] * bool(machine.gpus),
    ]
    return {
        "maxRetryCount": MAX_RETRIES,
        "maxRunDuration": f"{spec.max_seconds}s",
        **resources,
        "lifecyclePolicies": [{"action": "FAIL_TASK", "actionCondition": {"exitCodes": [*FAILING_CODES]}}],
        "runnables": [
            {
                "displayName": spec.verb,
                "container": {
                    "imageUri": spec.image,
                    "commands": [*spec.argv_of_slice(BATCH_TASK_INDEX)],
                    # All constants: Batch takes these apart at the spaces.
                    "options": " ".join(options),
                },
                "environment": {"variables": google_jobs.container_variables(spec)},
            }
        ],
    }


def _allocation(spec: JobSpec, target: BatchTarget, region: str, machine: Machine) -> dict[str, Any]:
    policy: dict[str, Any] = {
        "machineType": machine.machine_type,
        "provisioningModel": "SPOT" if spec.spot else "STANDARD",
        "bootDisk": {
            # Its docker knows `--gpus`; that of batch-cos does not.
            "image": "batch-debian",
            "type": machine.disk_type,
            "sizeGb": str(target.boot_disk_gigabytes),
        },
    }
    if machine.extra:
        policy["accelerators"] = [{"type": machine.gpu_type, "count": str(machine.gpus)}]
    allocation: dict[str, Any] = {
        "location": {"allowedLocations": [f"regions/{region}"]},
        "instances": [{"policy": policy, "installGpuDrivers": bool(machine.gpus), "blockProjectSshKeys": True}],
        "labels": spec.all_labels,
    }
    if target.service_account:
        allocation["serviceAccount"] = {"email": target.service_account, "scopes": [google.CLOUD_SCOPE]}
    if network := google_jobs.network_of(target, region):
        # Who names a network has one that reaches Google without external addresses.
        allocation["network"] = {"networkInterfaces": [{**network, "noExternalIpAddress": True}]}
    return allocation

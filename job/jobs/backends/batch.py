"""Google Batch: it makes the machines, retries what may be retried, and keeps the story of a job for two months."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from job.exits import BadRequestError, BucketAwayError, MissingInputError
from job.jobs.backends import google_checks, google_logs
from job.jobs.backends.base import Backend, Cause, JobStatus, Manifest, State, cancelled, severity
from job.jobs.backends.batch_manifests import OVER_TIME, UNRESPONSIVE, job
from job.jobs.backends.google import GoogleApis, NotThereError
from job.jobs.backends.google_container import meaning
from job.jobs.backends.google_logs import Entry, quoted
from job.jobs.checks import Check
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import BatchTarget, Target

POLL_SECONDS = 2.0
GONE_SECONDS = 600.0
"""How long removing a job may take: its machines save and are deleted first."""
_STATES = {
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
_RESERVED = {
    50000: "Batch does not say why",
    50001: "its spot machine was taken away",
    50002: "its machine stopped answering",
    50003: "its machine restarted",
    UNRESPONSIVE: "it could not be ended",
    OVER_TIME: "it ran longer than --max-hours",
    50006: "its machine was made anew",
}
"""Exit codes of Batch's own (cloud.google.com/batch/docs/troubleshooting#reserved-exit-codes)."""
_CAUSES = {
    50001: Cause.TAKEN_AWAY,
    50002: Cause.TAKEN_AWAY,
    50003: Cause.TAKEN_AWAY,
    UNRESPONSIVE: Cause.UNRESPONSIVE,
    OVER_TIME: Cause.OUT_OF_TIME,
    50006: Cause.TAKEN_AWAY,
}
_SHORTAGES = {
    "RESOURCE_POOL_EXHAUSTED": "there is no such machine now, and Batch keeps trying",
    "QUOTA_EXCEEDED": "the project's quota does not allow it, and Batch keeps trying",
}
"""What Batch passes on from Compute Engine in an event of a job that waits."""


class BatchBackend(Backend):
    """See `Backend`. A job waits in one region; `elsewhere` is the target's next one."""

    # Batch deletes jobs that are over after 60 days.
    keeps_seconds = 60 * 86_400.0
    target: BatchTarget

    def __init__(self, target: Target, region: int = 0) -> None:
        """`region` is the number of the target's region that `submit` uses; everything else looks into all of them."""
        super().__init__(target)
        self._region = region
        self._apis = GoogleApis(self.target.project)

    @property
    def region(self) -> str:
        """Where `submit` makes jobs."""
        return self.target.regions[self._region]

    def render(self, spec: JobSpec) -> list[Manifest]:
        """See `Backend.render`: the body of `jobs.create`, whose `jobId` is the name of the job."""
        return [job(spec, self.target, self.region)]

    def elsewhere(self) -> BatchBackend | None:
        """See `Backend.elsewhere`: the next region."""
        return BatchBackend(self.target, self._region + 1) if self._region + 1 < len(self.target.regions) else None

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`. Batch takes every job, and looks for machines afterwards: see `JobStatus.message`."""
        from google.cloud import batch_v1

        (manifest,) = self.render(spec)
        self._make_room(spec.name)
        request = batch_v1.CreateJobRequest(
            parent=self._parent(self.region),
            job_id=spec.name,
            job=batch_v1.Job.from_json(json.dumps(manifest)),
            # A repetition whose first answer was lost must not find its own job in its way.
            request_id=str(uuid.uuid4()),
        )
        self._apis.ask(f"job {spec.name} in {self.region}", self._apis.batch.create_job, request)

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`."""
        found = self._newest(name)
        if found is None:
            return JobStatus(name, State.GONE, "Batch does not know it")
        return status_of(found, self._tasks(found))

    def jobs(self) -> list[JobStatus]:
        """See `Backend.jobs`."""
        found = [one for region in self.target.regions for one in self._listed(region)]
        found.sort(key=lambda one: _created(one), reverse=True)
        return [status_of(one, ()) for one in found]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: each region has names of its own."""
        return ("batch", self.target.project, status.place, status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """See `Backend.logs`."""
        found = self._known(name)
        log = quoted(f"projects/{self.target.project}/logs/batch_task_logs")
        filter_ = f"logName={log} AND labels.job_uid={quoted(found.uid)}"
        many = found.task_groups[0].task_count > 1
        if follow:
            entries: Iterator[Entry] | list[Entry] = google_logs.follow(
                self._apis, filter_, _created(found), lambda: self.status(name).state.is_over, should_stop
            )
        else:
            entries = google_logs.entries(self._apis, filter_, _created(found))
        for entry in entries:
            # The label is task/JOB-group0-INDEX/RETRY/RUNNABLE.
            task = entry.labels.get("task_id", "").removeprefix("task/").partition("/")[0].rpartition("-")[2]
            yield f"[{task}] {entry.text}" if many else entry.text

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: Batch ends its tasks, deletes their machines, and keeps the story of the job.

        Raises:
            BadRequestError: it is over already.
        """
        found = self._known(name)
        if _state(found).is_over:
            raise BadRequestError(f"job {name!r} is {_state(found)} already")
        what, until = f"job {found.name}", time.monotonic() + GONE_SECONDS
        if not found.status.state.name.endswith("_IN_PROGRESS"):
            self._apis.ask(what, self._apis.batch.cancel_job, {"name": found.name})
        while not (status := self.status(name)).state.is_over:
            if time.monotonic() > until:
                raise BucketAwayError(f"{what}: Batch is still at it after {GONE_SECONDS:.0f} s ({status.message})")
            time.sleep(POLL_SECONDS)
        return cancelled(_state(found))

    def describe(self, name: str) -> Manifest:
        """See `Backend.describe`: the job, and its tasks."""
        from google.cloud import batch_v1

        found = self._known(name)
        described: Manifest = json.loads(batch_v1.Job.to_json(found))
        described["tasks"] = [json.loads(batch_v1.Task.to_json(task)) for task in self._tasks(found)]
        return described

    def checks(self) -> Iterable[Check]:
        """See `Backend.checks`."""
        return google_checks.checks(self._apis, self.target, "Batch", self.target.regions, self.jobs)

    def _parent(self, region: str) -> str:
        return f"projects/{self.target.project}/locations/{region}"

    def _newest(self, name: str) -> Any | None:
        """The job of this name in any region of the target: one that is not over, else the newest."""
        found = []
        for region in self.target.regions:
            request = {"name": f"{self._parent(region)}/jobs/{name}"}
            try:
                found.append(self._apis.ask(f"job {name} in {region}", self._apis.batch.get_job, request))
            except NotThereError:
                continue
        return max(found, key=lambda one: (not _state(one).is_over, _created(one)), default=None)

    def _known(self, name: str) -> Any:
        found = self._newest(name)
        if found is None:
            regions = ", ".join(self.target.regions)
            raise MissingInputError(f"no job {name!r} in project {self.target.project} in {regions}")
        return found

    def _tasks(self, found: Any) -> list[Any]:
        request = {"parent": f"{found.name}/taskGroups/group0"}
        try:
            return self._apis.ask_for_all(f"the tasks of {found.name}", self._apis.batch.list_tasks, request)
        except NotThereError:
            # A job that has only just been made has none.
            return []

    def _listed(self, region: str) -> list[Any]:
        request = {"parent": self._parent(region), "page_size": 1000}
        listed = self._apis.ask_for_all(f"the jobs in {region}", self._apis.batch.list_jobs, request)
        return [one for one in listed if one.labels.get("app") == LABEL_PREFIX]

    def _make_room(self, name: str) -> None:
        """Removes a job of this name that is over, from all regions.

        Raises:
            BadRequestError: it is not over.
        """
        while (found := self._newest(name)) is not None:
            state = found.status.state.name
            if not _state(found).is_over and not state.endswith("_IN_PROGRESS"):
                raise BadRequestError(
                    f"job {name!r} is {_state(found)} in {_region(found)}: follow it with `ddpm jobs logs -f {name}`, "
                    f"or end it with `ddpm jobs cancel {name}`"
                )
            self._delete(found)

    def _delete(self, found: Any) -> None:
        """Deletes a job, and waits until Batch has forgotten it."""
        what, until = f"job {found.name}", time.monotonic() + GONE_SECONDS
        try:
            if found.status.state.name != "DELETION_IN_PROGRESS":
                self._apis.ask(what, self._apis.batch.delete_job, {"name": found.name})
            while time.monotonic() < until:
                self._apis.ask(what, self._apis.batch.get_job, {"name": found.name})
                time.sleep(POLL_SECONDS)
        except NotThereError:
            return
        raise BucketAwayError(f"{what}: Batch has not deleted it within {GONE_SECONDS:.0f} s: look later")


def status_of(found: Any, tasks: Sequence[Any]) -> JobStatus:
    """A job's status from what Batch says about it, and about its tasks if it was asked."""
    state = _state(found)
    events = [event.description for event in found.status.status_events]
    starts = sum(event.task_state.name == "RUNNING" for task in tasks for event in task.status.status_events)
    code = _failure(tasks) if state is State.FAILED else 0 if state is State.FINISHED else None
    return JobStatus(
        found.name.rpartition("/")[2],
        state,
        _message(state, found.status.state.name, events, code),
        # A code of Batch's own is none of the program.
        code if code is None or code < 256 else None,
        starts,
        _created(found).isoformat(timespec="seconds").replace("+00:00", "Z"),
        _region(found),
        None if code is None else _CAUSES.get(code),
    )


def _failure(tasks: Sequence[Any]) -> int | None:
    """The code with which the job failed: of the slices that failed, that of the one that failed worst."""
    codes = []
    for task in tasks:
        ends = [event.task_execution.exit_code for event in task.status.status_events]
        ends = [code for code in ends if code]
        if ends and task.status.state.name == "FAILED":
            codes.append(ends[-1])
    return max(codes, key=lambda code: severity(_rule(code)), default=None)


def _rule(code: int) -> str:
    return JobStatus("", State.FAILED, exit_code=code, cause=_CAUSES.get(code)).retried


def _message(state: State, word: str, events: Sequence[str], code: int | None) -> str:
    if word.endswith("_IN_PROGRESS"):
        return "it is being ended"
    if state is State.FAILED and code is not None:
        return f"ended with code {code}: {_RESERVED.get(code) or meaning(code)}"
    if state in (State.WAITING, State.FAILED):
        for event in reversed(events):
            for word_of_it, said in _SHORTAGES.items():
                if word_of_it in event:
                    return said if state is State.WAITING else said.partition(",")[0]
    return events[-1] if state is State.FAILED and events else ""


def _state(found: Any) -> State:
    return _STATES.get(found.status.state.name, State.WAITING)


def _region(found: Any) -> str:
    return str(found.name).split("/")[3]


def _created(found: Any) -> datetime:
    # Protocol buffers have a class of their own for times.
    seconds = found.create_time.timestamp() if found.create_time else 0.0
    return datetime.fromtimestamp(seconds, UTC)

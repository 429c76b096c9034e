"""Compute Engine: a VM for each job, or one for each slice, which deletes itself when the job is over."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError
from job.jobs.backends import google_checks, google_logs, vm_story
from job.jobs.backends.base import Backend, JobStatus, Manifest, cancelled
from job.jobs.backends.google import GoogleApis, NotThereError, refusal
from job.jobs.backends.vm_manifests import instances
from job.jobs.backends.vm_story import Machine
from job.jobs.checks import Check
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import Target, VmTarget

POLL_SECONDS = 1.0
OPERATION_SECONDS = 300.0
"""How long making or deleting a machine may take: a shutdown alone takes up to two minutes."""


class VmBackend(Backend):
    """See `Backend`. What a machine leaves behind is in Cloud Logging, for as long as that keeps it."""

    target: VmTarget

    def __init__(self, target: Target, zone: int = 0) -> None:
        """`zone` is the number of the target's zone that `submit` uses; everything else looks into all of them."""
        super().__init__(target)
        self._zone = zone
        self._apis = GoogleApis(self.target.project)

    @property
    def zone(self) -> str:
        """Where `submit` makes machines."""
        return self.target.zones[self._zone]

    def render(self, spec: JobSpec) -> list[Manifest]:
        """See `Backend.render`: the bodies of `instances.insert`, in the zone of this backend."""
        return instances(spec, self.target, self.zone)

    def elsewhere(self) -> VmBackend | None:
        """See `Backend.elsewhere`: the next zone."""
        return VmBackend(self.target, self._zone + 1) if self._zone + 1 < len(self.target.zones) else None

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`."""
        from google.cloud import compute_v1

        manifests = self.render(spec)
        self._make_room(spec.name)
        made: list[tuple[str, str]] = []
        try:
            operations = []
            for manifest in manifests:
                what = f"machine {manifest['name']} in {self.zone}"
                request = compute_v1.InsertInstanceRequest(
                    project=self.target.project,
                    zone=self.zone,
                    instance_resource=compute_v1.Instance.from_json(json.dumps(manifest)),
                    # A repetition whose first answer was lost must not find a machine in its way.
                    request_id=str(uuid.uuid4()),
                )
                # Before the request: one without an answer may have been met.
                made.append((self.zone, str(manifest["name"])))
                operations.append((what, self._apis.ask(what, self._apis.instances.insert_unary, request)))
            for what, operation in operations:
                self._wait(what, self.zone, operation)
            # Who may not write logs may submit all the same.
            with suppress(JobError):
                vm_story.tell_submitted(self._apis, spec.name, spec.slices)
        except BaseException as error:
            if isinstance(error, JobError) and "alreadyExists" in str(error):
                # It is somebody else's, who was faster.
                made.pop()
            with suppress(JobError):
                self._delete(made)
            raise

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`."""
        machines = self._machines(name)
        # A machine that is there knows best, and logs may be asked only so often.
        needs_log = not machines or any(machine.is_leaving for machine in machines)
        needs_log = needs_log or len(machines) < max(machine.slices for machine in machines)
        return vm_story.status(name, machines, vm_story.events(self._apis, name) if needs_log else [])

    def jobs(self) -> list[JobStatus]:
        """See `Backend.jobs`: those that have a machine."""
        names: dict[str, list[Machine]] = {}
        for machine in self._machines():
            names.setdefault(machine.instance.labels.get("ddpm-job", machine.instance.name), []).append(machine)
        found = [vm_story.status(name, machines, []) for name, machines in names.items()]
        return sorted(found, key=lambda status: status.created, reverse=True)

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: every target sees all zones of its project."""
        return ("vm", self.target.project, status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """See `Backend.logs`."""
        machines = self._machines(name)
        told = vm_story.events(self._apis, name)
        since = min((machine.created for machine in machines), default=None) or vm_story.latest_start(told)
        if since is None:
            raise MissingInputError(
                f"no job {name!r} on {self.target.name or 'vm'}, or its output is older than 30 days"
            )
        since -= timedelta(seconds=1)
        slices = max((machine.slices for machine in machines), default=0) or max(
            (int(entry.labels.get(vm_story.SLICES_LABEL, "0") or 0) for entry in told), default=0
        )
        logs = (vm_story.OUTPUT_LOG, vm_story.LOG)
        filter_ = " OR ".join(f"({vm_story.filter_of(self._apis, name, log)})" for log in logs)
        if follow:
            found = google_logs.follow(
                self._apis, f"({filter_})", since, lambda: self.status(name).state.is_over, should_stop
            )
        else:
            found = iter(google_logs.entries(self._apis, f"({filter_})", since))
        for entry in found:
            yield vm_story.line(entry, slices)

    def cancel(self, name: str) -> str:
        """See `Backend.cancel`: deleting a machine switches it off first, which stops the container."""
        machines = self._machines(name)
        if not machines:
            raise MissingInputError(f"no machine of job {name!r} in project {self.target.project}")
        # So that nobody takes it for lost, and starts it again. Who may not write logs may cancel all the same.
        with suppress(JobError):
            vm_story.tell_cancelled(self._apis, name, machines)
        self._delete([(machine.zone, machine.instance.name) for machine in machines])
        return cancelled(vm_story.status(name, machines, []).state)

    def describe(self, name: str) -> Manifest:
        """See `Backend.describe`: the instances of the job."""
        from google.cloud import compute_v1

        machines = self._machines(name)
        if not machines:
            raise MissingInputError(f"no machine of job {name!r} in project {self.target.project}")
        described = [json.loads(compute_v1.Instance.to_json(machine.instance)) for machine in machines]
        return {"instances": described, "said": {machine.instance.name: dict(machine.said) for machine in machines}}

    def checks(self) -> Iterable[Check]:
        """See `Backend.checks`."""
        regions = [*dict.fromkeys(zone.rpartition("-")[0] for zone in self.target.zones)]
        return google_checks.checks(self._apis, self.target, "Compute Engine", regions, self.jobs)

    def _machines(self, name: str = "") -> list[Machine]:
        """Those of one job, or of all, in any zone of the project."""
        project, client = self.target.project, self._apis.instances
        request = {"project": project, "filter": f"labels.app={LABEL_PREFIX}"}
        pages = self._apis.ask_for_all(f"the machines of project {project}", client.aggregated_list, request)
        found = [(place, instance) for place, scoped in pages for instance in scoped.instances]
        return [
            Machine(place.rpartition("/")[2], instance, self._said(place.rpartition("/")[2], instance))
            for place, instance in found
            if not name or instance.labels.get("ddpm-job") == name
        ]

    def _said(self, zone: str, instance: Any) -> dict[str, str]:
        if instance.status != "RUNNING":
            return {}
        request = {
            "project": self.target.project,
            "zone": zone,
            "instance": instance.name,
            "query_path": "ddpm/",
        }
        what = f"what machine {instance.name} says"
        try:
            found = self._apis.ask(what, self._apis.instances.get_guest_attributes, request)
        except NotThereError:
            # It has said nothing yet, or is gone by now.
            return {}
        return {item.key: item.value for item in found.query_value.items}

    def _make_room(self, name: str) -> None:
        """Removes machines of a job that is over, and waits for those that are going.

        Raises:
            BadRequestError: the job is not over.
        """
        machines = self._machines(name)
        going = [machine for machine in machines if machine.is_leaving or machine.said.get("phase") == "over"]
        if len(going) < len(machines):
            status = vm_story.status(name, machines, [])
            raise BadRequestError(
                f"job {name!r} is {status.state} in {status.place}: follow it with `ddpm jobs logs -f {name}`, or end "
                f"it with `ddpm jobs cancel {name}`"
            )
        self._delete([(machine.zone, machine.instance.name) for machine in going])

    def _delete(self, names: Sequence[tuple[str, str]]) -> None:
        """Deletes machines, and waits until they are gone. Those that are gone already count.

        Raises:
            JobError: the first refusal, after all have been asked for.
        """
        operations, refused = [], []
        for zone, name in names:
            what = f"machine {name} in {zone}"
            request = {"project": self.target.project, "zone": zone, "instance": name}
            try:
                operations.append((what, zone, self._apis.ask(what, self._apis.instances.delete_unary, request)))
            except NotThereError:
                continue
            except JobError as error:
                refused.append(error)
        for what, zone, operation in operations:
            with suppress(NotThereError):
                self._wait(what, zone, operation)
        if refused:
            raise refused[0]

    def _wait(self, what: str, zone: str, operation: Any) -> None:
        """Waits for an operation of a zone.

        Raises:
            JobError: it failed.
            BucketAwayError: it takes too long.
        """
        from google.cloud import compute_v1

        client, until = self._apis.zone_operations, time.monotonic() + OPERATION_SECONDS
        while operation.status != compute_v1.Operation.Status.DONE:
            if time.monotonic() > until:
                raise BucketAwayError(
                    f"{what}: Compute Engine has worked on it for {OPERATION_SECONDS:.0f} s: look later"
                )
            time.sleep(POLL_SECONDS)
            request = {"project": self.target.project, "zone": zone, "operation": operation.name}
            operation = self._apis.ask(what, client.get, request)
        problems = [f"{problem.code}: {problem.message}" for problem in operation.error.errors]
        if problems or operation.http_error_status_code >= 400:
            reason = "; ".join(problems) or operation.http_error_message
            raise refusal(cast(int, operation.http_error_status_code) or 400, reason, what, self.target.project)

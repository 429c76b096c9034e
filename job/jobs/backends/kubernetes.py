"""Jobs on a Kubernetes cluster: what `kubernetes_manifests` renders, sent by the official client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from job.exits import BadConfigError, BadRequestError, BucketAwayError, JobError, MissingInputError
from job.jobs.backends.base import Backend, JobStatus, Manifest, State, cancelled
from job.jobs.backends.kubernetes_api import (
    JOB,
    JOB_SET,
    RETRY_DELAYS_SECONDS,
    AlreadyThereError,
    Api,
    Kind,
    NotThereError,
)
from job.jobs.backends.kubernetes_checks import cluster_checks, require_job_sets, require_queue
from job.jobs.backends.kubernetes_logs import POLL_SECONDS, Follower, past_lines
from job.jobs.backends.kubernetes_manifests import MANIFEST_ANNOTATION, SHOWN_SECONDS, manifest
from job.jobs.backends.kubernetes_status import is_being_deleted, is_over, is_suspended, status_of
from job.jobs.checks import Check
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import KubernetesTarget, Target

GONE_MARGIN_SECONDS = 45.0
"""How long a job that is deleted may take to go, beyond the grace period of its pods."""
JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the Jobs that a JobSet makes."""
_NOISE = ("managedFields",)


class KubernetesBackend(Backend):
    """One namespace of a cluster. Jobs of one machine are Jobs, those of several JobSets; both have one name space."""

    keeps_seconds = SHOWN_SECONDS

    def __init__(
        self,
        target: Target,
        retry_delays_seconds: tuple[float, ...] = RETRY_DELAYS_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Connects to nothing yet.

        Args:
            target: which cluster.
            retry_delays_seconds: pauses between tries while the API is busy or away.
            poll_seconds: pauses between looks at a job that is followed or goes.
        """
        super().__init__(target)
        if not isinstance(target, KubernetesTarget):
            raise BadConfigError(f"target {target.name!r} is no cluster: its backend is {target.backend}")
        self._target, self._poll_seconds = target, poll_seconds
        self._api = Api(target, retry_delays_seconds)

    def render(self, spec: JobSpec) -> list[Manifest]:
        """A Job, or a JobSet for several nodes; `kubectl apply -f` takes it as well."""
        return [manifest(spec, self._target)]

    def submit(self, spec: JobSpec) -> None:
        """Sends it; a job of that name that is over makes room."""
        (made,) = self.render(spec)
        kind = JOB_SET if made["kind"] == "JobSet" else JOB
        if kind is JOB_SET:
            require_job_sets(self._api, spec.nodes)
        require_queue(self._api, self._target)
        for there, old in self._all_named(spec.name):
            if not (is_over(old) or is_being_deleted(old)):
                raise self._alive(old)
            self._remove(there, old)
            self._wait_until_gone(there, spec.name)
        self._create(kind, made)

    def status(self, name: str) -> JobStatus:
        """How it is going; a job that was deleted, or that is over for a day, is gone."""
        found = self._all_named(name)
        if not found:
            return JobStatus(name, State.GONE, f"there is no job {name!r} in namespace {self._target.namespace!r}")
        return self._status_of(found[0][1], self._pods(name))

    def jobs(self) -> list[JobStatus]:
        """All jobs with this program's label, newest first."""
        selector = f"app={LABEL_PREFIX}"
        objects = self._api.all_with(JOB, selector) + self._api.all_with(JOB_SET, selector)
        pods: dict[str, list[Manifest]] = {}
        for pod in self._api.pods(selector):
            pods.setdefault(pod["metadata"]["labels"].get("ddpm-job", ""), []).append(pod)
        found = [
            status_of(job, pods.get(job["metadata"]["name"], []))
            for job in objects
            # The jobs of a JobSet are its own.
            if not any(owner.get("kind") == "JobSet" for owner in job["metadata"].get("ownerReferences") or [])
        ]
        return sorted(found, key=lambda status: status.created, reverse=True)

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: two contexts may be one cluster."""
        return ("kubernetes", self._api.host, self._target.namespace, status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Lines of all its pods, with the index before each where there are several."""
        job = self._named(name)
        if not follow:
            yield from past_lines(self._api, self._pods(name))
            return

        def status(pods: list[Manifest]) -> JobStatus:
            found = self._all_named(name)
            return self._status_of(found[0][1], pods) if found else JobStatus(name, State.GONE)

        follower = Follower(self._api, lambda: self._pods(job["metadata"]["name"]), status, self._poll_seconds)
        yield from follower.lines(should_stop)

    def cancel(self, name: str) -> str:
        """Deletes it: its pods get SIGTERM and their grace period, in which they save."""
        job = self._named(name)
        status = status_of(job, self._pods(name))
        for kind, there in self._all_named(name):
            self._remove(kind, there)
        return status.message if is_being_deleted(job) else cancelled(status.state)

    def describe(self, name: str) -> Manifest:
        """The object, its pods and their events."""
        job, pods = self._named(name), self._pods(name)
        names = [name, *(pod["metadata"]["name"] for pod in pods)]
        events = [event for about in names for event in self._api.events(about)]
        return {"job": _plain(job), "pods": [*map(_plain, pods)], "events": [*map(_plain, events)]}

    def checks(self) -> Iterator[Check]:
        """The cluster, rights, account, JobSets, queue and quota."""
        return cluster_checks(self._api, self._target)

    def _all_named(self, name: str) -> list[tuple[Kind, Manifest]]:
        found = [(kind, self._api.get(kind, name)) for kind in (JOB, JOB_SET)]
        return [(kind, job) for kind, job in found if job is not None]

    def _named(self, name: str) -> Manifest:
        found = self._all_named(name)
        if not found:
            raise MissingInputError(
                f"there is no job {name!r} in namespace {self._target.namespace!r} of {self._api.host}: "
                "`ddpm jobs list` shows those there are"
            )
        return found[0][1]

    def _pods(self, name: str) -> list[Manifest]:
        return self._api.pods(f"ddpm-job={name}")

    def _status_of(self, job: Manifest, pods: list[Manifest]) -> JobStatus:
        # A quota or a missing service account keeps the controller from making pods, and only events say so.
        needs_events = not is_over(job) and (not pods or is_suspended(job))
        events = self._api.events(job["metadata"]["name"]) if needs_events else []
        own = [event for event in events if event.get("involvedObject", {}).get("uid") == job["metadata"]["uid"]]
        parts: list[Manifest] = []
        if job.get("kind") == "JobSet" and is_over(job):
            parts = self._api.all_with(JOB, f"{JOB_SET_LABEL}={job['metadata']['name']}")
        return status_of(job, pods, own, parts)

    def _alive(self, job: Manifest) -> BadRequestError:
        name = job["metadata"]["name"]
        status = self._status_of(job, self._pods(name))
        return BadRequestError(
            f"job {name!r} is there and {status.state} in namespace {self._target.namespace!r}: follow it with "
            f"`ddpm jobs logs -f {name}`, or end it with `ddpm jobs cancel {name}`"
        )

    def _create(self, kind: Kind, made: Manifest) -> None:
        name = made["metadata"]["name"]
        try:
            self._api.create(kind, made)
        except AlreadyThereError as error:
            there = self._api.get(kind, name)
            if there is None:
                raise
            if not (error.lost_answer and _is(there, made)):
                raise self._alive(there) from None
        except BucketAwayError as error:
            # It may have arrived all the same: who is told that it failed must not pay for it.
            removed = False
            with suppress(JobError):
                there = self._api.get(kind, name)
                if there is not None and _is(there, made):
                    self._remove(kind, there)
                    removed = True
            told = "what had arrived was removed" if removed else f"`ddpm jobs status {name}` says whether it arrived"
            raise BucketAwayError(f"{error}; {told}") from None

    def _remove(self, kind: Kind, job: Manifest) -> None:
        # Gone, or replaced by somebody else's, in the meantime.
        with suppress(NotThereError, AlreadyThereError):
            self._api.delete(kind, job["metadata"]["name"], job["metadata"]["uid"])

    def _wait_until_gone(self, kind: Kind, name: str) -> None:
        until = time.monotonic() + self._target.grace_seconds + GONE_MARGIN_SECONDS
        while self._api.get(kind, name) is not None:
            if time.monotonic() > until:
                raise BadRequestError(
                    f"the old job {name!r} is being deleted and its pods do not end: try again in a minute, or look "
                    f"with `kubectl -n {self._target.namespace} get pods -l ddpm-job={name}`"
                )
            time.sleep(min(0.5, self._poll_seconds))


def _is(there: Manifest, made: Manifest) -> bool:
    hashes = [job["metadata"].get("annotations", {}).get(MANIFEST_ANNOTATION) for job in (there, made)]
    return hashes[0] == hashes[1]


def _plain(thing: Manifest) -> Manifest:
    metadata = {key: value for key, value in thing["metadata"].items() if key not in _NOISE}
    return {**thing, "metadata": metadata}

"""Jobs on a Kubernetes cluster: `kubernetes_manifests` renders them, and the official client sends them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import dropwhile

from job.exits import BadRequestError, BucketAwayError, MissingInputError, NoPermissionError, State
from job.jobs.backends import kubernetes_api, kubernetes_status
from job.jobs.backends.base import Backend, Cause, Check, JobStatus, JsonObject
from job.jobs.backends.kubernetes_manifests import manifest
from job.jobs.backends.kubernetes_target import KubernetesTarget
from job.jobs.backends.target import Target
from job.jobs.spec import LABEL_PREFIX, JobSpec

GONE_MARGIN_SECONDS = 45.0
"""The time that a deleted job may take to go, beyond the grace period of its pods."""
GONE_POLL_SECONDS = 0.5
PODS_POLL_SECONDS = 1.0
"""Between two requests for new lines of a job that is followed."""
LOG_OVERLAP_SECONDS = 60
"""Requested again, because older lines may arrive late."""
JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the Jobs that a JobSet makes."""
_RELEASE = "https://github.com/kubernetes-sigs/{}/releases/latest/download/manifests.yaml"
_INSTALL = f"kubectl apply --server-side -f {_RELEASE}"
_VERBS = ("create", "get", "list", "delete")
_CHECKED_RIGHTS = (*((verb, "batch", "jobs") for verb in _VERBS), ("list", "", "pods"), ("get", "", "pods", "log"))
_Found = list[tuple[kubernetes_api.Kind, JsonObject]]


class KubernetesBackend(Backend):
    """One namespace of a cluster. A job of one machine is a Job, one of several nodes a JobSet; a name is one job."""

    extra = "kubernetes"
    keeps_ended = True
    target: KubernetesTarget

    def __init__(self, target: Target) -> None:
        """Sends no request yet."""
        super().__init__(target)
        self._api = kubernetes_api.ClusterApi(self.target)
        self._where = f"in namespace {self.target.namespace!r}"

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns a Job, or a JobSet for several nodes, which `kubectl apply -f` takes as well."""
        return [manifest(spec, self.target)]

    def submit(self, spec: JobSpec) -> None:
        """See `Backend.submit`; a job of that name that is over makes room."""
        (made,) = self.render(spec)
        kind = kubernetes_api.KINDS[made["kind"]]
        if spec.nodes > 1 and not self._api.knows(kind):
            raise MissingInputError(f"--nodes {spec.nodes} needs JobSets in the cluster: {_INSTALL.format('jobset')}")
        with suppress(NoPermissionError):
            # Credentials for jobs need not read queues.
            self._look_for_queue()
        for there, old in self.find(spec.name):
            if not self._observed(old, self._api.pods(f"ddpm-job={spec.name}")).state.is_over:
                raise self.runs_already(spec.name, self._where)
            self._api.delete(there, spec.name, old["metadata"]["uid"])
            self._wait_until_gone(there, spec.name)
        try:
            self._api.create(kind, made)
        except kubernetes_api.ObjectConflictError:
            # Another person was faster, or the first answer of several was lost.
            raise self.runs_already(spec.name, self._where) from None

    def find(self, name: str) -> _Found:
        """Returns the objects of this name, with their kinds."""
        found = [(kind, self._api.get(kind, name)) for kind in kubernetes_api.KINDS.values()]
        return [(kind, job) for kind, job in found if job is not None]

    def status(self, name: str) -> JobStatus:
        """See `Backend.status`; a job is gone when it was deleted, or a day after its end."""
        return self._look(name)[0]

    def jobs(self) -> list[JobStatus]:
        """Returns all jobs with this program's label."""
        selector = f"app={LABEL_PREFIX}"
        pods: dict[str, list[JsonObject]] = {}
        for pod in self._api.pods(selector):
            pods.setdefault(pod["metadata"]["labels"].get("ddpm-job", ""), []).append(pod)
        jobs = [job for kind in kubernetes_api.KINDS.values() for job in self._api.all_with(kind, selector)]
        return [self._observed(job, pods.get(job["metadata"]["name"], [])) for job in jobs]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: two contexts may be one cluster."""
        return ("kubernetes", self._api.host, self.target.namespace, status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """Yields the lines of all its pods, also of replaced ones, with the index before each if there are several.

        Raises:
            MissingInputError: it has no output, or its image cannot be pulled, so that none will come.
        """
        spec = self.known(name)[0][1]["spec"]
        for part in spec.get("replicatedJobs", []):
            spec = part["template"]["spec"]
        # By pod, the time of the last line that was read.
        last: dict[str, str] = {}
        while True:
            status, pods = self._look(name)
            # The pods of a cancelled job still save.
            is_last = not follow or (status.state.is_over and all(map(kubernetes_status.has_ended, pods)))
            for pod in pods:
                uid = pod["metadata"]["uid"]
                number = f"[{kubernetes_status.index_of(pod)}] " if spec["completions"] > 1 else ""
                for line in self._new_lines(pod, last.get(uid, "")):
                    last[uid], _, text = line.partition(" ")
                    yield number + text
            if is_last and last:
                return
            if is_last:
                raise MissingInputError(f"{name} has no output, or it is gone with its node: see its run's folder")
            if status.cause in (Cause.NO_IMAGE, Cause.STUCK):
                raise MissingInputError(f"{name} prints nothing: {status.message}")
            time.sleep(PODS_POLL_SECONDS)

    def _new_lines(self, pod: JsonObject, last: str) -> Iterator[str]:
        """Yields a pod's lines after the time `last`, or all if that is empty."""
        since = {}
        if last:
            # The reader may have paused for long.
            age_seconds = time.time() - datetime.fromisoformat(last).timestamp()
            since = {"since_seconds": max(int(age_seconds), 0) + LOG_OVERLAP_SECONDS}
        # One pod has not begun, or its output is gone with its node; the others' is not.
        with suppress(kubernetes_api.NoSuchObjectError, BadRequestError, BucketAwayError):
            # A time may have lost the zeros at its end.
            lines = self._api.log(pod["metadata"]["name"], **since)
            return dropwhile(lambda line: line.partition(" ")[0].rstrip("Z") <= last.rstrip("Z"), lines)
        return iter(())

    def cancel(self, name: str) -> str:
        """Deletes it: its pods get SIGTERM and their grace period, in which they save."""
        status, found = self.status(name), self.known(name)
        for kind, there in found:
            self._api.delete(kind, name, there["metadata"]["uid"])
        if kubernetes_status.is_being_deleted(found[0][1]):
            return status.message
        return self.effect_of_cancelling(status.state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Backend.checks`: rights, account, queue and image, or the cluster alone if it does not answer."""
        self._api.is_hurried = True
        yield (cluster := Check.of("cluster", self._look_at_rights))
        if cluster.passed:
            yield Check.unless_hidden("service account", self._look_for_account)
            yield Check.unless_hidden("queue", self._look_for_queue)
            yield Check.unless_hidden("JobSets", self._look_for_job_sets)
            yield Check.of_image(self.target.image)

    def _look(self, name: str) -> tuple[JobStatus, list[JsonObject]]:
        """Returns the status of a job, and its pods."""
        if not (found := self.find(name)):
            return JobStatus(name, State.GONE, f"no job {name!r} {self._where}"), []
        pods = self._api.pods(f"ddpm-job={name}")
        return self._observed(found[0][1], pods), pods

    def _observed(self, job: JsonObject, pods: list[JsonObject]) -> JobStatus:
        """Returns the status of a job, from other objects as well if its own does not show enough."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        events, others = [], []
        if kubernetes_status.is_over(job):
            if job.get("kind") == "JobSet":
                others = self._api.all_with(kubernetes_api.KINDS["Job"], f"{JOB_SET_LABEL}={name}")
        elif not pods or kubernetes_status.is_suspended(job):
            # A quota or a missing service account keeps the controller from making pods, and only events show it.
            events = [event for event in self._api.events(name) if event["involvedObject"].get("uid") == uid]
            of_job = f"{kubernetes_api.JOB_UID_LABEL}={uid}"
            others = next(filter(None, (self._api.all_with(kind, of_job) for kind in kubernetes_api.WORKLOADS)), [])
        return kubernetes_status.observed_status(job, pods, events, others)

    def _wait_until_gone(self, kind: kubernetes_api.Kind, name: str) -> None:
        until = time.monotonic() + self.target.grace_seconds + GONE_MARGIN_SECONDS
        while self._api.get(kind, name) is not None:
            if time.monotonic() > until:
                why = self.status(name).message
                raise BadRequestError(f"the old job {name!r} {self._where} does not end: {why}")
            time.sleep(GONE_POLL_SECONDS)

    def _look_for_queue(self) -> str:
        """Returns that the target's queue exists: a missing one would hold a job for ever."""
        if not (queue := self.target.queue):
            return "none is set"
        if any(self._api.get(kind, queue) for kind in kubernetes_api.LOCAL_QUEUES):
            return f"{queue} is there"
        raise MissingInputError(
            f"no LocalQueue {queue!r} {self._where}: create it in Kueue ({_INSTALL.format('kueue')})"
        )

    def _look_at_rights(self) -> str:
        for verb, group, *resource in _CHECKED_RIGHTS:
            if not self._api.may(verb, group, *resource):
                what = f"{verb} {'/'.join(resource)} {self._where}"
                raise NoPermissionError(f"{self._api.host}: you may not {what}: ask for the role `edit` there")
        return f"{self._api.host} lets you create, follow and delete jobs {self._where}"

    def _look_for_job_sets(self) -> str:
        """Returns whether `--nodes` works, which no other job needs."""
        group, _, plural = kind = kubernetes_api.KINDS["JobSet"]
        if not self._api.knows(kind):
            return f"not installed, which --nodes needs: {_INSTALL.format('jobset')}"
        missing = [verb for verb in _VERBS if not self._api.may(verb, group, plural)]
        return f"you may not {', '.join(missing)} them, which --nodes needs" if missing else "--nodes works"

    def _look_for_account(self) -> str:
        name = self.target.service_account
        try:
            self._api.read("read_namespaced_service_account", name)
        except kubernetes_api.NoSuchObjectError:
            make = f"`kubectl -n {self.target.namespace} create serviceaccount {name}`"
            raise MissingInputError(f"no service account {name!r} {self._where}: {make}") from None
        return f"{name} is there"

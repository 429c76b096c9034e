"""Jobs on a Kubernetes cluster: what `kubernetes_manifests` renders, sent by the official client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import Backend, JobStatus, JsonObject, State, cancelled
from job.jobs.backends.kubernetes_api import (
    JOB_KIND,
    JOB_SET_KIND,
    LOCAL_QUEUES,
    ClusterApi,
    Kind,
    NoSuchObjectError,
    ObjectConflictError,
)
from job.jobs.backends.kubernetes_logs import Follower, past_lines
from job.jobs.backends.kubernetes_manifests import GPU_RESOURCE, MANIFEST_ANNOTATION, manifest
from job.jobs.backends.kubernetes_status import is_being_deleted, is_over, is_suspended, observed_status
from job.jobs.checks import Check, unchecked_image
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import KubernetesTarget, Target

GONE_MARGIN_SECONDS = 45.0
"""How long a job that is deleted may take to go, beyond the grace period of its pods."""
GONE_POLL_SECONDS = 0.5
JOB_SET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the Jobs that a JobSet makes."""
GOOGLE_ACCOUNT_ANNOTATION = "iam.gke.io/gcp-service-account"
_INSTALL = (
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/{}/releases/latest/download/manifests.yaml"
)
_CHECKED_RIGHTS = (("create", "batch", "jobs"), ("delete", "batch", "jobs"), ("get", "", "pods", "log"))


class KubernetesBackend(Backend):
    """One namespace of a cluster. Jobs of one machine are Jobs, those of several JobSets; both have one name space."""

    keeps_ended = True

    def __init__(self, target: Target) -> None:
        """Connects to nothing yet."""
        super().__init__(target)
        self._target = cast("KubernetesTarget", target)
        self._api = ClusterApi(self._target)

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """A Job, or a JobSet for several nodes; `kubectl apply -f` takes it as well."""
        return [manifest(spec, self._target)]

    def submit(self, spec: JobSpec) -> None:
        """Sends it; a job of that name that is over makes room."""
        (made,) = self.render(spec)
        kind = JOB_SET_KIND if made["kind"] == "JobSet" else JOB_KIND
        if kind == JOB_SET_KIND and not self._api.knows(JOB_SET_KIND):
            install = _INSTALL.format("jobset")
            raise MissingInputError(f"{self._api.host} knows no JobSets, which --nodes {spec.nodes} needs: {install}")
        with suppress(NoPermissionError):
            # Who may submit jobs need not be allowed to see queues.
            _require_queue(self._api, self._target)
        for there, old in self._all_named(spec.name):
            if not (is_over(old) or is_being_deleted(old)):
                raise self._is_alive(old)
            self._api.delete(there, spec.name, old["metadata"]["uid"])
            self._wait_until_gone(there, spec.name)
        try:
            self._api.create(kind, made)
        except ObjectConflictError:
            # An earlier try may have made it, and its answer was lost; else somebody was faster.
            winner = self._api.get(kind, spec.name)
            if winner is None:
                raise
            hashes = [job["metadata"].get("annotations", {}).get(MANIFEST_ANNOTATION) for job in (winner, made)]
            if hashes[0] != hashes[1]:
                raise self._is_alive(winner) from None
        except BucketAwayError as error:
            raise BucketAwayError(f"{error}; `ddpm jobs status {spec.name}` says whether it arrived") from None

    def status(self, name: str) -> JobStatus:
        """How it is going; a job that was deleted, or that is over for a day, is gone."""
        return self._look(name)[0]

    def jobs(self) -> list[JobStatus]:
        """All jobs with this program's label, newest first."""
        selector = f"app={LABEL_PREFIX}"
        pods: dict[str, list[JsonObject]] = {}
        for pod in self._api.pods(selector):
            pods.setdefault(pod["metadata"]["labels"].get("ddpm-job", ""), []).append(pod)
        jobs = self._api.all_with(JOB_KIND, selector) + self._api.all_with(JOB_SET_KIND, selector)
        found = [observed_status(job, pods.get(job["metadata"]["name"], [])) for job in jobs]
        return sorted(found, key=lambda status: status.created, reverse=True)

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: two contexts may be one cluster."""
        return ("kubernetes", self._api.host, self._target.namespace, status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Lines of all its pods, with the index before each where there are several."""
        spec = self._named(name)[0][1]["spec"]
        for part in spec.get("replicatedJobs", []):
            spec = part["template"]["spec"]
        numbered = spec["completions"] > 1
        if not follow:
            return past_lines(self._api, self._pods(name), numbered)
        return Follower(self._api, lambda: self._look(name), numbered).lines(should_stop)

    def cancel(self, name: str) -> str:
        """Deletes it: its pods get SIGTERM and their grace period, in which they save."""
        status, _ = self._look(name)
        for kind, there in self._named(name):
            self._api.delete(kind, name, there["metadata"]["uid"])
        return status.message if status.state is State.CANCELLED else cancelled(status.state)

    def describe(self, name: str) -> JsonObject:
        """The object, its pods and their events."""
        (_, job), pods = self._named(name)[0], self._pods(name)
        events = [event for about in (job, *pods) for event in self._api.events(about["metadata"]["name"])]
        for thing in (job, *pods, *events):
            thing["metadata"].pop("managedFields", None)
        return {"job": job, "pods": pods, "events": events}

    def checks(self) -> Iterator[Check]:
        """Rights, account, JobSets, queue, quota and image; the rest is left out where the cluster does not answer."""
        api = ClusterApi(self._target, hurried=True)
        for name, look in (
            ("cluster", _check_rights),
            ("service account", _check_account),
            ("JobSets", _check_job_sets),
            ("queue", _require_queue),
            ("GPU quota", _check_quota),
        ):
            try:
                yield Check(name, True, look(api, self._target))
            except JobError as error:
                if name == "cluster":
                    yield Check.of_error(name, error)
                    return
                # Who may submit jobs need not be allowed to see all of these.
                is_hidden = isinstance(error, NoPermissionError)
                yield Check(name, True, f"not looked at: {error}") if is_hidden else Check.of_error(name, error)
        yield unchecked_image(self._target.image)

    def _all_named(self, name: str) -> list[tuple[Kind, JsonObject]]:
        found = [(kind, self._api.get(kind, name)) for kind in (JOB_KIND, JOB_SET_KIND)]
        return [(kind, job) for kind, job in found if job is not None]

    def _named(self, name: str) -> list[tuple[Kind, JsonObject]]:
        """See `_all_named`; there is one at least."""
        found = self._all_named(name)
        if not found:
            where = f"in namespace {self._target.namespace!r} of {self._api.host}"
            raise MissingInputError(f"there is no job {name!r} {where}: `ddpm jobs list` shows those there are")
        return found

    def _pods(self, name: str) -> list[JsonObject]:
        return self._api.pods(f"ddpm-job={name}")

    def _look(self, name: str) -> tuple[JobStatus, list[JsonObject]]:
        """How a job is going, and its pods."""
        found = self._all_named(name)
        if not found:
            return JobStatus(name, State.GONE, f"there is no job {name!r} in namespace {self._target.namespace!r}"), []
        job, pods = found[0][1], self._pods(name)
        events, parts = [], []
        if is_over(job):
            parts = self._api.all_with(JOB_KIND, f"{JOB_SET_LABEL}={name}")
        elif not pods or is_suspended(job):
            # A quota or a missing service account keeps the controller from making pods, and only events say so.
            uid = job["metadata"]["uid"]
            events = [event for event in self._api.events(name) if event["involvedObject"].get("uid") == uid]
        return observed_status(job, pods, events, parts), pods

    def _is_alive(self, job: JsonObject) -> BadRequestError:
        name = job["metadata"]["name"]
        return BadRequestError(
            f"job {name!r} is there and {self.status(name).state} in namespace {self._target.namespace!r}: follow it "
            f"with `ddpm jobs logs -f {name}`, or end it with `ddpm jobs cancel {name}`"
        )

    def _wait_until_gone(self, kind: Kind, name: str) -> None:
        until = time.monotonic() + self._target.grace_seconds + GONE_MARGIN_SECONDS
        while self._api.get(kind, name) is not None:
            if time.monotonic() > until:
                raise BadRequestError(
                    f"the old job {name!r} is being deleted and its pods do not end: try again in a minute, or look "
                    f"with `kubectl -n {self._target.namespace} get pods -l ddpm-job={name}`"
                )
            time.sleep(GONE_POLL_SECONDS)


def _require_queue(api: ClusterApi, target: KubernetesTarget) -> str:
    """Says that the target's queue is there: one that is not would never let a job go."""
    if not target.queue:
        return "none is set"
    if not any(api.get(kind, target.queue) for kind in LOCAL_QUEUES):
        where, look = f"in namespace {target.namespace!r}", f"`kubectl -n {target.namespace} get localqueues`"
        raise MissingInputError(
            f"there is no LocalQueue {target.queue!r} {where}: {look} shows those there are, once Kueue is installed "
            f"({_INSTALL.format('kueue')})"
        )
    return f"{target.queue} is there"


def _check_rights(api: ClusterApi, target: KubernetesTarget) -> str:
    for verb, group, *resource in _CHECKED_RIGHTS:
        if not api.may(verb, group, *resource):
            what = f"{verb} {'/'.join(resource)} in namespace {target.namespace!r} of {api.host}"
            raise NoPermissionError(f"these credentials may not {what}: ask for the role `edit` there")
    return f"{api.host} lets you create, follow and delete jobs in namespace {target.namespace!r}"


def _check_account(api: ClusterApi, target: KubernetesTarget) -> str:
    try:
        account = api.read("read_namespaced_service_account", target.service_account)
    except NoSuchObjectError:
        raise MissingInputError(
            f"there is no service account {target.service_account!r} in namespace {target.namespace!r}, so that no "
            f"pod would start: `kubectl -n {target.namespace} create serviceaccount {target.service_account}`"
        ) from None
    bound = account["metadata"].get("annotations", {}).get(GOOGLE_ACCOUNT_ANNOTATION)
    return f"{target.service_account} acts as {bound or 'itself: the bucket must be granted to it'}"


def _check_job_sets(api: ClusterApi, target: KubernetesTarget) -> str:
    if not api.knows(JOB_SET_KIND):
        return f"not installed; only --nodes needs them ({_INSTALL.format('jobset')})"
    allowed = api.may("create", "jobset.x-k8s.io", "jobsets")
    return "installed" if allowed else "installed; these credentials may not create them, which only --nodes needs"


def _check_quota(api: ClusterApi, target: KubernetesTarget) -> str:
    for quota in api.read("list_namespaced_resource_quota")["items"]:
        hard, used = (
            quota.get("status", {}).get(field, {}).get(f"requests.{GPU_RESOURCE}") for field in ("hard", "used")
        )
        if hard is not None and int(hard) - int(used or 0) < target.gpus:
            raise BadRequestError(
                f"{used or 0} of the {hard} GPUs of namespace {target.namespace!r} are taken, and a job asks for "
                f"{target.gpus} (quota {quota['metadata']['name']!r}): wait, or ask for more"
            )
    return "no ResourceQuota of the namespace stands in the way"

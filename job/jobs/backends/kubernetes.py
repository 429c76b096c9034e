"""Jobs on a Kubernetes cluster: `kubernetes_objects` renders them, and the official client sends them.

Jobs go through the client's CustomObjectsApi, which sends a manifest unchanged and answers with JSON, in every version
of the client; its typed models would drop unknown fields. The kubeconfig is read as kubectl reads it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from itertools import dropwhile
from typing import Any

from job.exits import (
    BadConfigError,
    BadRequestError,
    BucketAwayError,
    JobError,
    MissingInputError,
    NoPermissionError,
    State,
    needs_extra,
)
from job.jobs.backends import Cause, Check, JobStatus, JsonObject, Terms
from job.jobs.backends.kubernetes_objects import (
    CONTAINER,
    KubernetesKeys,
    has_ended,
    index_of,
    is_being_deleted,
    is_over,
    is_suspended,
    manifest,
    observed,
)
from job.jobs.machines import Hourly, gpus_of, listed_price
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
API_RETRIES, API_RETRY_SECONDS = 5, 0.5
"""The number of retries, and the first pause between two; each is twice the one before."""
API_CONNECT_SECONDS, API_READ_SECONDS = 5.0, 30.0
DOCTOR_TIMEOUT_SECONDS = 3.0
"""The limit of a request for which a person waits."""
_BUSY_STATUSES = (408, 429, 500, 502, 503, 504)
_NEEDED_RIGHTS = "get, list, create and delete of jobs (--nodes: jobsets), get and list of pods, pods/log and events"
_KUBECONFIG_HINT = "`gcloud container clusters get-credentials` writes one, and `context:` of the target is one of its"


Kind = tuple[str, str, str]
"""Group, version and plural of a resource of the API."""
KINDS: dict[str, Kind] = {"Job": ("batch", "v1", "jobs"), "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets")}
LOCAL_QUEUES, WORKLOADS = (
    [("kueue.x-k8s.io", beta, plural) for beta in ("v1beta2", "v1beta1")] for plural in ("localqueues", "workloads")
)
_OPTIONAL = [KINDS["JobSet"], *WORKLOADS]
"""The kinds that credentials for plain Jobs need not read."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
"""On the Workload that Kueue makes of a Job or a JobSet, which has the state of the queue."""


class NoSuchObjectError(MissingInputError):
    """404: the object, its namespace, or its kind is missing."""


class ObjectConflictError(BadRequestError):
    """409: an object of this name exists, or it is another one than was meant."""


class ClusterApi:
    """The API of a target's cluster; the kubeconfig is read with the first request.

    All methods raise `BucketAwayError` when the API does not answer, `NoPermissionError`, and `BadRequestError` for
    other refusals.
    """

    is_hurried = False
    """Whether each request is tried once, and briefly, because a person waits."""

    def __init__(self, namespace: str, context: str) -> None:
        self.namespace, self._context = namespace, context

    @property
    def host(self) -> str:
        """Returns its address."""
        return str(self._client.configuration.host)

    def create(self, kind: Kind, manifest: JsonObject) -> None:
        """Creates an object; the server refuses unknown fields."""
        self._objects("create", kind, manifest, field_validation="Strict")

    def get(self, kind: Kind, name: str) -> JsonObject | None:
        """Returns an object; None if it or its kind is missing, or if it is optional and may not be read."""
        with suppress(*_missing(kind)):
            return self._objects("get", kind, name)
        return None

    def knows(self, kind: Kind) -> bool:
        """Returns whether the cluster has objects of this kind, by its discovery, which all credentials may read."""
        with suppress(NoSuchObjectError):
            # A list of what is not installed is forbidden, not missing.
            return bool(self._ask("CustomObjectsApi", "get_api_resources", *kind[:2]))
        return False

    def all_with(self, kind: Kind, selector: str) -> list[JsonObject]:
        """Returns the objects with these labels; none of a missing kind, or of an optional one that may not be read."""
        with suppress(*_missing(kind)):
            return list(self._objects("list", kind, label_selector=selector)["items"])
        return []

    def delete(self, kind: Kind, name: str, uid: str) -> None:
        """Deletes the very object with this uid, once its pods have ended, which have their grace period."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        # It may be gone meanwhile, or replaced by an object of another person.
        with suppress(NoSuchObjectError, ObjectConflictError):
            self._objects("delete", kind, name, body=options)

    def pods(self, selector: str) -> list[JsonObject]:
        """Returns the pods with these labels, oldest first."""
        pods = self.read("list_namespaced_pod", label_selector=selector)["items"]
        return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def events(self, name: str) -> list[JsonObject]:
        """Returns the events of controllers about an object, oldest first; none if they may not be read."""
        with suppress(NoPermissionError):
            found = self.read("list_namespaced_event", field_selector=f"involvedObject.name={name}")["items"]
            return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return []

    def read(self, call: str, *names: str, **options: Any) -> JsonObject:
        """Returns the answer to a method of the client's CoreV1Api in the namespace, such as `list_namespaced_pod`."""
        return self._ask("CoreV1Api", call, *names, self.namespace, **options)

    def may(self, verb: str, group: str, resource: str, part: str = "") -> bool:
        """Returns whether these credentials are allowed to do it in the namespace."""
        about = {"verb": verb, "group": group, "resource": resource, "subresource": part, "namespace": self.namespace}
        review = {"spec": {"resourceAttributes": about}}
        answer = self._ask("AuthorizationV1Api", "create_self_subject_access_review", review)
        return bool(answer.get("status", {}).get("allowed"))

    def log(self, pod: str, **options: Any) -> list[str]:
        """Returns the lines of a pod's output until now, each behind its time stamp.

        Raises:
            NoSuchObjectError: the pod is gone.
            BadRequestError: the container has not started.
        """
        options |= {"container": CONTAINER, "timestamps": True}
        text = self._content("CoreV1Api", "read_namespaced_pod_log", pod, self.namespace, **options)
        return text.decode(errors="replace").removesuffix("\n").split("\n") if text else []

    @cached_property
    def _client(self) -> Any:
        """The client for a context of the kubeconfig.

        Raises:
            MissingInputError: the kubeconfig is missing.
            BadConfigError: it is not valid, or has no such context.
        """
        import urllib3
        from kubernetes import client, config

        made, paths = client.Configuration(), os.environ.get("KUBECONFIG") or "~/.kube/config"
        # All methods: a job whose first answer was lost is found to run already.
        made.retries = urllib3.Retry(
            0 if self.is_hurried else API_RETRIES,
            backoff_factor=API_RETRY_SECONDS,
            status_forcelist=_BUSY_STATUSES,
            allowed_methods=None,
            raise_on_status=False,
        )
        try:
            config.load_kube_config(paths, self._context or None, made, persist_config=False)
        except Exception as error:
            # A damaged file causes any of them.
            reason = " ".join(str(error).split())
            if reason.endswith("No configuration found."):
                raise MissingInputError(f"the kubeconfig {paths} is missing: {_KUBECONFIG_HINT}") from None
            raise BadConfigError(f"the kubeconfig {paths} cannot be used: {reason}; {_KUBECONFIG_HINT}") from None
        return client.ApiClient(made)

    def _objects(self, verb: str, kind: Kind, *words: Any, **options: Any) -> JsonObject:
        group, version, plural = kind
        call, place = f"{verb}_namespaced_custom_object", (group, version, self.namespace, plural)
        return self._ask("CustomObjectsApi", call, *place, *words, **options)

    def _ask(self, api: str, call: str, *words: Any, **options: Any) -> JsonObject:
        return dict(json.loads(self._content(api, call, *words, **options)))

    @needs_extra("kubernetes", "the target")
    def _content(self, api: str, call: str, *words: Any, **options: Any) -> bytes:
        """Returns the answer to a method of the client."""
        import urllib3
        from kubernetes import client

        seconds = (DOCTOR_TIMEOUT_SECONDS,) * 2 if self.is_hurried else (API_CONNECT_SECONDS, API_READ_SECONDS)
        options |= {"_request_timeout": seconds, "_preload_content": False}
        try:
            return bytes(getattr(getattr(client, api)(self._client), call)(*words, **options).data)
        except client.ApiException as error:
            raise self._refusal(error) from None
        except ValueError:
            # The error's text may hold a token.
            raise BadConfigError("the kubeconfig has an address, a proxy or a token that is not valid") from None
        except urllib3.exceptions.HTTPError as error:
            raise self._away(f"does not answer: {error}") from None

    def _refusal(self, error: Any) -> JobError:
        reason, where = _message_of(error), f"{self.host}, namespace {self.namespace!r}"
        match error.status:
            case 401:
                return NoPermissionError(f"{where} does not take these credentials ({reason}): sign in again")
            # A webhook refuses the object, and not the credentials.
            case 403 if "admission webhook" not in reason:
                return NoPermissionError(f"{where}: {reason}; jobs need {_NEEDED_RIGHTS}")
            case 404:
                return NoSuchObjectError(f"{where}: {reason}: `kubectl create` it, or set `namespace:` of the target")
            case 409:
                return ObjectConflictError(f"{where}: {reason}")
        # Status 0 is how some versions of the client report that TLS failed.
        if not error.status or error.status in _BUSY_STATUSES:
            down = "the pods of this webhook's controller do not answer: ask the cluster's administrator"
            return self._away(f"answers {error.status or 'nothing'}: {reason}", *[down] * ("calling webhook" in reason))
        return BadRequestError(f"{where} refuses it ({error.status}): {reason}")

    def _away(self, how: str, remedy: str = "check its address, and the network") -> BucketAwayError:
        return BucketAwayError(f"the API of the cluster, {self.host}, {how}: {remedy}")


def _missing(kind: Kind) -> tuple[type[JobError], ...]:
    return (NoSuchObjectError, NoPermissionError) if kind in _OPTIONAL else (NoSuchObjectError,)


def _message_of(error: Any) -> str:
    """Returns the text of an answer in a line: the message of a Status, if it is one."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    text = body or error.reason
    with suppress(ValueError, TypeError, AttributeError):
        text = json.loads(body).get("message") or text
    return " ".join(str(text).split())[:400]


class KubernetesTarget(KubernetesKeys):
    """One namespace of a Kubernetes cluster, as the current kubeconfig or `context` names it.

    A job of one machine is a Job, one of several nodes a JobSet; a name is one job.
    """

    has_groups = True
    keeps_ended = True

    def terms(self, spec: JobSpec) -> Terms:
        """See `Target.terms`: a queue stops a group for good, while Kubernetes counts from each of its starts."""
        place = (*[f"context {self.context}"] * bool(self.context), f"namespace {self.namespace}")
        is_group = spec.nodes > 1 and not self.queue
        start = "from each start of the group" if is_group else "for all attempts together"
        end = "its queue stops it for good" if self.queue else "Kubernetes ends it"
        more = "; preemptions start it without bound" * is_group
        limit = f"{start}, waiting for nodes and pauses included, then {end}{more}"
        kind = "" if self.selects_machines else "spot or on demand, as the target's nodes are"
        return Terms("node", place, limit, None if is_group else 1, kind)

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """See `Target.list_price`: a job pays for its GPUs' share of a node; the type of other nodes is unknown."""
        found = gpus_of(self.machine_type)
        if found is None or not spec.gpus:
            return None
        share = min(1.0, spec.gpus / found[0])
        part = f"{spec.gpus} of the {found[0]} GPUs of " if share < 1 else ""
        return listed_price(self.machine_type, [self.region], share, part)

    @cached_property
    def _api(self) -> ClusterApi:
        return ClusterApi(self.namespace, self.context)

    @property
    def _where(self) -> str:
        return f"in namespace {self.namespace!r}"

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns a Job, or a JobSet for several nodes, which `kubectl apply -f` takes as well."""
        return [manifest(spec, self)]

    def submit(self, spec: JobSpec) -> None:
        """See `Target.submit`; a job of that name that is over makes room."""
        (made,) = self.render(spec)
        kind = KINDS[made["kind"]]
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
        except ObjectConflictError:
            # Another person was faster, or the first answer of several was lost.
            raise self.runs_already(spec.name, self._where) from None

    def find(self, name: str) -> list[tuple[Kind, JsonObject]]:
        """Returns the objects of this name, with their kinds."""
        found = [(kind, self._api.get(kind, name)) for kind in KINDS.values()]
        return [(kind, job) for kind, job in found if job is not None]

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`; a job is gone when it was deleted, or a day after its end."""
        return self._look(name)[0]

    def jobs(self) -> list[JobStatus]:
        """Returns all jobs with this program's label."""
        selector = f"app={LABEL_PREFIX}"
        pods: dict[str, list[JsonObject]] = {}
        for pod in self._api.pods(selector):
            pods.setdefault(pod["metadata"]["labels"].get("ddpm-job", ""), []).append(pod)
        jobs = [job for kind in KINDS.values() for job in self._api.all_with(kind, selector)]
        return [self._observed(job, pods.get(job["metadata"]["name"], [])) for job in jobs]

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
            is_last = not follow or (status.state.is_over and all(map(has_ended, pods)))
            for pod in pods:
                uid = pod["metadata"]["uid"]
                number = f"[{index_of(pod)}] " if spec["completions"] > 1 else ""
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
        with suppress(NoSuchObjectError, BadRequestError, BucketAwayError):
            # A time may have lost the zeros at its end.
            lines = self._api.log(pod["metadata"]["name"], **since)
            return dropwhile(lambda line: line.partition(" ")[0].rstrip("Z") <= last.rstrip("Z"), lines)
        return iter(())

    def cancel(self, name: str) -> str:
        """Deletes it: its pods get SIGTERM and their grace period, in which they save."""
        status, found = self.alive(name), self.known(name)
        for kind, there in found:
            self._api.delete(kind, name, there["metadata"]["uid"])
        if is_being_deleted(found[0][1]):
            return status.message
        return self.effect_of_cancelling(status.state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Target.checks`: rights, account and queue, or the cluster alone if it does not answer."""
        self._api.is_hurried = True
        yield (cluster := Check.of("cluster", self._look_at_rights))
        if cluster.passed:
            yield Check.unless_hidden("service account", self._look_for_account)
            yield Check.unless_hidden("queue", self._look_for_queue)

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
        if is_over(job):
            if job.get("kind") == "JobSet":
                others = self._api.all_with(KINDS["Job"], f"{JOB_SET_LABEL}={name}")
        elif not pods or is_suspended(job):
            # A quota or a missing service account keeps the controller from making pods, and only events show it.
            events = [event for event in self._api.events(name) if event["involvedObject"].get("uid") == uid]
            of_job = f"{JOB_UID_LABEL}={uid}"
            others = next(filter(None, (self._api.all_with(kind, of_job) for kind in WORKLOADS)), [])
        return observed(job, pods, events, others)

    def _wait_until_gone(self, kind: Kind, name: str) -> None:
        until = time.monotonic() + self.grace_seconds + GONE_MARGIN_SECONDS
        while self._api.get(kind, name) is not None:
            if time.monotonic() > until:
                why = self.alive(name).message
                raise BadRequestError(f"the old job {name!r} {self._where} does not end: {why}")
            time.sleep(GONE_POLL_SECONDS)

    def _look_for_queue(self) -> str:
        """Returns that the target's queue exists: a missing one would hold a job for ever."""
        if not (queue := self.queue):
            return "none is set"
        if any(self._api.get(kind, queue) for kind in LOCAL_QUEUES):
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

    def _look_for_account(self) -> str:
        self._api.read("read_namespaced_service_account", self.service_account)
        return f"{self.service_account} is there"

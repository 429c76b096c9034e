"""What is asked of a cluster's API: as whom, few calls, JSON in and out, bounded retries while it is busy or away.

Jobs go through the client's CustomObjectsApi, which sends a manifest as it is and answers with JSON, whatever version
the client has; its typed models would drop what they do not know. The kubeconfig is read as kubectl reads it.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import Any

from job.exits import BadConfigError, BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import JsonObject
from job.jobs.backends.kubernetes_manifests import CONTAINER
from job.jobs.targets import KubernetesTarget

API_RETRIES, API_RETRY_SECONDS = 5, 0.5
"""How often a call is repeated, and the first pause between two; each is twice the one before."""
API_CONNECT_SECONDS, API_READ_SECONDS = 5.0, 30.0
DOCTOR_TIMEOUT_SECONDS = 3.0
"""Of a call for which somebody waits."""
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
"""Who submits plain Jobs need not be allowed to see these."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
"""On the Workload that Kueue makes of a Job or a JobSet, and which says what the queue does about it."""


class NoSuchObjectError(MissingInputError):
    """404: the object, its namespace, or its kind is not there."""


class ObjectConflictError(BadRequestError):
    """409: there is an object of this name, or it is another one than was meant."""


class ClusterApi:
    """The API of a target's cluster; the kubeconfig is read with the first call.

    All methods raise `BucketAwayError` when the API does not answer, `NoPermissionError`, and `BadRequestError` for
    what it refuses otherwise.
    """

    is_hurried = False
    """Whether each call is tried once, and not for long: somebody waits for the answers."""

    def __init__(self, target: KubernetesTarget) -> None:
        self.namespace, self._context = target.namespace, target.context

    @property
    def host(self) -> str:
        """Its address."""
        return str(self._client.configuration.host)

    def create(self, kind: Kind, manifest: JsonObject) -> None:
        """Creates an object; the server refuses fields that it does not know."""
        self._objects("create", kind, manifest, field_validation="Strict")

    def get(self, kind: Kind, name: str) -> JsonObject | None:
        """An object; None if there is none of this name, or no such kind, or an optional one that one may not see."""
        with suppress(NoSuchObjectError), _tolerant(kind):
            return dict(self._objects("get", kind, name))
        return None

    def cluster_queue(self, local_queue: str) -> JsonObject | None:
        """Returns the ClusterQueue behind a LocalQueue; None if these credentials may not read both."""
        for group, version, plural in LOCAL_QUEUES:
            with suppress(NoSuchObjectError, NoPermissionError, KeyError):
                local = self._objects("get", (group, version, plural), local_queue)
                words = (group, version, "clusterqueues", local["spec"]["clusterQueue"])
                return dict(self._ask("CustomObjectsApi", "get_cluster_custom_object", *words))
        return None

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster has such objects at all."""
        with suppress(NoSuchObjectError):
            self._objects("list", kind, limit=1)
            return True
        return False

    def all_with(self, kind: Kind, selector: str) -> list[JsonObject]:
        """The objects with these labels; none if there is no such kind, or an optional one that one may not see."""
        with suppress(NoSuchObjectError), _tolerant(kind):
            return list(self._objects("list", kind, label_selector=selector)["items"])
        return []

    def delete(self, kind: Kind, name: str, uid: str) -> None:
        """Deletes this very object, once its pods have ended, which have their grace period."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        # Gone, or replaced by somebody else's, in the meantime.
        with suppress(NoSuchObjectError, ObjectConflictError):
            self._objects("delete", kind, name, body=options)

    def pods(self, selector: str) -> list[JsonObject]:
        """The pods with these labels, oldest first."""
        pods = self.read("list_namespaced_pod", label_selector=selector)["items"]
        return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def events(self, name: str) -> list[JsonObject]:
        """What controllers said about an object, oldest first; nothing for who may not see it."""
        about = f"involvedObject.name={name}"
        with suppress(NoPermissionError):
            found = self.read("list_namespaced_event", field_selector=about)["items"]
            return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return []

    def read(self, call: str, *names: str, **options: Any) -> JsonObject:
        """What a method of the client's CoreV1Api reads in the namespace, such as `list_namespaced_pod`."""
        answer = self._ask("CoreV1Api", call, *names, self.namespace, _preload_content=False, **options)
        return dict(json.loads(answer.data))

    def may(self, verb: str, group: str, resource: str, part: str = "") -> bool:
        """Whether these credentials are allowed to do it in the namespace."""
        about = {"verb": verb, "group": group, "resource": resource, "subresource": part, "namespace": self.namespace}
        review = {"spec": {"resourceAttributes": about}}
        answer = self._ask("AuthorizationV1Api", "create_self_subject_access_review", review, _preload_content=False)
        return bool(json.loads(answer.data).get("status", {}).get("allowed"))

    def log(self, pod: str, **options: Any) -> list[str]:
        """The lines of a pod's output until now, each behind its time stamp.

        Raises:
            NoSuchObjectError: the pod is gone.
            BadRequestError: the container has not started.
        """
        options |= {"container": CONTAINER, "timestamps": True, "_preload_content": False}
        answer = self._ask("CoreV1Api", "read_namespaced_pod_log", pod, self.namespace, **options)
        lines: list[str] = answer.data.decode(errors="replace").removesuffix("\n").split("\n")
        return lines if lines != [""] else []

    @cached_property
    def _client(self) -> Any:
        from kubernetes.client import ApiClient

        return ApiClient(configuration(self._context, 0 if self.is_hurried else API_RETRIES))

    def _objects(self, verb: str, kind: Kind, *words: Any, **options: Any) -> Any:
        group, version, plural = kind
        call, place = f"{verb}_namespaced_custom_object", (group, version, self.namespace, plural)
        return self._ask("CustomObjectsApi", call, *place, *words, **options)

    def _ask(self, api: str, call: str, *words: Any, **options: Any) -> Any:
        """Calls a method of the client."""
        import urllib3
        from kubernetes import client

        seconds = (DOCTOR_TIMEOUT_SECONDS,) * 2 if self.is_hurried else (API_CONNECT_SECONDS, API_READ_SECONDS)
        try:
            return getattr(getattr(client, api)(self._client), call)(*words, _request_timeout=seconds, **options)
        except client.ApiException as error:
            raise self._refusal(error) from None
        except ValueError:
            # The error's own words may hold a token.
            raise BadConfigError("the kubeconfig has an address, a proxy or a token that is not valid") from None
        except urllib3.exceptions.HTTPError as error:
            raise self._away(f"does not answer: {error}") from None

    def _refusal(self, error: Any) -> JobError:
        said, where = _said_by(error), f"{self.host}, namespace {self.namespace!r}"
        match error.status:
            case 401:
                return NoPermissionError(f"{where} does not take these credentials ({said}): sign in again")
            # A webhook refuses what is asked for, and not who asks.
            case 403 if "admission webhook" not in said:
                return NoPermissionError(f"{where}: {said}; jobs need {_NEEDED_RIGHTS}")
            case 404:
                return NoSuchObjectError(f"{where}: {said}: `kubectl create` it, or set `namespace:` of the target")
            case 409:
                return ObjectConflictError(f"{where}: {said}")
        # Status 0 is how some versions of the client tell that TLS failed.
        if not error.status or error.status in _BUSY_STATUSES:
            return self._away(f"answers {error.status or 'nothing'}: {said}")
        return BadRequestError(f"{where} refuses it ({error.status}): {said}")

    def _away(self, how: str) -> BucketAwayError:
        ask = "is it there, and is this machine allowed to reach it?"
        return BucketAwayError(f"the API of the cluster, {self.host}, {how}: {ask}")


def _tolerant(kind: Kind) -> AbstractContextManager[None]:
    return suppress(NoPermissionError) if kind in _OPTIONAL else nullcontext()


def _said_by(error: Any) -> str:
    """What an answer says, in a line: the message of a Status, where it is one."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    said = body or error.reason
    with suppress(ValueError, TypeError, AttributeError):
        said = json.loads(body).get("message") or said
    return " ".join(str(said).split())[:400]


def configuration(context: str, retries: int) -> Any:
    """A `kubernetes.client.Configuration` for a context of the kubeconfig; empty is its current one.

    Raises:
        MissingInputError: there is no kubeconfig.
        BadConfigError: it is not valid, or has no such context.
    """
    import urllib3
    import yaml
    from kubernetes import client, config
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    made = client.Configuration()
    # All methods: a job whose first answer was lost is found to run already.
    made.retries = urllib3.Retry(
        retries,
        backoff_factor=API_RETRY_SECONDS,
        status_forcelist=_BUSY_STATUSES,
        allowed_methods=None,
        raise_on_status=False,
    )
    paths = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        merged = KubeConfigMerger(paths).config
        if merged is None:
            raise MissingInputError(f"there is no kubeconfig at {paths}: {_KUBECONFIG_HINT}")
        KubeConfigLoader(merged, active_context=context or None, config_base_path=None).load_and_set(made)
    except (config.ConfigException, yaml.YAMLError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise BadConfigError(f"the kubeconfig {paths} cannot be used: {said}; {_KUBECONFIG_HINT}") from None
    return made

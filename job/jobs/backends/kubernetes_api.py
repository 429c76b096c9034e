"""The requests to a cluster's API: its credentials, JSON in and out, bounded retries while it is busy or away.

Jobs go through the client's CustomObjectsApi, which sends a manifest unchanged and answers with JSON, in every version
of the client; its typed models would drop unknown fields. The kubeconfig is read as kubectl reads it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cached_property
from typing import Any

from job.exits import BadConfigError, BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import JsonObject
from job.jobs.backends.kubernetes_manifests import CONTAINER, KubernetesTarget

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

    def __init__(self, target: KubernetesTarget) -> None:
        self.namespace, self._context = target.namespace, target.context

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
        from kubernetes.client import ApiClient

        return ApiClient(configuration(self._context, 0 if self.is_hurried else API_RETRIES))

    def _objects(self, verb: str, kind: Kind, *words: Any, **options: Any) -> JsonObject:
        group, version, plural = kind
        call, place = f"{verb}_namespaced_custom_object", (group, version, self.namespace, plural)
        return self._ask("CustomObjectsApi", call, *place, *words, **options)

    def _ask(self, api: str, call: str, *words: Any, **options: Any) -> JsonObject:
        return dict(json.loads(self._content(api, call, *words, **options)))

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


def configuration(context: str, retries: int) -> Any:
    """Returns a `kubernetes.client.Configuration` for a context of the kubeconfig; empty is its current one.

    Raises:
        MissingInputError: the kubeconfig is missing.
        BadConfigError: it is not valid, or has no such context.
    """
    import urllib3
    import yaml
    from kubernetes import client, config

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
        config.load_kube_config(paths, context or None, made, persist_config=False)
    except (config.ConfigException, yaml.YAMLError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if reason.endswith("No configuration found."):
            raise MissingInputError(f"the kubeconfig {paths} is missing: {_KUBECONFIG_HINT}") from None
        raise BadConfigError(f"the kubeconfig {paths} cannot be used: {reason}; {_KUBECONFIG_HINT}") from None
    return made

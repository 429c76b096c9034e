"""What is asked of a cluster's API: as whom, few calls, JSON in and out, bounded retries while it is busy or away.

Jobs go through the client's CustomObjectsApi, which sends a manifest as it is and answers with JSON, whatever version
the client has; its typed models would drop what they do not know.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from job.exits import BadConfigError, BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import JsonObject
from job.jobs.backends.kubernetes_manifests import CONTAINER
from job.jobs.targets import KubernetesTarget

API_RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
API_CONNECT_SECONDS, API_READ_SECONDS = 5.0, 30.0
DOCTOR_TIMEOUT_SECONDS = 3.0
"""Of a call for which somebody waits."""
LOG_SILENCE_SECONDS = 120.0
"""Of a job's output: a connection that is silent for so long may be a dead one."""
GOOGLE_PLUGIN = "gke-gcloud-auth-plugin"
_BUSY_STATUSES = (408, 429, 500, 502, 503, 504)
_NEEDED_RIGHTS = "get, list, create and delete of jobs and jobsets, and get and list of pods, pods/log and events"
_KUBECONFIG_HINT = (
    "`gcloud container clusters get-credentials CLUSTER --location LOCATION` writes one for GKE, KUBECONFIG names "
    "another file, and `context:` of the target another of its contexts"
)


Kind = tuple[str, str, str]
"""Group, version and plural of a resource of the API."""
JOB_KIND: Kind = ("batch", "v1", "jobs")
JOB_SET_KIND: Kind = ("jobset.x-k8s.io", "v1alpha2", "jobsets")
LOCAL_QUEUES: tuple[Kind, ...] = tuple(("kueue.x-k8s.io", beta, "localqueues") for beta in ("v1beta2", "v1beta1"))


class NoSuchObjectError(MissingInputError):
    """404: the object, its namespace, or its kind is not there."""


class ObjectConflictError(BadRequestError):
    """409: there is an object of this name, or it is another one than was meant."""


class ClusterApi:
    """The API of a target's cluster; the kubeconfig is read with the first call.

    All methods raise `BucketAwayError` when the API does not answer, `NoPermissionError`, and `BadRequestError` for
    what it refuses otherwise.
    """

    def __init__(self, target: KubernetesTarget, hurried: bool = False) -> None:
        """A `hurried` one tries each call once, and not for long."""
        self.namespace, self._context = target.namespace, target.context
        self._delays = () if hurried else API_RETRY_DELAYS_SECONDS
        self._timeout = (
            (DOCTOR_TIMEOUT_SECONDS, DOCTOR_TIMEOUT_SECONDS) if hurried else (API_CONNECT_SECONDS, API_READ_SECONDS)
        )

    @property
    def host(self) -> str:
        """Its address."""
        return str(self._client.configuration.host)

    def create(self, kind: Kind, manifest: JsonObject) -> None:
        """Creates an object; the server refuses fields that it does not know."""
        self._objects("create", kind, manifest, field_validation="Strict")

    def get(self, kind: Kind, name: str) -> JsonObject | None:
        """An object; None if there is none of this name, or no such kind."""
        with suppress(NoSuchObjectError):
            found: JsonObject = self._objects("get", kind, name)
            return found
        return None

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster has such objects at all."""
        with suppress(NoSuchObjectError):
            self._objects("list", kind, limit=1)
            return True
        return False

    def all_with(self, kind: Kind, selector: str) -> list[JsonObject]:
        """The objects with these labels; none if there is no such kind."""
        with suppress(NoSuchObjectError):
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
        parsed: JsonObject = json.loads(answer.data)
        return parsed

    def may(self, verb: str, group: str, resource: str, part: str = "") -> bool:
        """Whether these credentials are allowed to do it in the namespace."""
        about = {"verb": verb, "group": group, "resource": resource, "subresource": part, "namespace": self.namespace}
        review = {"spec": {"resourceAttributes": about}}
        answer = self._ask("AuthorizationV1Api", "create_self_subject_access_review", review, _preload_content=False)
        return bool(json.loads(answer.data).get("status", {}).get("allowed"))

    def log(self, pod: str, follow: bool) -> Iterator[str]:
        """The lines of a pod's output, each behind its time stamp; with `follow` until it ends.

        Raises:
            BucketAwayError: the connection ended in between, or nothing came for `LOG_SILENCE_SECONDS`.
            NoSuchObjectError: the pod is gone.
            BadRequestError: the container has not started.
        """
        import urllib3

        options = {"container": CONTAINER, "follow": follow, "timestamps": True, "_preload_content": False}
        timeout = (API_CONNECT_SECONDS, LOG_SILENCE_SECONDS)
        call = "read_namespaced_pod_log"
        response = self._ask("CoreV1Api", call, pod, self.namespace, **options, _request_timeout=timeout)
        try:
            for line in response:
                yield line.decode(errors="replace").removesuffix("\n")
        except urllib3.exceptions.HTTPError as error:
            # Half a line may have been read: it comes again, whole.
            raise BucketAwayError(f"the output of pod {pod} broke off: {error}") from None
        finally:
            response.close()

    @cached_property
    def _client(self) -> Any:
        from kubernetes.client import ApiClient

        return ApiClient(configuration(self._context))

    def _objects(self, verb: str, kind: Kind, *words: Any, **options: Any) -> Any:
        group, version, plural = kind
        call = f"{verb}_namespaced_custom_object"
        return self._ask("CustomObjectsApi", call, group, version, self.namespace, plural, *words, **options)

    def _ask(self, api: str, call: str, *words: Any, **options: Any) -> Any:
        """Calls a method of the client, and again after a pause when the API is busy or away."""
        import urllib3
        from kubernetes import client

        options = {"_request_timeout": self._timeout} | options
        for delay in (*self._delays, None):
            try:
                return getattr(getattr(client, api)(self._client), call)(*words, **options)
            except client.ApiException as error:
                # Status 0 is how some versions of the client tell that TLS failed.
                if error.status and error.status not in _BUSY_STATUSES:
                    raise self._refusal(error) from None
                said = f"answers {error.status or 'nothing'}: {_said_by(error)}"
            except ValueError:
                # The error's own words may hold a token.
                raise BadConfigError("the kubeconfig has an address, a proxy or a token that is not valid") from None
            except urllib3.exceptions.HTTPError as error:
                said = f"does not answer: {error}"
            if delay is not None:
                time.sleep(delay)
        raise BucketAwayError(
            f"the API of the cluster, {self.host}, {said}; tried {len(self._delays) + 1} times: is it there, and is "
            "this machine allowed to reach it?"
        )

    def _refusal(self, error: Any) -> JobError:
        said, where = _said_by(error), f"{self.host}, namespace {self.namespace!r}"
        match error.status:
            case 401:
                return NoPermissionError(f"{where} does not take these credentials ({said}): sign in again")
            case 403:
                return NoPermissionError(f"{where}: {said}; jobs need {_NEEDED_RIGHTS}")
            case 404:
                return NoSuchObjectError(f"{where}: {said}: `kubectl create` it, or set `namespace:` of the target")
            case 409:
                return ObjectConflictError(f"{where}: {said}")
        return BadRequestError(f"{where} refuses it ({error.status}): {said}")


def _said_by(error: Any) -> str:
    """What an answer says, in a line: the message of a Status, where it is one."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    said = body or error.reason
    with suppress(ValueError, TypeError, AttributeError):
        said = json.loads(body).get("message") or said
    return " ".join(str(said).split())[:400]


def configuration(context: str) -> Any:
    """A `kubernetes.client.Configuration` for a context of the kubeconfig; empty is its current one.

    No program that a kubeconfig names is run. Google's own one is stood in for by the application default credentials,
    which `gs://` needs anyway. Without a kubeconfig it is the account of the pod that this process is in.

    Raises:
        MissingInputError: there is no kubeconfig.
        BadConfigError: it is not valid, has no such context, or needs a program to be run.
        NoPermissionError: the credentials are not valid.
    """
    import yaml
    from kubernetes import client, config
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    made = client.Configuration()
    # Retries are ours: the client's own would send a POST again without telling whether the first one arrived.
    made.retries = False
    paths = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        merged = KubeConfigMerger(paths).config
        if merged is None:
            if context or "KUBERNETES_SERVICE_HOST" not in os.environ:
                raise MissingInputError(f"there is no kubeconfig at {paths}: {_KUBECONFIG_HINT}")
            config.load_incluster_config(client_configuration=made)
            return made
        context = context or merged["current-context"]
        program = _without_program(merged, context)
        if program and Path(program).name.removesuffix(".exe") != GOOGLE_PLUGIN:
            raise BadConfigError(
                f"{paths}: the user of context {context!r} signs in with {program!r}, which is not run here: use a "
                "token or a client certificate, or `kubectl proxy` and a context for its address"
            )
        KubeConfigLoader(merged, active_context=context, config_base_path=None).load_and_set(made)
    except (config.ConfigException, yaml.YAMLError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise BadConfigError(f"the kubeconfig {paths} cannot be used: {said}; {_KUBECONFIG_HINT}") from None
    if program:
        _sign_in_to_google(made)
    return made


def _without_program(merged: Any, context: str) -> str:
    """Takes away the program that would sign in the user of a context, and returns its name; empty if there is none."""
    name = merged["contexts"].get_with_name(context)["context"].safe_get("user")
    entry = merged["users"].get_with_name(name, safe=True)
    user = entry["user"].value if entry else {}
    provider, plugin = user.pop("auth-provider", None), user.pop("exec", None)
    return str(provider["name"] if provider else plugin["command"] if plugin else "")


def _sign_in_to_google(into: Any) -> None:
    """Has each request carry a token of the application default credentials, which is renewed when it expires."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    load = cache(lambda: google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])[0])

    def renew(into: Any) -> None:
        try:
            credentials = load()
            if not credentials.valid:
                credentials.refresh(Request())
        except GoogleAuthError as error:
            raise NoPermissionError(
                f"Google gives no token for {into.host} ({str(error)[:200]}): run `gcloud auth application-default "
                "login`"
            ) from None
        # The name of this key differs between versions of the client.
        into.api_key |= dict.fromkeys(("authorization", "BearerToken"), f"Bearer {credentials.token}")

    into.refresh_api_key_hook = renew
    renew(into)

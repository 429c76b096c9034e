"""What is asked of a cluster's API: few calls, plain JSON in and out, patience with an API that is busy or away.

All objects go through the client's CustomObjectsApi, which sends a manifest as it is and answers with JSON, whatever
version the client has; its typed models would drop what they do not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from job.exits import BadRequestError, BucketAwayError, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import Manifest
from job.jobs.backends.kubernetes_credentials import configuration
from job.jobs.targets import KubernetesTarget

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
HURRIED_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 15.0
"""Of a pause that the server asks for."""
_BUSY = (408, 429, 500, 502, 503, 504)
_RIGHTS = "get, list, create and delete of jobs and jobsets, and get and list of pods, pods/log and events"

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A resource of the API."""

    group: str
    version: str
    plural: str


JOB = Kind("batch", "v1", "jobs")
JOB_SET = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets")
LOCAL_QUEUES = tuple(Kind("kueue.x-k8s.io", version, "localqueues") for version in ("v1beta2", "v1beta1"))


class NotThereError(MissingInputError):
    """404: the object, its namespace, or its kind."""

    def __init__(self, message: str, is_kind: bool) -> None:
        super().__init__(message)
        self.is_kind = is_kind
        """The API does not know such objects at all: what defines them is not installed."""


class AlreadyThereError(BadRequestError):
    """409: there is an object of this name, or it is another one than was meant."""

    def __init__(self, message: str, lost_answer: bool = False) -> None:
        super().__init__(message)
        self.lost_answer = lost_answer
        """An earlier try may have made it: its answer did not come."""


class Api:
    """The API of a target's cluster; the connection is made with the first call."""

    def __init__(self, target: KubernetesTarget, retry_delays_seconds: tuple[float, ...]) -> None:
        self._target, self._delays = target, retry_delays_seconds
        self._timeout = (CONNECT_SECONDS, READ_SECONDS)
        self._namespace = target.namespace
        self._client: Any = None

    def hurry(self) -> None:
        """Has each call tried once, and not for long: somebody waits for the answers."""
        self._delays, self._timeout = (), (HURRIED_SECONDS, HURRIED_SECONDS)

    @property
    def host(self) -> str:
        """Its address, for messages."""
        return str(self._connection().configuration.host)

    def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Creates an object; the server refuses fields that it does not know.

        Raises:
            AlreadyThereError: there is one of this name.
            NotThereError: the namespace or the kind is not there.
        """
        tries = 0

        def post() -> Manifest:
            nonlocal tries
            tries += 1
            made: Manifest = self._objects().create_namespaced_custom_object(
                *self._path(kind), manifest, field_validation="Strict", _request_timeout=self._timeout
            )
            return made

        try:
            return self._asked(post)
        except AlreadyThereError as error:
            error.lost_answer = tries > 1
            raise

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """An object; None if there is none of this name, or no such kind."""
        path = (*self._path(kind), name)
        try:
            return self._asked(
                lambda: self._objects().get_namespaced_custom_object(*path, _request_timeout=self._timeout)
            )
        except NotThereError:
            return None

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster has such objects at all."""
        try:
            self._listed(kind, limit=1)
        except NotThereError:
            return False
        return True

    def all_with(self, kind: Kind, selector: str) -> list[Manifest]:
        """The objects with these labels; none if there is no such kind."""
        try:
            return _items(self._listed(kind, label_selector=selector))
        except NotThereError:
            return []

    def delete(self, kind: Kind, name: str, uid: str) -> None:
        """Deletes an object when its pods have ended, which have their grace period; no other object of that name.

        Raises:
            NotThereError: it is gone already.
            AlreadyThereError: the one of that name is another one.
        """
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        path = (*self._path(kind), name)
        self._asked(
            lambda: self._objects().delete_namespaced_custom_object(*path, body=options, _request_timeout=self._timeout)
        )

    def pods(self, selector: str) -> list[Manifest]:
        """The pods with these labels, oldest first."""
        pods = _items(self._read("list_namespaced_pod", self._namespace, label_selector=selector))
        return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def pod(self, name: str) -> Manifest | None:
        """One pod; None if it is gone."""
        try:
            return self._read("read_namespaced_pod", name, self._namespace)
        except NotThereError:
            return None

    def events(self, name: str) -> list[Manifest]:
        """What controllers said about an object, oldest first; nothing for who may not see it."""
        about = f"involvedObject.name={name}"
        try:
            found = _items(self._read("list_namespaced_event", self._namespace, field_selector=about))
        except NoPermissionError:
            return []
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def service_account(self, name: str) -> Manifest | None:
        """A service account of the namespace; None if it is not there."""
        try:
            return self._read("read_namespaced_service_account", name, self._namespace)
        except NotThereError:
            return None

    def quotas(self) -> list[Manifest]:
        """The ResourceQuotas of the namespace; none for who may not see them."""
        try:
            return _items(self._read("list_namespaced_resource_quota", self._namespace))
        except NoPermissionError:
            return []

    def may(self, verb: str, group: str, resource: str, part: str) -> bool:
        """Whether these credentials are allowed to do it in the namespace."""
        about = {"namespace": self._namespace, "verb": verb, "group": group, "resource": resource, "subresource": part}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        body = {**review, "metadata": {}, "spec": {"resourceAttributes": about}}
        path = ("authorization.k8s.io", "v1", "selfsubjectaccessreviews")
        answer = self._asked(
            lambda: self._objects().create_cluster_custom_object(*path, body, _request_timeout=self._timeout)
        )
        return bool(answer.get("status", {}).get("allowed"))

    def log(self, pod: str, container: str, follow: bool, silence_seconds: float = READ_SECONDS) -> Iterator[str]:
        """The lines of a container's output, each behind its time stamp; with `follow` until it ends.

        Raises:
            BucketAwayError: the connection ended in between, or nothing came for `silence_seconds`.
            NotThereError: the pod is gone.
            BadRequestError: the container has not started.
        """
        import urllib3

        response = self._asked(
            lambda: self._core().read_namespaced_pod_log(
                pod,
                self._namespace,
                container=container,
                follow=follow,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(CONNECT_SECONDS, silence_seconds),
            )
        )
        rest = b""
        try:
            for piece in response.stream(1 << 16, decode_content=False):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            # Half a line may have been read: it comes again, whole.
            raise BucketAwayError(f"the output of pod {pod} broke off: {error}") from None
        finally:
            response.close()

    def _objects(self) -> Any:
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi(self._connection())

    def _core(self) -> Any:
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self._connection())

    def _connection(self) -> Any:
        if self._client is None:
            from kubernetes.client import ApiClient

            self._client = ApiClient(configuration(self._target.context))
        return self._client

    def _path(self, kind: Kind) -> tuple[str, str, str, str]:
        return kind.group, kind.version, self._namespace, kind.plural

    def _listed(self, kind: Kind, **options: Any) -> Any:
        call = self._objects().list_namespaced_custom_object
        return self._asked(lambda: call(*self._path(kind), **options, _request_timeout=self._timeout))

    def _read(self, what: str, *names: str, **options: Any) -> Manifest:
        call = getattr(self._core(), what)
        options |= {"_preload_content": False, "_request_timeout": self._timeout}
        parsed: Manifest = json.loads(self._asked(lambda: call(*names, **options)).data)
        return parsed

    def _asked(self, call: Callable[[], T]) -> T:
        """Calls, and again after a pause when the API is busy or away, a bounded number of times."""
        import urllib3
        from kubernetes.client import ApiException

        for delay in (*self._delays, None):
            try:
                return call()
            except ApiException as error:
                # Status 0 is how some versions of the client tell that TLS failed.
                if error.status and error.status not in _BUSY:
                    raise self._refusal(error) from None
                said, pause = f"answers {error.status or 'nothing'}: {_message(error)}", _retry_after(error)
            except urllib3.exceptions.HTTPError as error:
                said, pause = f"does not answer: {error}", 0.0
            if delay is not None:
                time.sleep(max(delay, min(pause, LONGEST_PAUSE_SECONDS)))
        raise BucketAwayError(
            f"the API of the cluster, {self.host}, {said}; tried {len(self._delays) + 1} times: is it there, and is "
            "this machine allowed to reach it?"
        )

    def _refusal(self, error: Any) -> JobError:
        said, where = _message(error), f"{self.host}, namespace {self._namespace!r}"
        match error.status:
            case 401:
                return NoPermissionError(f"{where} does not take these credentials ({said}): sign in again")
            case 403:
                return NoPermissionError(f"{where}: {said}; jobs need {_RIGHTS}")
            case 404:
                return self._missing(error, said)
            case 409:
                return AlreadyThereError(f"{where}: {said}")
            case _:
                return BadRequestError(f"{where} refuses it ({error.status}): {said}")

    def _missing(self, error: Any, said: str) -> NotThereError:
        details = _status(error).get("details") or {}
        if details.get("kind") == "namespaces":
            return NotThereError(
                f"there is no namespace {self._namespace!r} at {self.host}: `kubectl create namespace "
                f"{self._namespace}`, or set `namespace:` of the target",
                is_kind=False,
            )
        return NotThereError(f"{self.host}: {said}", is_kind=not details.get("name"))


def _items(answer: Any) -> list[Manifest]:
    return list(answer.get("items") or [])


def _status(error: Any) -> dict[str, Any]:
    with suppress(ValueError, TypeError):
        parsed = json.loads(error.body)
        if isinstance(parsed, dict):
            return parsed
    return {}


def _message(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    text = str(_status(error).get("message") or body or error.reason or "")
    return " ".join(text.split())[:400]


def _retry_after(error: Any) -> float:
    with suppress(ValueError, TypeError, AttributeError):
        return max(0.0, float(error.headers.get("Retry-After", 0)))
    return 0.0

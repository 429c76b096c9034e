"""What a cluster holds, and what its controllers and kubelets do to it when a test says so."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]

SERVED: dict[tuple[str, str], tuple[str, ...]] = {
    ("", "v1"): ("pods", "events", "namespaces", "serviceaccounts", "resourcequotas"),
    ("batch", "v1"): ("jobs",),
    ("jobset.x-k8s.io", "v1alpha2"): ("jobsets",),
    ("kueue.x-k8s.io", "v1beta2"): ("localqueues",),
    ("authorization.k8s.io", "v1"): ("selfsubjectaccessreviews",),
}
KINDS = {"pods": "Pod", "jobs": "Job", "jobsets": "JobSet", "localqueues": "LocalQueue", "events": "Event"}
"""What clients call a resource."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_INDEX = "batch.kubernetes.io/job-completion-index"


class Refusal(Exception):
    """An answer that is a Status with an error."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details


def now() -> str:
    """The time as objects write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Cluster:
    """Objects by namespace, resource and name; every change wakes those that wait for one."""

    def __init__(self) -> None:
        self.served = dict(SERVED)
        """Resources by group and version; what is taken out is not installed."""
        self.namespaces = {"default"}
        self.denied: set[tuple[str, str]] = set()
        """Verb and resource that the caller is told to be without."""
        self.goes_after_seconds = 0.1
        """How long the pods of an object that is deleted take to end."""
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._lines: dict[str, list[tuple[str, str] | None]] = {}
        self._version, self._is_open = 0, True
        self._changed = threading.Condition(threading.RLock())

    # What the API does.

    def create(self, namespace: str, plural: str, body: Object, is_dry: bool) -> Object:
        """Stores an object, with what the server adds to it."""
        if plural == "selfsubjectaccessreviews":
            about = body["spec"]["resourceAttributes"]
            what = f"{about['resource']}/{about['subresource']}" if about.get("subresource") else about["resource"]
            return {**body, "status": {"allowed": (about["verb"], what) not in self.denied}}
        name = body.get("metadata", {}).get("name", "")
        if namespace not in self.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")
        if not _NAME.fullmatch(name):
            what = f'{KINDS[plural]} "{name}" is invalid: metadata.name: a lowercase RFC 1123 label is needed'
            raise Refusal(422, "Invalid", what, name=name, kind=plural)
        if body["metadata"].get("namespace", namespace) != namespace:
            raise Refusal(400, "BadRequest", "the namespace of the object does not match that of the request")
        spec = body.get("spec", {})
        if spec.get("podFailurePolicy") and spec["template"]["spec"].get("restartPolicy") != "Never":
            what = f'Job "{name}" is invalid: restartPolicy: only "Never" is supported with podFailurePolicy'
            raise Refusal(422, "Invalid", what, name=name, kind=plural)
        with self._changed:
            if (namespace, plural, name) in self._objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name, kind=plural)
            made = copy.deepcopy(body)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "namespace": namespace}
            made.setdefault("status", {})
            if not is_dry:
                self._store(namespace, plural, made)
            return copy.deepcopy(made)

    def get(self, namespace: str, plural: str, name: str) -> Object:
        """One object."""
        with self._changed:
            return copy.deepcopy(self._find(namespace, plural, name))

    def list(self, namespace: str, plural: str, query: dict[str, str]) -> Object:
        """Those that the selectors take."""
        with self._changed:
            items = [
                copy.deepcopy(thing)
                for (where, what, _), thing in self._objects.items()
                if what == plural and where == namespace and _is_selected(thing, query)
            ]
            kind = f"{KINDS.get(plural, 'Object')}List"
            metadata = {"resourceVersion": str(self._version)}
            return {"kind": kind, "apiVersion": "v1", "metadata": metadata, "items": items}

    def watch(self, namespace: str, plural: str, query: dict[str, str], seconds: float) -> Iterator[bytes]:
        """Events as lines of JSON, until the time is over."""
        until, seen = time.monotonic() + seconds, {}
        while (left := until - time.monotonic()) > 0 and self._is_open:
            with self._changed:
                items = {item["metadata"]["name"]: item for item in self.list(namespace, plural, query)["items"]}
                events = [("DELETED", seen[name]) for name in seen.keys() - items.keys()]
                for name, item in items.items():
                    if name not in seen:
                        events.append(("ADDED", item))
                    elif item["metadata"]["resourceVersion"] != seen[name]["metadata"]["resourceVersion"]:
                        events.append(("MODIFIED", item))
                seen = items
                if not events:
                    self._changed.wait(min(left, 0.5))
            yield b"".join(json.dumps({"type": kind, "object": item}).encode() + b"\n" for kind, item in events)

    def delete(self, namespace: str, plural: str, name: str, policy: str, uid: str) -> Object:
        """Deletes an object; in the foreground it stays, marked, until what it owns is gone."""
        with self._changed:
            found = self._find(namespace, plural, name)
            if uid and uid != found["metadata"]["uid"]:
                what = f'Operation cannot be fulfilled on {plural} "{name}": the UID in the precondition differs'
                raise Refusal(409, "Conflict", what, name=name, kind=plural)
            found["metadata"]["deletionTimestamp"] = now()
            found["metadata"]["finalizers"] = ["foregroundDeletion"] if policy == "Foreground" else []
            self._store(namespace, plural, found)
            threading.Thread(target=self._let_go, args=(namespace, plural, copy.deepcopy(found)), daemon=True).start()
            return copy.deepcopy(found)

    def log(
        self, namespace: str, name: str, container: str, *, follow: bool, timestamps: bool, previous: bool
    ) -> Iterator[bytes]:
        """The output of a pod; None among the pieces is a connection that breaks."""
        pod = self.get(namespace, "pods", name)
        names = [entry["name"] for entry in pod["spec"]["containers"]]
        if container and container not in names:
            raise Refusal(400, "BadRequest", f"container {container} is not valid for pod {name}")
        state = pod["status"].get("containerStatuses", [{}])[0].get("state", {})
        if not state or "waiting" in state:
            why = state.get("waiting", {}).get("reason", "ContainerCreating")
            what = f'container "{container}" in pod "{name}" is waiting to start: {why}'
            raise Refusal(400, "BadRequest", what)
        if previous:
            raise Refusal(400, "BadRequest", f'previous terminated container "{container}" in pod "{name}" not found')
        return self._pieces(pod["metadata"]["uid"], (namespace, "pods", name), follow, timestamps)

    def shut_down(self) -> None:
        """Ends all that is followed."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    # What tests do.

    def add(self, plural: str, thing: Object, namespace: str = "default") -> None:
        """Puts an object there without asking."""
        metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "namespace": namespace}
        with self._changed:
            self._store(namespace, plural, {**thing, "metadata": metadata | thing["metadata"]})

    def names(self, plural: str, namespace: str = "default") -> list[str]:
        """Names of the objects there are."""
        with self._changed:
            return [name for where, what, name in self._objects if (where, what) == (namespace, plural)]

    def change(self, plural: str, name: str, namespace: str = "default", **status: Any) -> None:
        """Replaces parts of an object's status."""
        with self._changed:
            found = self._find(namespace, plural, name)
            found["status"] = found.get("status", {}) | status
            self._store(namespace, plural, found)

    def end_job(self, name: str, kind: str, reason: str = "", message: str = "", plural: str = "jobs") -> None:
        """Gives a job its last condition: `Complete` (`Completed` of a JobSet) or `Failed`."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.change(plural, name, conditions=[condition], active=0)

    def start_pod(self, job: str, index: int = 0, plural: str = "jobs", **state: Any) -> str:
        """Makes the pod of an index as the Job controller does; it runs, or is in `state`. Returns its name."""
        with self._changed:
            owner = self._find("default", plural, job)
            part = owner["spec"] if plural == "jobs" else owner["spec"]["replicatedJobs"][0]["template"]["spec"]
            template = copy.deepcopy(part["template"])
            child = job if plural == "jobs" else f"{job}-node-0"
            name = f"{child}-{index}-{uuid.uuid4().hex[:5]}"
            metadata = template.get("metadata", {}) | {"name": name, "uid": str(uuid.uuid4())}
            # Times of a second alone would leave open which pod is older.
            metadata |= {
                "creationTimestamp": datetime.now(UTC).isoformat(timespec="microseconds"),
                "namespace": "default",
            }
            metadata["annotations"] = {_INDEX: str(index)}
            metadata["labels"] = metadata["labels"] | {"batch.kubernetes.io/job-name": child, _INDEX: str(index)}
            metadata["ownerReferences"] = [{"kind": owner["kind"], "name": job, "uid": owner["metadata"]["uid"]}]
            pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": template["spec"], "status": {}}
            pod["spec"]["nodeName"] = f"node-{index}"
            self._store("default", "pods", pod)
            self._lines[metadata["uid"]] = []
            self.set_pod(name, **(state or {"running": {"startedAt": now()}}))
        return name

    def set_pod(self, name: str, **state: Any) -> None:
        """Puts the container of a pod into a state: `waiting`, `running` or `terminated`."""
        phase = "Running" if "running" in state else "Pending"
        if "terminated" in state:
            phase = "Failed" if state["terminated"]["exitCode"] else "Succeeded"
        self.change("pods", name, phase=phase, containerStatuses=[{"name": "ddpm", "state": state, "restartCount": 0}])

    def unschedulable(self, name: str, message: str) -> None:
        """No node takes a pod."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        with self._changed:
            self._find("default", "pods", name)["spec"].pop("nodeName", None)
        self.change("pods", name, phase="Pending", conditions=[condition], containerStatuses=[])

    def end_pod(self, name: str, code: int, message: str = "", reason: str = "Error") -> None:
        """The program in a pod ends."""
        ended = {"exitCode": code, "reason": reason, "message": message, "finishedAt": now()}
        self.set_pod(name, terminated=ended)

    def remove_pod(self, name: str) -> None:
        """A pod goes, with its node."""
        with self._changed:
            del self._objects["default", "pods", name]
            self._changed.notify_all()

    def print(self, pod: str, *lines: str, stamp: str = "") -> None:
        """The program in a pod prints."""
        with self._changed:
            uid = self._find("default", "pods", pod)["metadata"]["uid"]
            for line in lines:
                # As RFC3339Nano has it: without zeros at the end.
                moment = stamp or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0") + "Z"
                self._lines[uid].append((moment, line))
            self._changed.notify_all()

    def break_log(self, pod: str) -> None:
        """Whoever reads the output of a pod loses the connection here, once."""
        with self._changed:
            self._lines[self._find("default", "pods", pod)["metadata"]["uid"]].append(None)
            self._changed.notify_all()

    def cut_log(self, pod: str, lines: int) -> None:
        """A node throws away the first lines of a pod's output; whoever reads it loses the connection."""
        with self._changed:
            uid = self._find("default", "pods", pod)["metadata"]["uid"]
            old = self._lines[uid]
            self._lines[uid] = old[lines:]
            old.append(None)
            self._changed.notify_all()

    # What both need.

    def _pieces(self, uid: str, key: tuple[str, str, str], follow: bool, timestamps: bool) -> Iterator[bytes]:
        lines, at = self._lines[uid], 0
        while True:
            with self._changed:
                if at == len(lines):
                    pod = self._objects.get(key)
                    is_over = pod is None or pod["status"].get("phase") in ("Succeeded", "Failed")
                    if is_over or not follow or not self._is_open:
                        return
                    self._changed.wait(0.5)
                    continue
                entry = lines[at]
                if entry is None:
                    del lines[at]
            if entry is None:
                yield None  # type: ignore[misc]
                return
            at += 1
            yield f"{entry[0]} {entry[1]}\n".encode() if timestamps else f"{entry[1]}\n".encode()

    def _find(self, namespace: str, plural: str, name: str) -> Object:
        if (namespace, plural, name) not in self._objects:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found', name=name, kind=plural)
        return self._objects[namespace, plural, name]

    def _store(self, namespace: str, plural: str, thing: Object) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._objects[namespace, plural, thing["metadata"]["name"]] = thing
        self._changed.notify_all()

    def _let_go(self, namespace: str, plural: str, owner: Object) -> None:
        uid = owner["metadata"]["uid"]
        time.sleep(self.goes_after_seconds)
        with self._changed:
            for key, thing in list(self._objects.items()):
                owners = [reference["uid"] for reference in thing["metadata"].get("ownerReferences", [])]
                if uid in owners or thing["metadata"]["uid"] == uid:
                    del self._objects[key]
            self._changed.notify_all()


def _is_selected(thing: Object, query: dict[str, str]) -> bool:
    labels = thing["metadata"].get("labels", {})
    for requirement in filter(None, query.get("labelSelector", "").split(",")):
        match = re.fullmatch(r"([^!=]+)(==|=|!=)(.*)", requirement)
        if match is None:
            if (requirement.removeprefix("!") in labels) == requirement.startswith("!"):
                return False
        elif (labels.get(match[1]) == match[3]) == (match[2] == "!="):
            return False
    for requirement in filter(None, query.get("fieldSelector", "").split(",")):
        field, _, value = requirement.partition("=")
        at: Any = thing
        for part in field.split("."):
            at = at.get(part, {}) if isinstance(at, dict) else {}
        if at != value:
            return False
    return True

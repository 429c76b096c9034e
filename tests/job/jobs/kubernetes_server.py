"""A cluster on this machine that is no cluster: its API, as far as jobs need it, and what tests do to what it holds.

Jobs and JobSets are judged when they are made, by schemas that are not ours and by the rules of `admission`. What
controllers and kubelets would do, `Cluster` does when a test says so.
"""

from __future__ import annotations

import copy
import re
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.job.jobs.admission import refusals, schema_problems
from tests.job.jobs.api import Api, Refusal

Object = dict[str, Any]
SERVED = {
    "v1": ("pods", "events", "serviceaccounts"),
    "batch/v1": ("jobs",),
    "jobset.x-k8s.io/v1alpha2": ("jobsets",),
    "kueue.x-k8s.io/v1beta2": ("localqueues", "workloads"),
    "authorization.k8s.io/v1": ("selfsubjectaccessreviews",),
}
_PATH = re.compile(r"/apis?/(v1|[^/]+/[^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(/log)?")
_INDEX = "batch.kubernetes.io/job-completion-index"


class Cluster(Api):
    """What the API holds and was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.served = dict(SERVED)
        """Resources by group and version; what is taken out is not installed."""
        self.namespaces = {"default", "training"}
        self.bodies: list[Object] = []
        """Jobs that were posted, as they came."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verb and resource that are not allowed, such as `("create", "jobs")`."""
        self.goes_after_seconds = 0.05
        """How long the pods of an object that is deleted take to end."""
        self._silent: set[str] = set()
        """Nodes whose kubelet is dead: their pods never end."""
        self._objects: dict[tuple[str, str, str], Object] = {}
        """By namespace, resource and name."""
        self._lines: dict[str, list[str]] = {}
        """Of a pod, by its name, behind their times."""
        self._ticks = 0
        self._lock = threading.RLock()

    def kubeconfig(self) -> Object:
        """The content of a kubeconfig for it."""
        return {
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "somebody", "user": {"token": "right"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "somebody"}}],
        }

    # What the API does.

    def answer(self, method: str, target: str, body: Any, headers: Any) -> Any:
        url = urlsplit(target)
        self.note(method, target)
        if headers.get("Authorization") != "Bearer right":
            raise Refusal(401, "Unauthorized")
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if not (match := _PATH.fullmatch(url.path)):
            # What is asked before a kind is used that may not be installed.
            if (api := url.path.removeprefix("/apis/")) in self.served:
                return {"groupVersion": api, "resources": [{"name": name} for name in self.served[api]]}
            raise Refusal(404, "the server could not find the requested resource")
        api, namespace, plural, name, log = match.groups()
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
        resource = f"{plural}{log or ''}"
        if (verb, resource) in self.forbidden:
            raise Refusal(403, f'User "somebody" cannot {verb} resource "{resource}"')
        # A right is judged before its resource is looked for.
        if plural not in self.served.get(api, ()):
            raise Refusal(404, "the server could not find the requested resource")
        if log:
            assert (query["container"], query["timestamps"].lower()) == ("ddpm", "true"), query
            return self.log(namespace, name, float(query.get("sinceSeconds", 1e9)))
        if verb == "create":
            return self.create(namespace, plural, body)
        if verb == "delete":
            return self.delete(namespace, plural, name, body)
        if verb == "get":
            return self.get(plural, name, namespace)
        selectors = {key: value for key, value in query.items() if key.endswith("Selector")}
        return {"items": self.list(plural, namespace, **selectors)}

    def create(self, namespace: str, plural: str, body: Object) -> Object:
        """Stores an object, with what the server adds to it."""
        if plural == "selfsubjectaccessreviews":
            about = body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (about["resource"], about["subresource"])))
            return {**body, "status": {"allowed": (about["verb"], resource) not in self.forbidden}}
        self.bodies.append(body)
        key = (namespace, plural, body["metadata"]["name"])
        if namespace not in self.namespaces:
            raise Refusal(404, f'namespaces "{namespace}" not found')
        if problems := schema_problems(body):
            raise Refusal(400, f"strict decoding error: {'; '.join(problems)}")
        if problems := refusals(body):
            raise Refusal(403, f"admission webhook denied the request: {'; '.join(problems)}")
        with self._lock:
            if key in self._objects:
                raise Refusal(409, f'{plural} "{key[2]}" already exists')
            self.add(plural, body, namespace)
        return self.get(plural, key[2], namespace)

    def get(self, plural: str, name: str, namespace: str = "default") -> Object:
        """One object."""
        with self._lock:
            return copy.deepcopy(self._find(plural, name, namespace))

    def list(self, plural: str, namespace: str = "default", **selectors: str) -> list[Object]:
        """Those that the selectors take, in any order."""
        wanted = [part.split("=", 1) for text in selectors.values() for part in text.split(",")]
        with self._lock:
            found = [thing for key, thing in self._objects.items() if key[:2] == (namespace, plural)]
            return copy.deepcopy([one for one in found if all(_value(one, name) == value for name, value in wanted)])

    def delete(self, namespace: str, plural: str, name: str, options: Object) -> Object:
        """Marks an object, which stays until what it owns is gone."""
        with self._lock:
            metadata = self._find(plural, name, namespace)["metadata"]
            assert options == {"propagationPolicy": "Foreground", "preconditions": {"uid": metadata["uid"]}}
            metadata["deletionTimestamp"] = self._now()
        threading.Timer(self.goes_after_seconds, self._let_go, (metadata["uid"],)).start()
        return self.get(plural, name, namespace)

    def log(self, namespace: str, name: str, since_seconds: float) -> str:
        """The lines of a pod that are no older."""
        pod = self.get("pods", name, namespace)
        if "waiting" in pod["status"]["containerStatuses"][0]["state"]:
            raise Refusal(400, f'container "ddpm" in pod "{name}" is waiting to start')
        oldest = datetime.now(UTC) - timedelta(seconds=since_seconds)
        lines = [line for line in self._lines[name] if datetime.fromisoformat(line.partition(" ")[0]) >= oldest]
        return "".join(f"{line}\n" for line in lines)

    # What tests do.

    def add(self, plural: str, thing: Object, namespace: str = "default") -> None:
        """Puts an object there without asking."""
        made = {"status": {}, **copy.deepcopy(thing)}
        made["metadata"] = {"uid": str(uuid.uuid4()), "creationTimestamp": self._now(), **made["metadata"]}
        with self._lock:
            self._objects[namespace, plural, made["metadata"]["name"]] = made

    def names(self, *plurals: str) -> list[str]:
        """Names of the objects there are in the first namespace."""
        return [thing["metadata"]["name"] for plural in plurals for thing in self.list(plural)]

    def change(self, plural: str, name: str, namespace: str = "default", **status: Any) -> None:
        """Replaces parts of an object's status."""
        with self._lock:
            self._find(plural, name, namespace)["status"] |= status

    def end_job(self, name: str, kind: str, reason: str = "", plural: str = "jobs") -> None:
        """Gives a job its last condition: `Complete` (`Completed` of a JobSet) or `Failed`."""
        said = {"type": kind, "status": "True", "reason": reason, "message": "in Kubernetes' words"}
        self.change(plural, name, conditions=[said])

    def start_pod(self, job: str, index: int = 0, plural: str = "jobs", **state: Any) -> str:
        """Makes the pod of an index as the Job controller does; it runs, or is in `state`. Returns its name."""
        owner = self.get(plural, job)
        part = owner["spec"] if plural == "jobs" else owner["spec"]["replicatedJobs"][0]["template"]["spec"]
        name = f"{job}-{index}-{uuid.uuid4().hex[:5]}"
        metadata = {"name": name, "uid": name, "annotations": {_INDEX: str(index)}, **part["template"]["metadata"]}
        metadata["ownerReferences"] = [{"uid": owner["metadata"]["uid"]}]
        pod = {"metadata": metadata, "spec": {**part["template"]["spec"], "nodeName": f"node-{index}"}}
        self.add("pods", pod)
        self._lines[name] = []
        self.set_pod(name, **(state or {"running": {}}))
        return name

    def set_pod(self, name: str, **state: Any) -> None:
        """Puts the container of a pod into a state: `waiting`, `running` or `terminated`."""
        self.change("pods", name, containerStatuses=[{"name": "ddpm", "state": state}])

    def end_pod(self, name: str, code: int, message: str = "") -> None:
        """The program in a pod ends."""
        ended = {"exitCode": code, "reason": "Error", "message": message, "finishedAt": self._now()}
        self.set_pod(name, terminated=ended)

    def remove(self, plural: str, name: str, namespace: str = "default") -> None:
        """An object goes, as a pod with its node."""
        self._objects.pop((namespace, plural, name))

    def kill_kubelet(self, node: str) -> None:
        """A kubelet dies. Its pods are deleted after the 300 s that they tolerate by default, and stay as they were."""
        self._silent.add(node)
        for key, thing in self._objects.items():
            if key[1] == "pods" and thing["spec"]["nodeName"] == node:
                thing["metadata"]["deletionTimestamp"] = self._now()

    def delete_node(self, node: str) -> None:
        """A person deletes a node: PodGC makes its pods fail, and removes them; what they held back goes as well."""
        self._silent.remove(node)
        for key in [key for key, thing in self._objects.items() if thing["spec"].get("nodeName") == node]:
            del self._objects[key]
        for thing in [thing for thing in self._objects.values() if "deletionTimestamp" in thing["metadata"]]:
            self._let_go(thing["metadata"]["uid"])

    def print(self, pod: str, *lines: str) -> None:
        """The program in a pod prints."""
        self._lines[pod] += [f"{self._now()} {line}" for line in lines]

    def forget_log(self, pod: str, count: int) -> None:
        """A node throws the first lines of a long output away."""
        del self._lines[pod][:count]

    # What both need.

    def _now(self) -> str:
        """A time that is later than all before; as RFC 3339 has it, without zeros at the end."""
        with self._lock:
            self._ticks += 1
            moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=100 * self._ticks)
        return moment.isoformat(timespec="milliseconds").removesuffix("+00:00").rstrip("0").rstrip(".") + "Z"

    def _find(self, plural: str, name: str, namespace: str) -> Object:
        if (namespace, plural, name) not in self._objects:
            raise Refusal(404, f'{plural} "{name}" not found')
        return self._objects[namespace, plural, name]

    def _let_go(self, uid: str) -> None:
        with self._lock:
            owned = [key for key, thing in self._objects.items() if uid in _owners(thing)]
            held = [key for key in owned if self._objects[key]["spec"].get("nodeName") in self._silent]
            own = [key for key, thing in self._objects.items() if thing["metadata"]["uid"] == uid and not held]
            for key in {*owned, *own} - {*held}:
                del self._objects[key]


def _owners(thing: Object) -> list[str]:
    return [owner["uid"] for owner in thing["metadata"].get("ownerReferences", [])]


def _value(thing: Object, name: str) -> Any:
    """A label, or the field of a field selector."""
    if name == "involvedObject.name":
        return thing["involvedObject"]["name"]
    return thing["metadata"].get("labels", {}).get(name)

"""A cluster on this machine that is no cluster: its API, as far as jobs need it, and what tests do to what it holds.

Jobs and JobSets are judged when they are made, by schemas that are not ours and by the rules of `admission`. What
controllers and kubelets would do, `Cluster` does when a test says so.
"""

from __future__ import annotations

import copy
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.job.answering import JsonHandler, serving
from tests.job.jobs.admission import refusals, schema_problems

Object = dict[str, Any]
SERVED = {
    "v1": ("pods", "events", "serviceaccounts"),
    "batch/v1": ("jobs",),
    "jobset.x-k8s.io/v1alpha2": ("jobsets",),
    "kueue.x-k8s.io/v1beta2": ("localqueues", "workloads"),
    "authorization.k8s.io/v1": ("selfsubjectaccessreviews",),
}
KINDS = {"jobs": "Job", "jobsets": "JobSet"}
_PATH = re.compile(
    r"/apis?/(?P<api>v1|[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?(?P<log>/log)?"
)
_INDEX = "batch.kubernetes.io/job-completion-index"


class Refusal(Exception):
    """A code, and the message of a Status with an error."""


class Cluster:
    """What the API holds and was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.served = dict(SERVED)
        """Resources by group and version; what is taken out is not installed."""
        self.namespaces = {"default", "training"}
        self.requests: list[tuple[str, str]] = []
        """Method and path of all requests."""
        self.bodies: list[Object] = []
        """What was posted, as it came."""
        self.tokens = ["right"]
        """Those that are known."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verb and resource that are not allowed, such as `("create", "jobs")`."""
        self.faults: list[tuple[str, Callable[[_Handler], object]]] = []
        """A method, and what answers its next request instead; each is used once."""
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

    def create(self, namespace: str, plural: str, body: Object) -> Object:
        """Stores an object, with what the server adds to it."""
        if plural == "selfsubjectaccessreviews":
            about = body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (about["resource"], about["subresource"])))
            return {**body, "status": {"allowed": (about["verb"], resource) not in self.forbidden}}
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

    def answer_next(self, code: int, times: int = 1, method: str = "GET", message: str = "the test says {}") -> None:
        """Has the next `times` requests of that method answered with an error."""
        self.faults += [(method, lambda handler: handler.say(code, {"message": message.format(code)}))] * times

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


class _Handler(JsonHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        self.body, cluster = self.heard(), self.cluster
        cluster.requests.append((self.command, self.path))
        with suppress(BrokenPipeError, ConnectionResetError):
            if cluster.faults and cluster.faults[0][0] == self.command:
                cluster.faults.pop(0)[1](self)
                return
            try:
                self.serve()
            except Refusal as refusal:
                code, message = refusal.args
                self.say(code, {"kind": "Status", "code": code, "message": message})

    do_POST = do_DELETE = do_GET

    def serve(self) -> None:
        """Answers as the API server would."""
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.cluster.tokens:
            raise Refusal(401, "Unauthorized")
        url = urlsplit(self.path)
        match = _PATH.fullmatch(url.path)
        if match is None:
            self.say(200, self._discovered(url.path))
        else:
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._dispatch(query, **match.groupdict())

    def _discovered(self, path: str) -> Object:
        """What kubectl asks first (kubernetes.io/docs/concepts/overview/kubernetes-api, discovery, unaggregated)."""
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            pairs = [api.split("/") for api in self.cluster.served if "/" in api]
            versions = [(name, {"groupVersion": f"{name}/{version}", "version": version}) for name, version in pairs]
            groups = [{"name": name, "versions": [version]} for name, version in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        api, common = path.removeprefix("/apis/").removeprefix("/api/"), {"namespaced": True, "verbs": ["create"]}
        if api not in self.cluster.served:
            raise Refusal(404, "the server could not find the requested resource")
        found = [{"name": name, "kind": KINDS.get(name, name), **common} for name in self.cluster.served[api]]
        return {"kind": "APIResourceList", "groupVersion": api, "resources": found}

    def _dispatch(self, query: dict[str, str], api: str, namespace: str, plural: str, name: str, log: str) -> None:
        cluster = self.cluster
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[self.command]
        resource = f"{plural}{log or ''}"
        if (verb, resource) in cluster.forbidden:
            raise Refusal(403, f'User "somebody" cannot {verb} resource "{resource}"')
        # A right is judged before its resource is looked for.
        if plural not in cluster.served.get(api, ()):
            raise Refusal(404, "the server could not find the requested resource")
        if log:
            assert (query["container"], query["timestamps"].lower()) == ("ddpm", "true"), query
            self.say(200, cluster.log(namespace, name, float(query.get("sinceSeconds", 1e9))))
            return
        if verb == "create":
            cluster.bodies += [self.body] if plural in KINDS else []
            answer = cluster.create(namespace, plural, self.body)
        elif verb == "delete":
            answer = cluster.delete(namespace, plural, name, self.body)
        elif verb == "get":
            answer = cluster.get(plural, name, namespace)
        else:
            selectors = {key: value for key, value in query.items() if key.endswith("Selector")}
            answer = {"items": cluster.list(plural, namespace, **selectors)}
        self.say(200, answer)


def _owners(thing: Object) -> list[str]:
    return [owner["uid"] for owner in thing["metadata"].get("ownerReferences", [])]


def _value(thing: Object, name: str) -> Any:
    """A label, or the field of a field selector."""
    if name == "involvedObject.name":
        return thing["involvedObject"]["name"]
    return thing["metadata"].get("labels", {}).get(name)


@contextmanager
def kubernetes_server() -> Iterator[Cluster]:
    """A cluster's API, for as long as the block lasts."""

    class Handler(_Handler):
        cluster = Cluster()

    with serving(Handler) as Handler.cluster.url:
        yield Handler.cluster

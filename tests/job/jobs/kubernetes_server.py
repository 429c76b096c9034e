"""A cluster on this machine that is no cluster: its API, as far as jobs need it, and what tests do to what it holds.

Jobs and JobSets are judged by schemas that are not ours when they are made. What controllers and kubelets would do,
`Cluster` does when a test says so.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.job.jobs.kubernetes_jobs import schema_problems

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Namespace, resource and name."""
SERVED = {
    "v1": ("pods", "events", "serviceaccounts", "resourcequotas"),
    "batch/v1": ("jobs",),
    "jobset.x-k8s.io/v1alpha2": ("jobsets",),
    "kueue.x-k8s.io/v1beta2": ("localqueues",),
    "authorization.k8s.io/v1": ("selfsubjectaccessreviews",),
}
KINDS = {"jobs": "Job", "jobsets": "JobSet"}
_PATH = re.compile(
    r"/apis?/(?P<api>v1|[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?(?P<log>/log)?"
)
_INDEX = "batch.kubernetes.io/job-completion-index"


class Refusal(Exception):
    """An answer that is a Status with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cluster:
    """What the API holds and was asked; every change wakes those that follow an output."""

    def __init__(self, url: str) -> None:
        self.url = url
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
        self._objects: dict[Key, Object] = {}
        self._lines: dict[str, list[str | None]] = {}
        """Of a pod, by its UID; None is a connection that breaks."""
        self._ticks, self._is_open = 0, True
        self._changed = threading.Condition(threading.RLock())

    def kubeconfig(self, **user: Any) -> Object:
        """The content of a kubeconfig for it; `user` is how one signs in."""
        return {
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "somebody", "user": user or {"token": "right"}}],
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
        with self._changed:
            if key in self._objects:
                raise Refusal(409, f'{plural} "{key[2]}" already exists')
            self.add(plural, body, namespace)
            return copy.deepcopy(self._objects[key])

    def get(self, plural: str, name: str, namespace: str = "default") -> Object:
        """One object."""
        with self._changed:
            return copy.deepcopy(self._find(plural, name, namespace))

    def list(self, plural: str, namespace: str = "default", **selectors: str) -> list[Object]:
        """Those that the selectors take, in any order."""
        wanted = [part.split("=", 1) for text in selectors.values() for part in text.split(",")]
        with self._changed:
            return [
                copy.deepcopy(thing)
                for key, thing in self._objects.items()
                if key[:2] == (namespace, plural) and all(_value(thing, name) == value for name, value in wanted)
            ]

    def delete(self, namespace: str, plural: str, name: str, options: Object) -> Object:
        """Marks an object, which stays until what it owns is gone."""
        with self._changed:
            found = self._find(plural, name, namespace)
            uid = found["metadata"]["uid"]
            if uid != options["preconditions"]["uid"]:
                raise Refusal(409, "the UID in the precondition differs")
            assert options["propagationPolicy"] == "Foreground"
            found["metadata"]["deletionTimestamp"] = self._now()
            threading.Timer(self.goes_after_seconds, self._let_go, (uid,)).start()
            return copy.deepcopy(found)

    def log(self, namespace: str, name: str, follow: bool) -> Iterator[str | None]:
        """The lines of a pod."""
        pod = self.get("pods", name, namespace)
        if "waiting" in pod["status"]["containerStatuses"][0]["state"]:
            raise Refusal(400, f'container "ddpm" in pod "{name}" is waiting to start')
        return self._printed(pod["metadata"]["uid"], (namespace, "pods", name), follow)

    # What tests do.

    def add(self, plural: str, thing: Object, namespace: str = "default") -> None:
        """Puts an object there without asking."""
        made = {"status": {}, **copy.deepcopy(thing)}
        made["metadata"] = {"uid": str(uuid.uuid4()), "creationTimestamp": self._now(), **made["metadata"]}
        with self._changed:
            self._objects[namespace, plural, made["metadata"]["name"]] = made

    def names(self, plural: str, namespace: str = "default") -> list[str]:
        """Names of the objects there are."""
        return [thing["metadata"]["name"] for thing in self.list(plural, namespace)]

    def change(self, plural: str, name: str, namespace: str = "default", **status: Any) -> None:
        """Replaces parts of an object's status."""
        with self._changed:
            self._find(plural, name, namespace)["status"] |= status
            self._changed.notify_all()

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

    def end_pod(self, name: str, code: int, message: str = "", reason: str = "Error") -> None:
        """The program in a pod ends."""
        self.set_pod(
            name, terminated={"exitCode": code, "reason": reason, "message": message, "finishedAt": self._now()}
        )

    def unschedulable(self, name: str) -> None:
        """No node takes a pod."""
        condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
        with self._changed:
            del self._find("pods", name, "default")["spec"]["nodeName"]
        self.change("pods", name, conditions=[condition], containerStatuses=[])

    def remove_pod(self, name: str) -> None:
        """A pod goes, with its node."""
        with self._changed:
            del self._objects["default", "pods", name]
            self._changed.notify_all()

    def print(self, pod: str, *lines: str) -> None:
        """The program in a pod prints."""
        with self._changed:
            self._lines[pod] += [f"{self._now()} {line}" for line in lines]
            self._changed.notify_all()

    def break_log(self, pod: str, forgotten: int = 0) -> None:
        """Whoever reads a pod's output loses the connection here, once; its first lines may be `forgotten` then."""
        with self._changed:
            old = self._lines[pod]
            self._lines[pod] = old[forgotten:] if forgotten else old
            old.append(None)
            self._changed.notify_all()

    def answer_next(self, code: int, times: int = 1, method: str = "GET") -> None:
        """Has the next `times` requests of that method answered with an error."""
        self.faults += [(method, lambda handler: handler.say(code, {"message": f"the test says {code}"}))] * times

    def shut_down(self) -> None:
        """Ends all that is followed."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    # What both need.

    def _now(self) -> str:
        """A time that is later than all before; as RFC 3339 has it, without zeros at the end."""
        with self._changed:
            self._ticks += 1
            moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=100 * self._ticks)
        return moment.isoformat(timespec="milliseconds").removesuffix("+00:00").rstrip("0").rstrip(".") + "Z"

    def _printed(self, uid: str, key: Key, follow: bool) -> Iterator[str | None]:
        lines, at = self._lines[uid], 0
        while True:
            with self._changed:
                while at == len(lines):
                    pod = self._objects.get(key)
                    if pod is None or "terminated" in pod["status"]["containerStatuses"][0]["state"] or not follow:
                        return
                    if not self._is_open:
                        return
                    self._changed.wait(0.5)
                line = lines[at]
                if line is None:
                    del lines[at]
                    yield None
                    return
            at += 1
            yield line

    def _find(self, plural: str, name: str, namespace: str) -> Object:
        if (namespace, plural, name) not in self._objects:
            raise Refusal(404, f'{plural} "{name}" not found')
        return self._objects[namespace, plural, name]

    def _let_go(self, uid: str) -> None:
        with self._changed:
            for key, thing in list(self._objects.items()):
                if uid in (thing["metadata"]["uid"], *(o["uid"] for o in thing["metadata"].get("ownerReferences", []))):
                    del self._objects[key]
            self._changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart: the second would wait 40 ms for the other side's acknowledgement of the first.
    disable_nagle_algorithm = True
    cluster: Cluster

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cluster.requests.append((self.command, self.path))
        faults = self.cluster.faults
        with suppress(BrokenPipeError, ConnectionResetError):
            if faults and faults[0][0] == self.command:
                faults.pop(0)[1](self)
                return
            try:
                self.serve()
            except Refusal as refusal:
                self.say(refusal.code, {"kind": "Status", "code": refusal.code, "message": str(refusal)})

    do_POST = do_DELETE = do_GET

    def log_message(self, *words: object) -> None:
        pass

    def say(self, code: int, answer: Object) -> None:
        """Sends a whole answer."""
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def serve(self) -> None:
        """Answers as the API server would."""
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.cluster.tokens:
            raise Refusal(401, "Unauthorized")
        url = urlsplit(self.path)
        match = _PATH.fullmatch(url.path)
        if match is None:
            self.say(200, self._discovered(url.path))
        elif match["plural"] not in self.cluster.served.get(match["api"], ()):
            raise Refusal(404, "the server could not find the requested resource")
        else:
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._dispatch(query, **match.groupdict())

    def _discovered(self, path: str) -> Object:
        """What kubectl asks first (kubernetes.io/docs/concepts/overview/kubernetes-api, discovery, unaggregated)."""
        served = self.cluster.served
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = []
            for api in filter(lambda api: "/" in api, served):
                version = {"groupVersion": api, "version": api.split("/")[1]}
                groups.append({"name": api.split("/")[0], "versions": [version], "preferredVersion": version})
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        api = path.removeprefix("/apis/").removeprefix("/api/")
        resources = [
            {"name": name, "singularName": "", "namespaced": True, "kind": KINDS.get(name, name), "verbs": ["create"]}
            for name in served[api]
        ]
        return {"kind": "APIResourceList", "groupVersion": api, "resources": resources}

    def _dispatch(self, query: dict[str, str], api: str, namespace: str, plural: str, name: str, log: str) -> None:
        cluster = self.cluster
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[self.command]
        resource = f"{plural}{log or ''}"
        if (verb, resource) in cluster.forbidden:
            raise Refusal(403, f'User "somebody" cannot {verb} resource "{resource}"')
        if verb == "create":
            body = json.loads(self.body)
            cluster.bodies += [body] if plural in KINDS else []
            self.say(201, cluster.create(namespace, plural, body))
        elif verb == "delete":
            self.say(200, cluster.delete(namespace, plural, name, json.loads(self.body)))
        elif log:
            assert (query["container"], query["timestamps"].lower()) == ("ddpm", "true"), query
            self._stream(cluster.log(namespace, name, query["follow"].lower() == "true"))
        elif name:
            self.say(200, cluster.get(plural, name, namespace))
        else:
            selectors = {key: value for key, value in query.items() if key.endswith("Selector")}
            self.say(200, {"items": cluster.list(plural, namespace, **selectors)})

    def _stream(self, lines: Iterator[str | None]) -> None:
        """Answers in chunks, each as soon as it is there; none ends where a line or a letter does."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            if line is None:
                self.close_connection = True
                return
            data = f"{line}\n".encode()
            for part in (data[:-2], data[-2:]):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def _value(thing: Object, name: str) -> Any:
    """A label, or the field of a field selector."""
    if name == "involvedObject.name":
        return thing["involvedObject"]["name"]
    return thing["metadata"].get("labels", {}).get(name)


@contextmanager
def kubernetes_server() -> Iterator[Cluster]:
    """A cluster's API, for as long as the block lasts."""

    class Handler(_Handler):
        pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    Handler.cluster = Cluster(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=lambda: http.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield Handler.cluster
    finally:
        Handler.cluster.shut_down()
        http.shutdown()
        http.server_close()
        thread.join()


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when `what` is true, and fails if that takes too long."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)

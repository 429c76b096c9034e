"""A cluster's API on this machine: objects, checked against Kubernetes' own schemas, and pods that a test moves.

It answers as the API server's reference says (kubernetes.io/docs/reference/using-api/api-concepts and the pages of
batch/v1, core/v1 and meta/v1 Status), to the official clients and to kubectl. What a controller or a kubelet would do,
`kubernetes_cluster.Cluster` does when a test says so.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from tests.job.jobs.kubernetes_cluster import KINDS, Cluster, Refusal

VERSION = "1.34"
_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?(?:/(?P<plural>[a-z]+))(?:/(?P<name>[^/]+))?(?:/(?P<part>log|status))?"
)

Fault = Callable[["_Handler"], bool]
"""Answers instead of the server, once: true if it did."""


class Server:
    """What tests know of a running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.cluster = Cluster()
        self.requests: list[tuple[str, str]] = []
        """Method and path of all requests."""
        self.bodies: list[dict[str, Any]] = []
        """What was posted, as it came."""
        self.tokens: list[str] = ["right"]
        """Tokens that are known."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verb and resource that are not allowed, such as `("create", "jobs")`."""
        self.faults: list[Fault] = []
        """What answers the next requests instead, one each."""

    def answer_next(self, code: int, times: int = 1, method: str = "", **headers: str) -> None:
        """Has the next `times` requests (of that method) answered with an error."""

        def fault(handler: _Handler) -> bool:
            if method and handler.command != method:
                self.faults.insert(0, fault)
                return False
            reasons = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}
            handler.say(code, _failure(code, reasons.get(code, "Unknown"), f"test answers {code}"), **headers)
            return True

        self.faults += [fault] * times

    def lose_next_answer(self) -> None:
        """The next POST is done, and nobody is told."""

        def fault(handler: _Handler) -> bool:
            if handler.command != "POST":
                self.faults.insert(0, fault)
                return False
            handler.is_mute = True
            handler.serve()
            handler.close_connection = True
            return True

        self.faults.append(fault)

    def kubeconfig(self, token: str = "right", **changes: Any) -> dict[str, Any]:
        """The content of a kubeconfig for it; `changes` replace parts of the user."""
        user = changes or {"token": token}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "somebody", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "somebody"}}],
        }


def _failure(code: int, reason: str, message: str, **details: Any) -> dict[str, Any]:
    """A Status (kubernetes.io/docs/reference/kubernetes-api/common-definitions/status)."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**status, "message": message, "reason": reason, "details": details, "code": code}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart: the second would wait 40 ms for the other side's acknowledgement of the first.
    disable_nagle_algorithm = True
    known: Server
    is_mute = False

    def do_GET(self) -> None:
        self._begin()

    do_POST = do_DELETE = do_GET

    def log_message(self, *words: object) -> None:
        pass

    def _begin(self) -> None:
        self.is_mute = False
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.known.requests.append((self.command, self.path))
        with suppress(BrokenPipeError, ConnectionResetError):
            faults = self.known.faults
            if not (faults and faults.pop(0)(self)):
                self.serve()

    def serve(self) -> None:
        """Answers as the API server would."""
        try:
            self._serve()
        except Refusal as refusal:
            self.say(refusal.code, _failure(refusal.code, refusal.reason, refusal.message, **refusal.details))

    def say(self, code: int, answer: dict[str, Any] | str, **headers: str) -> None:
        """Sends a whole answer, unless this handler is mute."""
        if self.is_mute:
            return
        is_text = isinstance(answer, str)
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _serve(self) -> None:
        authorization = self.headers.get("Authorization", "")
        if authorization.removeprefix("Bearer ") not in self.known.tokens:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path == "/version":
            major, minor = VERSION.split(".")
            self.say(200, {"major": major, "minor": minor, "gitVersion": f"v{VERSION}.0"})
            return
        if (found := self._discovered(url.path)) is not None:
            self.say(200, found)
            return
        match = _PATH.fullmatch(url.path)
        if match is None or not self._knows(match["group"] or "", match["version"] or "v1", match["plural"]):
            # Paths of groups that are not there are answered by no API, and with no Status.
            self.say(404, "404 page not found\n")
            return
        self._allow(match["plural"], match["name"], match["part"])
        self._dispatch(match["namespace"] or "", match["plural"], match["name"], match["part"], query)

    def _discovered(self, path: str) -> dict[str, Any] | None:
        """What clients ask first (kubernetes.io/docs/concepts/overview/kubernetes-api, discovery, unaggregated)."""
        served = self.known.cluster.served
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = []
            for group, version in served:
                entry = {"groupVersion": f"{group}/{version}", "version": version}
                groups += [{"name": group, "versions": [entry], "preferredVersion": entry}] if group else []
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        match = re.fullmatch(r"/api/(v1)|/apis/([^/]+)/([^/]+)", path)
        plurals = served.get((match[2] or "", match[1] or match[3])) if match else None
        if match is None or plurals is None:
            return None
        verbs = ["create", "delete", "get", "list", "watch"]
        resources = [
            {"name": name, "singularName": "", "namespaced": True, "kind": KINDS.get(name, "Other"), "verbs": verbs}
            for name in plurals
        ]
        version = match[1] or f"{match[2]}/{match[3]}"
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}

    def _knows(self, group: str, version: str, plural: str) -> bool:
        return plural in self.known.cluster.served.get((group, version), ())

    def _allow(self, plural: str, name: str | None, part: str | None) -> None:
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[self.command]
        resource = f"{plural}/{part}" if part else plural
        if (verb, resource) in self.known.forbidden:
            what = f'{resource} is forbidden: User "somebody" cannot {verb} resource "{resource}"'
            raise Refusal(403, "Forbidden", what, kind=resource)

    def _dispatch(self, namespace: str, plural: str, name: str | None, part: str | None, query: dict[str, str]) -> None:
        cluster = self.known.cluster
        if part == "log" and name:
            self._log(namespace, name, query)
        elif self.command == "POST":
            body = json.loads(self.body)
            self.known.bodies.append(json.loads(self.body))
            _check(body, query.get("fieldValidation", "Warn"))
            self.say(201, cluster.create(namespace, plural, body, is_dry="dryRun" in query))
        elif self.command == "DELETE" and name:
            options = json.loads(self.body or b"{}") or {}
            policy = query.get("propagationPolicy") or options.get("propagationPolicy", "Background")
            uid = options.get("preconditions", {}).get("uid", "")
            self.say(200, cluster.delete(namespace, plural, name, policy, uid))
        elif name:
            self.say(200, cluster.get(namespace, plural, name))
        elif query.get("watch") in ("true", "1", "True"):
            self._stream(cluster.watch(namespace, plural, query, float(query.get("timeoutSeconds", 30))))
        else:
            self.say(200, cluster.list(namespace, plural, query))

    def _log(self, namespace: str, name: str, query: dict[str, str]) -> None:
        is_true = ("true", "True", "1")
        self._stream(
            self.known.cluster.log(
                namespace,
                name,
                query.get("container", ""),
                follow=query.get("follow") in is_true,
                timestamps=query.get("timestamps") in is_true,
                previous=query.get("previous") in is_true,
            ),
            "text/plain",
        )

    def _stream(self, pieces: Iterator[bytes], content_type: str = "application/json") -> None:
        """Answers in chunks, each as soon as it is there; `None` among them breaks the connection."""
        first = next(pieces, b"")
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece: bytes | None = first
        while piece is not None:
            if piece:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            try:
                piece = next(pieces)
            except StopIteration:
                self.wfile.write(b"0\r\n\r\n")
                return
        self.close_connection = True


def _check(body: dict[str, Any], field_validation: str) -> None:
    """Refuses what Kubernetes' own schema does not know, where the caller asked for that."""
    if field_validation != "Strict":
        return
    if body.get("kind") == "JobSet":
        spec = body.get("spec", {})
        model = JobsetV1alpha2JobSet.from_dict(body)
        # These models leave out what they do not know.
        if model is None or model.to_dict() != body:
            raise Refusal(400, "BadRequest", "strict decoding error: unknown field in a JobSet")
        for part in spec.get("replicatedJobs", []):
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part.get("template", {})}
            _check(job, field_validation)
        return
    try:
        kubernetes_validate.validate(body, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(map(str, error.path))
        raise Refusal(400, "BadRequest", f"strict decoding error: {path}: {error.message}") from None


@contextmanager
def kubernetes_server() -> Iterator[Server]:
    """A cluster's API, for as long as the block lasts."""

    class Handler(_Handler):
        pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    Handler.known = Server(http.server_address[1])
    thread = threading.Thread(target=lambda: http.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield Handler.known
    finally:
        Handler.known.cluster.shut_down()
        http.shutdown()
        http.server_close()
        thread.join()


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when `what` is true, and fails if that takes too long."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)

"""Servers of tests: JSON in and out, on a port of their own; and Compute Engine's metadata server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class JsonHandler(BaseHTTPRequestHandler):
    """Reads a body that is JSON; `say` answers."""

    protocol_version = "HTTP/1.1"
    # Head and body are written apart: the second would wait 40 ms for the other side's acknowledgement of the first.
    disable_nagle_algorithm = True

    def heard(self) -> Any:
        """What was sent; None if nothing was."""
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")

    def say(self, code: int, answer: Any, **headers: str) -> None:
        """Sends a whole answer; a string as it is."""
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves before the end is no error, and its traceback would be taken for the program's.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server for as long as the block lasts: its URL."""
    with _Server(("127.0.0.1", 0), handler) as server:
        # Requests that wait when the test is over are not waited for.
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


_PREEMPTED = "/computeMetadata/v1/instance/preempted"

Answer = Callable[[JsonHandler], None]


class MetadataServer:
    """The server's value `instance/preempted`; `host` is for `GCE_METADATA_HOST`.

    A request with `wait_for_change` is answered when the value's ETag is another one than `last_etag`, or after
    `timeout_sec` (cloud.google.com/compute/docs/metadata/querying-metadata).
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.requests: list[str] = []
        self.odd: Answer | None = None
        """What answers instead, while it is set."""
        self._preempted = threading.Event()

    def preempt(self) -> None:
        """Answers requests that wait for it, and later ones."""
        self._preempted.set()

    def answer(self, request: JsonHandler) -> None:
        self.requests.append(request.path)
        if self.odd is not None:
            self.odd(request)
            return
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        if request.headers.get("Metadata-Flavor") != "Google" or url.path != _PREEMPTED:
            request.send_error(403 if url.path == _PREEMPTED else 404)
            return
        if query.get("wait_for_change") == ["true"] and query["last_etag"] == ["etag-False"]:
            self._preempted.wait(float(query["timeout_sec"][0]))
        is_preempted = self._preempted.is_set()
        # Who asked may be gone by now.
        with suppress(OSError):
            request.say(200, str(is_preempted).upper(), ETag=f"etag-{is_preempted}")


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A server that answers while the context lasts."""

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            known.answer(self)

    with serving(Handler) as url:
        known = MetadataServer(url.removeprefix("http://"))
        yield known

"""Google's APIs on this machine: Compute Engine, Batch, Cloud Logging, and the metadata server of a VM.

Written from the services' protocol buffers and reference pages, never from our client: a body that is no message of the
proto is refused with 400, as is what the pages rule out.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.job.jobs.google_batch_server import BatchService
from tests.job.jobs.google_compute_server import ComputeService
from tests.job.jobs.google_logging_server import LoggingService
from tests.job.jobs.google_services import Refusal

TOKEN = "token-of-the-machine"
PROJECT = "my-project"


class GoogleServer:
    """The services, and ways to have them answer with errors."""

    def __init__(self) -> None:
        self.port = 0
        self.compute, self.batch, self.logging = ComputeService(PROJECT), BatchService(PROJECT), LoggingService()
        self.metadata = Metadata()
        self.accounts = {"ddpm-job@my-project.iam.gserviceaccount.com"}
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request, in order."""
        self.refusals: list[Refusal | None] = []
        """What the next requests to APIs are answered with; None is an answer as always."""
        self.denied: dict[str, Refusal] = {}
        """What requests are answered with whose method and path match the pattern."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def made(self, pattern: str) -> list[str]:
        """The requests that match, as `METHOD path`."""
        return [text for text in (f"{method} {path}" for method, path in self.requests) if re.search(pattern, text)]

    def answer(self, method: str, target: str, body: Any, headers: Any) -> Any:
        url = urlsplit(target)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if path.startswith("/computeMetadata/"):
            return self.metadata.answer(path, headers)
        self.requests.append((method, path))
        if self.refusals and (refusal := self.refusals.pop(0)):
            raise refusal
        for pattern, refusal in self.denied.items():
            if re.search(pattern, f"{method} {path}"):
                raise refusal
        # Only a machine has a token here; the clients come without credentials, as to any server in plain http.
        if headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Request had invalid authentication credentials.")
        if account := re.fullmatch(r"/v1/projects/-/serviceAccounts/(.+)", path):
            if account[1] not in self.accounts:
                raise Refusal(404, f"Unknown service account: {account[1]}", "notFound")
            return {"email": account[1]}
        for service in (self.compute, self.batch, self.logging):
            if (found := service.answer(method, path, query, body)) is not None:
                return found
        raise Refusal(404, f"no method {method} {path}")


class Metadata:
    """What a VM asks about itself."""

    def __init__(self) -> None:
        self.values = {
            "project/project-id": PROJECT,
            "instance/name": "celeba",
            "instance/zone": "projects/my-project/zones/us-central1-a",
        }

    def answer(self, path: str, headers: Any) -> Any:
        key = path.removeprefix("/computeMetadata/v1/")
        if headers.get("Metadata-Flavor") != "Google":
            raise Refusal(403, "Metadata-Flavor is missing")
        if key == "instance/service-accounts/default/token":
            return json.dumps({"access_token": TOKEN, "expires_in": 3599, "token_type": "Bearer"})
        if key not in self.values:
            raise Refusal(404, key)
        return self.values[key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart: the second would wait 40 ms for the other side's acknowledgement of the first.
    disable_nagle_algorithm = True
    google: GoogleServer

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            is_json = "json" in self.headers.get("Content-Type", "")
            answer = self.google.answer(
                self.command, self.path, json.loads(raw) if raw and is_json else raw.decode(), self.headers
            )
            status = 200
        except Refusal as refusal:
            answer, status = refusal.body, refusal.status
        payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/text" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def google_server() -> Iterator[GoogleServer]:
    """A server of the test's own, on a port of its own."""
    google = GoogleServer()
    handler = type("Handler", (_Handler,), {"google": google})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    google.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield google
    finally:
        server.shutdown()
        server.server_close()

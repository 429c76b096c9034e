"""What servers of tests have in common: JSON in and out, on a port of their own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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

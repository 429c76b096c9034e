"""A registry on this machine, as far as it is asked whether an image is there (OCI distribution specification, 4.4)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "for-everybody"


class Registry:
    """What it holds, and whom it shows it to.

    Attributes:
        host: its name in an image's.
        images: `path:tag` or `path@digest` of those that are there.
        policy: `open`; `anonymous`, which wants a token that it gives to everybody; `private`, which gives none.
        realm: where it says that tokens are given, instead of by itself.
    """

    def __init__(self) -> None:
        self.host, self.images, self.policy, self.realm = "", set[str](), "open", ""
        self.asked: list[str] = []

    def answer(self, method: str, target: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(target)
        self.asked.append(f"{method} {url.path}")
        if url.path == "/token":
            assert parse_qs(url.query) == {"service": ["here"], "scope": ["repository:team/ddpm:pull"]}
            return (403, {}, b"") if self.policy == "private" else (200, {}, json.dumps({"token": TOKEN}).encode())
        if self.policy != "open" and headers.get("Authorization") != f"Bearer {TOKEN}":
            realm = self.realm or f"http://{self.host}/token"
            words = f'Bearer realm="{realm}",service="here",scope="repository:team/ddpm:pull"'
            return 401, {"WWW-Authenticate": words}, b""
        assert "application/vnd.oci.image.index.v1+json" in headers["Accept"]
        path, _, reference = url.path.removeprefix("/v2/").partition("/manifests/")
        sign = "@" if reference.startswith("sha256:") else ":"
        return (200 if f"{path}{sign}{reference}" in self.images else 404), {}, b""


@contextmanager
def registry() -> Iterator[Registry]:
    """Runs one."""
    here = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = here.answer(self.command, self.path, dict(self.headers))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()

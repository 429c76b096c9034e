"""A bad network: an HTTP proxy before a real bucket server that refuses, loses, stalls and cuts what passes.

It reads whole requests and whole answers, so that each fault falls between or into them and not somewhere by chance.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Fault(StrEnum):
    """What may happen to a request."""

    TOO_MANY = "429"
    BROKEN = "500"
    UNAVAILABLE = "503"
    RESET = "reset before the request is passed on"
    LOST_ANSWER = "reset after the server has answered"
    SILENCE = "no byte of an answer"
    SILENCE_MIDWAY = "half an answer, then silence"
    SHORT = "fewer bytes than Content-Length says"
    SHORT_CHUNKS = "chunks that break off"


_BODIES = {
    "json": '{"error": {"code": %d, "message": "a bad day", "errors": []}}',
    "xml": "<?xml version='1.0'?><Error><Code>BadDay</Code><Message>%d, a bad day</Message></Error>",
}
SILENT_SECONDS = 60.0
"""How long a connection stays silent, unless its client gives up first."""
_BODILESS = {204, 304}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Request:
    """One request, whole."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def text(self) -> str:
        """Method, target and the beginning of the body: what the patterns of `inject` are looked for in."""
        return f"{self.method} {self.target}\n{self.body[:500].decode('latin-1')}"


class FaultyProxy(AbstractContextManager["FaultyProxy"]):
    """A proxy on a port of its own, `url`, before the server at `target`.

    Attributes:
        rate: which part of the requests meets a fault; all kinds are dealt out before one comes again.
        requests: the requests that arrived so far, by method.
        injected: the faults so far.
        instead: answers a request in the server's stead, if it returns bytes.
        passed: changes a request on its way to the server.
        received: changes the body of an answer on its way to the client.
    """

    def __init__(self, target: str) -> None:
        self.rate = 0.0
        self.requests: Counter[str] = Counter()
        self.injected: Counter[Fault] = Counter()
        self.instead: Callable[[Request], bytes | None] = lambda request: None
        self.passed: Callable[[Request], Request] = lambda request: request
        self.received: Callable[[bytes], bytes] = bytes
        self._random, self._deck = random.Random(0), list[Fault]()
        self._orders: list[tuple[re.Pattern[str], Fault]] = []
        self._lock = threading.Lock()
        self._target = urlsplit(target).netloc
        self._server: ThreadingHTTPServer | None = None
        self._clients: list[socket.socket] = []
        self._port, self._hanging = 0, False
        self.come_back()
        self.url = f"http://127.0.0.1:{self._port}"

    def __exit__(self, *_: object) -> None:
        self.refuse()

    def inject(self, fault: Fault, pattern: str, times: int = 1) -> None:
        """Has the next requests in whose text the regular expression is found meet this fault, whatever the rate."""
        with self._lock:
            self._orders += [(re.compile(pattern), fault)] * times

    def forget(self) -> None:
        """Has no request meet a fault that was ordered by `inject`."""
        with self._lock:
            self._orders.clear()

    def refuse(self) -> None:
        """The bucket goes away: nobody listens, and what is under way breaks off."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        clients, self._clients = self._clients, []
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        """The bucket goes away: connections are taken, and nothing is answered on them any more."""
        self._hanging = True

    def come_back(self) -> None:
        """The bucket is there again, at the same address."""
        if self._hanging:
            self._hanging = False
            self.refuse()
        if self._server is None:
            self._server = _Server(("127.0.0.1", self._port), partial(_Handler, self))
            self._port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The bucket is away while the context lasts."""
        self.refuse()
        try:
            yield
        finally:
            self.come_back()

    def pass_on(self, client: socket.socket, request: Request) -> bool:
        """Answers one request; whether the connection lives on."""
        fault = self._fault_for(request)
        if fault is Fault.SILENCE or self._hanging:
            return _keep_silent(client)
        if fault is Fault.RESET:
            return _reset(client)
        if fault is not None and fault.isdecimal():
            client.sendall(_refusal(request, fault))
            return True
        if (said := self.instead(request)) is not None:
            client.sendall(said)
            return False
        request = self.passed(request)
        with closing(HTTPConnection(self._target)) as server:
            headers = {name: value for name, value in request.headers if name.lower() not in _HOP_BY_HOP}
            server.request(request.method, request.target, request.body, headers)
            answer = server.getresponse()
            body = self.received(answer.read())
        whole, half = len(body), len(body) // 2
        if self._hanging:
            return _keep_silent(client)
        if fault is None:
            # What an answer to HEAD says of a body that does not come.
            length = answer.getheader("Content-Length", "0") if request.method == "HEAD" else whole
            client.sendall(_head(answer, f"Content-Length: {length}") + body)
            return True
        if fault is Fault.LOST_ANSWER or answer.status in _BODILESS:
            return _reset(client)
        if fault is Fault.SHORT_CHUNKS:
            part = body[: half + 1]
            client.sendall(_head(answer, "Transfer-Encoding: chunked"))
            client.sendall(b"%x\r\n%b\r\n" % (len(part), part) if part else b"")
            return False
        client.sendall(_head(answer, f"Content-Length: {whole + 1}") + body[:half])
        return _keep_silent(client) if fault is Fault.SILENCE_MIDWAY else False

    def _fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests[request.method] += 1
            fault = None
            if order := next((order for order in self._orders if order[0].search(request.text)), None):
                self._orders.remove(order)
                fault = order[1]
            elif self._random.random() < self.rate:
                self._deck = self._deck or self._random.sample(list(Fault), len(Fault))
                fault = self._deck.pop()
            if request.method == "HEAD" and fault in (Fault.SILENCE_MIDWAY, Fault.SHORT, Fault.SHORT_CHUNKS):
                # Its answer has no body to be cut.
                fault = Fault.LOST_ANSWER
            if fault is not None:
                self.injected[fault] += 1
            return fault


class _Server(ThreadingHTTPServer):
    request_queue_size, block_on_close = 200, False

    def get_request(self) -> tuple[socket.socket, Any]:
        client, address = super().get_request()
        self.RequestHandlerClass.args[0]._clients.append(client)
        return client, address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultyProxy, *about: Any) -> None:
        self.proxy = proxy
        super().__init__(*about)

    def handle(self) -> None:
        with suppress(OSError, HTTPException):
            super().handle()

    def handle_one_request(self) -> None:
        self.raw_requestline, self.close_connection = self.rfile.readline(), True
        if self.raw_requestline and self.parse_request():
            # No client sends chunks.
            assert "Transfer-Encoding" not in self.headers, self.headers
            size_bytes = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size_bytes)
            request = Request(self.command, self.path, tuple(self.headers.items()), body)
            self.close_connection = len(body) < size_bytes or not self.proxy.pass_on(self.connection, request)


def _keep_silent(client: socket.socket) -> bool:
    """Until its client gives up; the connection does not live on."""
    until = time.monotonic() + SILENT_SECONDS
    client.settimeout(0.1)
    while time.monotonic() < until:
        with suppress(TimeoutError):
            if not client.recv(1 << 16):
                break
    return False


def _refusal(request: Request, fault: Fault) -> bytes:
    """Looks like Google's for a client of `STORAGE_EMULATOR_HOST`, and like S3's for any other."""
    body = (_BODIES["json" if "/storage/v1/" in request.target else "xml"] % int(fault)).encode()
    body = b"" if request.method == "HEAD" else body
    return f"HTTP/1.1 {fault} No\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _head(answer: HTTPResponse, framing: str) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
    return "\r\n".join([*lines, framing, "", ""]).encode("latin-1")


def _reset(client: socket.socket) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return False

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
from dataclasses import dataclass, replace
from enum import StrEnum
from http.client import HTTPConnection, HTTPException
from typing import BinaryIO
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


@dataclass(frozen=True)
class Answer:
    """One answer, whole."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: str
    """What an answer to HEAD says of a body that does not come."""


class FaultyProxy(AbstractContextManager["FaultyProxy"]):
    """A proxy on a port of its own, `url`, before the server at `target`.

    Attributes:
        rate: which part of the requests meets a fault; all kinds are dealt out before one comes again.
        requests: the requests that arrived so far, by method.
        injected: the faults so far.
        connections: the connections so far.
        instead: answers a request in the server's stead, if it returns bytes.
        passed: changes a request on its way to the server.
        received: changes the body of an answer on its way to the client.
    """

    def __init__(self, target: str) -> None:
        self.rate = 0.0
        self.requests: Counter[str] = Counter()
        self.injected: Counter[Fault] = Counter()
        self.connections = 0
        self.instead: Callable[[Request], bytes | None] = lambda request: None
        self.passed: Callable[[Request], Request] = lambda request: request
        self.received: Callable[[bytes], bytes] = bytes
        self._random, self._deck = random.Random(0), list[Fault]()
        self._orders: list[tuple[re.Pattern[str], Fault]] = []
        self._lock = threading.Lock()
        self._target = urlsplit(target).netloc
        self._open: set[socket.socket] = set()
        self._hanging = False
        self._listener: socket.socket | None = None
        self._listen(0)

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
        with self._lock:
            listener, self._listener = self._listener, None
            connections, self._open = self._open, set()
        for end in [*connections, *([listener] if listener else [])]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()

    def hang(self) -> None:
        """The bucket goes away: connections are taken, and nothing is answered on them any more."""
        self._hanging = True

    def come_back(self) -> None:
        """The bucket is there again, at the same address."""
        if self._hanging:
            self._hanging = False
            self.refuse()
        if self._listener is None:
            self._listen(self._port)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The bucket is away while the context lasts."""
        self.refuse()
        try:
            yield
        finally:
            self.come_back()

    def _listen(self, port: int) -> None:
        listener = socket.create_server(("127.0.0.1", port), backlog=200)
        self._port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with self._lock:
                    if self._listener is not listener:
                        client.close()
                        return
                    self._open.add(client)
                    self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, HTTPException), client.makefile("rb") as file:
            while (request := _read_request(client, file)) is not None and self._pass(client, request):
                pass
        with self._lock:
            self._open.discard(client)

    def _pass(self, client: socket.socket, request: Request) -> bool:
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
        answer = self._ask(self.passed(request))
        answer = replace(answer, body=self.received(answer.body))
        whole, half = len(answer.body), len(answer.body) // 2
        if self._hanging:
            return _keep_silent(client)
        if fault is None:
            length = answer.length if request.method == "HEAD" else whole
            client.sendall(_head(answer, f"Content-Length: {length}") + answer.body)
            return True
        if fault is Fault.LOST_ANSWER or answer.status in _BODILESS:
            return _reset(client)
        if fault is Fault.SHORT_CHUNKS:
            part = answer.body[: half + 1]
            client.sendall(_head(answer, "Transfer-Encoding: chunked"))
            client.sendall(b"%x\r\n%b\r\n" % (len(part), part) if part else b"")
            return False
        client.sendall(_head(answer, f"Content-Length: {whole + 1}") + answer.body[:half])
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

    def _ask(self, request: Request) -> Answer:
        with closing(HTTPConnection(self._target)) as server:
            server.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                if name.lower() not in _HOP_BY_HOP:
                    server.putheader(name, value)
            server.putheader("Content-Length", str(len(request.body)))
            server.endheaders(request.body)
            response = server.getresponse()
            length, body, headers = response.getheader("Content-Length"), response.read(), response.getheaders()
        return Answer(response.status, response.reason, tuple(headers), body, length or "0")


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


def _read_request(client: socket.socket, file: BinaryIO) -> Request | None:
    line = file.readline()
    if not line.strip():
        return None
    method, target, _ = line.decode("latin-1").split(" ", 2)
    headers: list[tuple[str, str]] = []
    while (line := file.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    named = {name.lower(): value for name, value in headers}
    if named.get("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    # No client sends chunks.
    assert "transfer-encoding" not in named, named
    size_bytes = int(named.get("content-length", 0))
    body = file.read(size_bytes)
    return Request(method, target, tuple(headers), body) if len(body) == size_bytes else None


def _head(answer: Answer, framing: str) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {value}" for name, value in answer.headers if name.lower() not in _HOP_BY_HOP]
    return "\r\n".join([*lines, framing, "", ""]).encode("latin-1")


def _reset(client: socket.socket) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return False

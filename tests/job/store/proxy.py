"""A line to a bucket on which what passes may be lost, changed, refused or answered by somebody else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from job.store import Store

Change = Callable[[bytes], bytes | None]


class Proxy:
    """A TCP proxy before the bucket: `request` and `answer` change what passes, or cut the line with None.

    `instead` may answer a request in the bucket's stead.
    """

    def __init__(self, target: str) -> None:
        self.request: Change = bytes
        self.answer: Change = bytes
        self.instead: Change = lambda data: None
        self._target = (urlsplit(target).hostname, urlsplit(target).port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pass_requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pass_answers, args=(client, server), daemon=True).start()

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), client, server:
            while data := client.recv(1 << 16):
                if (answer := self.instead(data)) is not None:
                    client.sendall(answer)
                    # A line that closes with bytes unread would take the answer with it.
                    while client.recv(1 << 16):
                        pass
                    break
                if (changed := self.request(data)) is None:
                    break
                server.sendall(changed)
            _hang_up(client, server)

    def _pass_answers(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while (data := server.recv(1 << 16)) and (changed := self.answer(data)) is not None:
                client.sendall(changed)
            _hang_up(client, server)


def _hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def once(change: Change, when: bytes) -> Change:
    """Applies `change` to the first piece of data in which `when` occurs."""
    lock, done = threading.Lock(), threading.Event()

    def apply(data: bytes) -> bytes | None:
        with lock:
            if done.is_set() or when not in data:
                return data
            done.set()
        return change(data)

    return apply


def lose_the_answer_to(proxy: Proxy, request: bytes) -> threading.Event:
    """Lets the next such request through, and cuts the line before its answer."""
    lost = threading.Event()
    armed = threading.Event()

    def watch(data: bytes) -> bytes:
        if not lost.is_set() and request in data:
            armed.set()
        return data

    def cut(data: bytes) -> bytes | None:
        if not armed.is_set() or lost.is_set():
            return data
        lost.set()
        return None

    proxy.request, proxy.answer = watch, cut
    return lost


def every_call(store: Store, file: Path) -> list[Callable[[], object]]:
    return [
        lambda: store.read("key"),
        lambda: store.create("key", b"1"),
        lambda: store.replace("key", b"1", "12345"),
        lambda: store.put("key", b"1"),
        lambda: store.upload(file, "key"),
        lambda: store.download("key", file.with_name("out")),
        lambda: store.open("key"),
        lambda: list(store.list()),
        lambda: store.folders(),
        lambda: store.delete("key"),
        lambda: store.exists("key"),
    ]

"""A slow connection to a server on this machine: what the server sends arrives at so many bytes a second."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

_PIECE_BYTES = 4096


@contextmanager
def slow_link(url: str, bytes_per_second: float) -> Iterator[str]:
    """URL that leads to the server at `url`, while the context lasts."""
    there = urlsplit(url)
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket, seconds_per_byte: float) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(_PIECE_BYTES):
                time.sleep(len(data) * seconds_per_byte)
                target.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((there.hostname, there.port))
                for ends in ((client, server, 0.0), (server, client, 1 / bytes_per_second)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        # Closing alone does not wake who waits in `accept`.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()

"""What the ranks say, on the launcher's stderr as they say it; the last lines are kept for the report of a failure."""

from __future__ import annotations

import os
import re
import selectors
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Queue

STDERR = 2
_TAIL_LINES = 20
_LINE_BYTES = 8192
_CLOSE_SECONDS = 2.0
_QUEUED_BYTES = 4 << 20
"""How much waits for the terminal; what comes then is dropped."""
_PIECE_BYTES = 200
"""What a piece of text takes besides its own bytes, or more."""
_OWN_PREFIX = re.compile(rb"\[rank\d+\]: ")
_ERROR = re.compile(rb"ddpm: ")
_BACKEND_NOISE = re.compile(rb"\[rank\d+\]:\[[A-Z]\d|frame #\d+: |terminate called|  what\(\): |Exception raised from ")
"""Lines with which torch's C++ side accompanies the end of a process group, a screenful per rank."""


@dataclass
class _Stream:
    rank: int
    descriptor: int
    speaks: bool
    pending: bytes = b""
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    ended: threading.Event = field(default_factory=threading.Event)


class Relay:
    """Reads the ranks' pipes in one thread and writes in another: neither the launcher nor a rank waits for a terminal.

    One that takes nothing more misses lines, in the end; it does not hold up a run, or its stop.
    The first rank of this machine speaks for all; lines of others begin with `[rank 1] `. Their errors are kept back
    until it is known which of them was the cause, and so is what a distributed backend prints while it goes down.
    """

    def __init__(self, *, is_alone: bool = False) -> None:
        """With `is_alone` there is one rank, and nothing that it says is kept back."""
        self._is_alone = is_alone
        self._streams: dict[int, _Stream] = {}
        self._outgoing, self._queued_bytes = Queue[bytes](), 0
        self._counting = threading.Lock()
        # A progress bar may stand in the line: what comes out takes its place, and the bar is drawn anew below.
        is_drawn_on = os.isatty(STDERR) and os.environ.get("TERM") != "dumb"
        self._line_start = b"\r\x1b[2K" if is_drawn_on else b""
        self._reader = threading.Thread(target=self._read, name="relay-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="relay-writer", daemon=True)

    def follow(self, rank: int, descriptor: int, *, speaks: bool) -> None:
        """Adds the reading end of a rank's pipe; before `start`. One of them speaks for all."""
        self._streams[rank] = _Stream(rank, descriptor, speaks)

    def start(self) -> None:
        """Begins to read and to write."""
        self._reader.start()
        self._writer.start()

    def say(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        self._show([text.encode(errors="backslashreplace")])

    def tail(self, rank: int) -> list[str]:
        """The last lines of a rank that has ended; none if it wrote to the terminal itself."""
        stream = self._streams.get(rank)
        if stream is None:
            return []
        # A process that the rank left behind may hold the pipe open for ever.
        stream.ended.wait(_CLOSE_SECONDS)
        return [line.decode(errors="replace") for line in list(stream.tail)]

    def close(self) -> None:
        """Waits until everything the ranks wrote has been read."""
        self._reader.join(_CLOSE_SECONDS)

    def flush(self) -> None:
        """Waits until everything has been shown, as far as the terminal takes it."""
        with self._outgoing.all_tasks_done:
            self._outgoing.all_tasks_done.wait_for(lambda: not self._outgoing.unfinished_tasks, _CLOSE_SECONDS)

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for stream in self._streams.values():
                selector.register(stream.descriptor, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    self._take(key.data, data)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        key.data.ended.set()

    def _take(self, stream: _Stream, data: bytes) -> None:
        *lines, stream.pending = (stream.pending + data).split(b"\n")
        if len(stream.pending) > _LINE_BYTES or (stream.pending and not data):
            lines.append(stream.pending)
            stream.pending = b""
        if not stream.speaks:
            lines = [_OWN_PREFIX.sub(b"", line, count=1) for line in lines]
        stream.tail += lines
        shown = lines if self._is_alone else [line for line in lines if not _BACKEND_NOISE.match(line)]
        if not stream.speaks:
            shown = [b"[rank %d] %b" % (stream.rank, line) for line in shown if not _ERROR.match(line)]
        self._show(shown)

    def _show(self, lines: list[bytes]) -> None:
        if lines:
            data = b"".join(self._line_start + line + b"\n" for line in lines)
            with self._counting:
                if self._queued_bytes > _QUEUED_BYTES:
                    return
                self._queued_bytes += len(data) + _PIECE_BYTES
            self._outgoing.put(data)

    def _write(self) -> None:
        while True:
            data = self._outgoing.get()
            taken_bytes = len(data) + _PIECE_BYTES
            # A terminal or a pipe that went away must not end a run.
            with suppress(OSError):
                while data:
                    data = data[os.write(STDERR, data) :]
            with self._counting:
                self._queued_bytes -= taken_bytes
            self._outgoing.task_done()

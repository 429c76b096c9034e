"""What the ranks print, on the launcher's stderr as it comes; the last lines are kept for the report of a failure."""

from __future__ import annotations

import os
import re
from collections import deque
from contextlib import suppress
from typing import IO

STDERR = 2
_TAIL_LINES = 20
_LINE_BYTES = 8192
_PIPE_BYTES = 1 << 20
"""More than a pipe holds: one read takes all that a dead rank has left behind."""
_OWN_PREFIX = re.compile(rb"\[rank\d+\]: ")
_ERROR = re.compile(rb"ddpm: ")
_BACKEND_NOISE = re.compile(rb"\[rank\d+\]:\[[A-Z]\d|frame #\d+: |terminate called|  what\(\): |Exception raised from ")
"""Lines with which torch's C++ side accompanies the end of a process group, a screenful per rank."""


class RankOutput:
    """One rank's pipe, for a selector.

    The first rank of this machine speaks for all; lines of others begin with `[rank 1] `. Their errors are kept back
    until it is known which of them was the cause, and so is what a distributed backend prints while it goes down.
    """

    def __init__(self, pipe: IO[bytes], rank: int, *, speaks: bool) -> None:
        """`speaks` is for the one that does so for all."""
        self._pipe, self._rank, self._speaks = pipe, rank, speaks
        self._unfinished, self._tail = b"", deque[bytes](maxlen=_TAIL_LINES)
        self.has_ended = False
        """Whether nobody can write any more; processes that a rank left behind may, for ever."""
        os.set_blocking(pipe.fileno(), False)

    def fileno(self) -> int:
        """Of the pipe."""
        return self._pipe.fileno()

    def take(self, *, is_last: bool = False) -> None:
        """Shows the lines that have come; `is_last` says that the rank is dead, whose last line may lack its end."""
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self.fileno(), _PIPE_BYTES)
            self.has_ended = not data
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if self._unfinished and (is_last or self.has_ended or len(self._unfinished) > _LINE_BYTES):
            lines.append(self._unfinished)
            self._unfinished = b""
        if not self._speaks:
            lines = [_OWN_PREFIX.sub(b"", line, count=1) for line in lines]
        self._tail += lines
        shown = [line for line in lines if not _BACKEND_NOISE.match(line)]
        if not self._speaks:
            shown = [b"[rank %d] %b" % (self._rank, line) for line in shown if not _ERROR.match(line)]
        _show(shown)

    def tail(self) -> list[str]:
        """The last lines, also those that were not shown."""
        return [line.decode(errors="replace") for line in self._tail]


def say(text: str) -> None:
    """Prints a line of the launcher's own."""
    _show([text.encode(errors="backslashreplace")])


def _show(lines: list[bytes]) -> None:
    # A progress bar may stand in the line: what comes out takes its place, and the bar is drawn anew below.
    begin = b"\r\x1b[2K" if os.isatty(STDERR) and os.environ.get("TERM") != "dumb" else b""
    data = b"".join(begin + line + b"\n" for line in lines)
    # A terminal or a pipe that went away must not end a run.
    with suppress(OSError):
        while data:
            data = data[os.write(STDERR, data) :]

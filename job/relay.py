"""Runs a command of the program for a Python program or a notebook: progress goes on, an error becomes an exception."""

from __future__ import annotations

import os
import pty
import re
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import ioctl
from types import FrameType

from job.exits import Exit, JobError, meaning
from job.processes.launcher import ENDS_WITH
from job.stop import STOP_SIGNALS

_TAIL_LINES = 20
_CHUNK_BYTES = 1 << 16
_LOOK_SECONDS = 5.0
_COLUMNS = 100
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run_command(words: Sequence[str], look: Callable[[], object] = bool) -> str:
    """Runs a command and returns its output; its messages and bars go to this process's stderr.

    An interrupt reaches the command, which saves; then this function raises `StoppedError`.

    Args:
        words: those after `ddpm`.
        look: called every few seconds, such as to show a new picture.

    Raises:
        JobError: the class and the message are those of the command's error.
        RuntimeError: it crashed or was killed; the message has its last lines.
    """
    command, has_bars = [sys.executable, "-P", "-m", "job", *words], in_notebook() or sys.stderr.isatty()
    ours, theirs = _terminal() if has_bars else os.pipe()
    environment = os.environ | {ENDS_WITH: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    output, shown = bytearray(), _Shown()
    with process, _signals_to(process), os.fdopen(ours, "rb", buffering=0), selectors.DefaultSelector() as selector:
        assert process.stdout
        readers: dict[int, Callable[[bytes], object]] = {process.stdout.fileno(): output.extend, ours: shown.add}
        for descriptor in readers:
            selector.register(descriptor, selectors.EVENT_READ)
        looked = time.monotonic()
        while selector.get_map():
            for key, _ in selector.select(1.0):
                data = b""
                # A terminal without a process at its other end is an error.
                with suppress(OSError):
                    data = os.read(key.fd, _CHUNK_BYTES)
                if data:
                    readers[key.fd](data)
                else:
                    selector.unregister(key.fd)
            if time.monotonic() - looked > _LOOK_SECONDS:
                look()
                looked = time.monotonic()
        code = process.wait()
    if code:
        raise _error(code, "\n".join(shown.error), "\n".join(shown.lines))
    look()
    return output.decode(errors="replace")


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def _terminal() -> tuple[int, int]:
    """Returns the two ends of a terminal as wide as ours, on which the program draws bars."""
    ours, theirs = pty.openpty()
    columns, rows = shutil.get_terminal_size((_COLUMNS, 24))
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return ours, theirs


class _Shown:
    """Shows what a command prints but its error, and keeps the last lines.

    Attributes:
        lines: the last lines.
        error: the lines from the first one on that begins with `ddpm: `.
    """

    def __init__(self) -> None:
        self.lines, self.error, self._unfinished = deque[str](maxlen=_TAIL_LINES), list[str](), ""
        # A read may end within a letter.
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._is_notebook = in_notebook()

    def add(self, data: bytes) -> None:
        """Takes output."""
        text = self._unfinished + self._decoder.decode(data).replace("\r\n", "\n")
        *lines, self._unfinished = text.split("\n")
        for line in lines:
            plain = _ESCAPES.sub("", line).rpartition("\r")[2]
            self.lines.append(plain)
            if self.error or plain.startswith("ddpm: "):
                self.error.append(plain.removeprefix("ddpm: "))
            else:
                self._show(f"{line}\n")
        if "\r" in self._unfinished:
            # A bar has no end of a line.
            self._show(self._unfinished)
            self._unfinished = ""

    def _show(self, text: str) -> None:
        if self._is_notebook:
            # It knows a carriage return, and no other way to erase a line.
            text = _ESCAPES.sub("", text.replace("\x1b[2K", f"{' ' * _COLUMNS}\r"))
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes the stop signals of this process on to a command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _error(code: int, said: str, last_lines: str) -> Exception:
    """Returns the exception of a command that ended with this code."""
    kinds = {kind.exit_code: kind for kind in reversed(JobError.__subclasses__())}
    if code not in (*Exit,):
        return RuntimeError(f"the command ended with {code} ({meaning(code)}); its last lines:\n{last_lines}")
    # Typer shows the usage before its error.
    said = said or " ".join(last_lines.rpartition("Error: ")[2].split())
    return kinds[Exit(code)](said) if code in kinds else JobError(said, Exit(code))

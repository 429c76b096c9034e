"""Progress of anything that takes longer than two seconds: a live bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress as rich_progress

LINE_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""
QUIET_SECONDS = 2.0
"""What is over sooner leaves no line behind."""
RATE_SECONDS = 60.0
"""The rate and the time left are those of the last minute: a slow start or a pause does not spoil them for long."""
SEPARATOR, NEWLINE = " · ", "\n"


def note(text: str) -> None:
    """Prints a line on stderr, above the bars if there are any."""
    # A terminal or a pipe that went away must not end a run.
    with suppress(OSError):
        if _live is not None:
            _live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def note_once(text: str) -> None:
    """As `note`, for what all processes of a group would say alike: the first one does."""
    if os.environ.get("RANK", "0") == "0":
        note(text)


class Progress:
    """How far something is, on stderr.

        with Progress("packing", total=24_000, unit="images") as bar:
            bar.update(done, loss="0.0213", epoch="3/80")

    Updates may come from any thread and as often as one likes. Bars may be nested: a terminal shows them one below the
    other.
    """

    def __init__(self, title: str, *, total: int | None = None, unit: str = "images", disable: bool = False) -> None:
        """Prepares a bar; nothing is shown before it is entered.

        Args:
            title: what is going on, in a word or two.
            total: when it will be done, in `unit`; None while that is not known.
            unit: what is counted, in the plural.
            disable: show nothing at all, notes included; for all processes but the first.
        """
        self.title, self.total, self._unit, self._disable = title, total, unit, disable
        self._lock = threading.Lock()
        self._fields: dict[str, str] = {}
        self._start = self.done = 0
        self._history = deque[tuple[float, int]]()
        self._over = threading.Event()
        self._drawn: rich_progress.TaskID | None = None
        self._lines: threading.Thread | None = None

    def started_at(self, done: int) -> Progress:
        """Sets what was done before, such as by an earlier attempt, and returns the bar: rates count from here."""
        self._start = self.done = done
        return self

    def update(self, done: int, *, total: int | None = None, **fields: str) -> None:
        """Notes what is done by now; what comes late from another thread does not turn it back.

        Args:
            done: how much is done, in units, what was done before included.
            total: the new total, if that has become known.
            **fields: what to show beside it, such as `loss="0.0213"`; each stays until it is replaced.
        """
        with self._lock:
            self.done = max(self.done, done)
            self.total = self.total if total is None else total
            self._fields |= fields
        if self._drawn is not None and _live is not None:
            _live.update(self._drawn, completed=self.done, total=self.total)

    def note(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        if not self._disable:
            note(text)

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._history.append((self._began, self.done))
        if self._disable:
            return self
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._drawn = _draw(self)
        else:
            self._lines = threading.Thread(target=self._print_lines, name=self.title, daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._disable:
            return
        self._over.set()
        if self._lines is not None:
            self._lines.join()
        if self._drawn is not None:
            _erase(self._drawn)
        seconds = time.monotonic() - self._began
        if seconds >= QUIET_SECONDS:
            stopped = "" if kind is None else "stopped at "
            took = f"{stopped}{self._counts()} in {_duration(seconds)}"
            note(f"{self.title}: {_joined(took, self._rate_text((self.done - self._start) / seconds))}")

    def _print_lines(self) -> None:
        while not self._over.wait(LINE_SECONDS):
            note(f"{self.title}: {self.details.replace(NEWLINE, SEPARATOR)}")

    @property
    def details(self) -> str:
        """How far it is, how fast, and how long it will take; in a second line what else is to be shown."""
        now = time.monotonic()
        with self._lock:
            done, total = self.done, self.total
            self._history.append((now, done))
            while len(self._history) > 2 and now - self._history[0][0] > RATE_SECONDS:
                self._history.popleft()
            then, before = self._history[0]
            rate = (done - before) / max(now - then, 1e-9)
            fields = [f"{name.replace('_', ' ')} {value}" for name, value in self._fields.items()]
        percent = f"{min(100, 100 * done // total)} %" if total else ""
        left = f"ETA {_duration((total - done) / rate)}" if total and rate > 0 else ""
        lines = (_joined(percent, self._counts(), self._rate_text(rate), left), _joined(*fields))
        return NEWLINE.join(filter(None, lines))

    def _counts(self) -> str:
        of_total = f"/{self.total:,}" if self.total and self.total != self.done else ""
        return f"{self.done:,}{of_total} {self._unit}"

    def _rate_text(self, rate: float) -> str:
        return f"{rate:,.0f} {self._unit}/s" if rate >= 100 else f"{rate:.3g} {self._unit}/s" if rate > 0 else ""


_live: rich_progress.Progress | None = None
"""All bars that a terminal shows: two displays would overwrite each other."""
_live_lock = threading.RLock()


def _draw(bar: Progress) -> rich_progress.TaskID:
    global _live
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as LiveProgress
    from rich.table import Column

    with _live_lock:
        if _live is None:
            the_rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            _live = LiveProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[bar].details}", markup=False, table_column=the_rest),
                expand=True,
                console=Console(stderr=True, force_terminal=True),
                refresh_per_second=5,
                # What goes to a file or a pipe must go on going there, not to the terminal.
                redirect_stdout=sys.stdout.isatty(),
            )
            _live.start()
        return _live.add_task(bar.title, total=bar.total, completed=bar.done, bar=bar)


def _erase(drawn: rich_progress.TaskID) -> None:
    global _live
    with _live_lock, suppress(OSError):
        assert _live is not None
        _live.remove_task(drawn)
        if not _live.tasks:
            live, _live = _live, None
            live.stop()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _joined(*parts: str) -> str:
    return SEPARATOR.join(part for part in parts if part)

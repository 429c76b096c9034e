"""Progress of anything that takes longer than two seconds: a live bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.live import Live

LINE_SECONDS = 30.0
QUIET_SECONDS = 2.0
"""What is over sooner leaves no line behind."""
RATE_SECONDS = 60.0
"""The rate and the time left are those of the last minute: a slow start or a pause does not spoil them for long."""
REFRESHES_PER_SECOND = 5.0
THIN_SPACE = "\u202f"


def note(text: str) -> None:
    """Prints a line on stderr, above the bars if there are any."""
    _SCREEN.print(text)


def note_once(text: str) -> None:
    """As `note`, for what all processes of a group would say alike: the first one does."""
    if os.environ.get("RANK", "0") == "0":
        note(text)


class Progress:
    """How far something is, on stderr.

        with Progress("packing", total=24_000, unit="images") as bar:
            bar.update(done, loss=0.0213, epoch="3/80")

    Updates only take notes, so they may come from any thread and as often as one likes; a thread of its own draws. Bars
    may be nested: a terminal shows them one below the other. A bar may be entered again, which starts its clock anew.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None = None,
        unit: str = "images",
        start: int = 0,
        disable: bool = False,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        """Prepares a bar; nothing is shown before it is entered.

        Args:
            title: what is going on, in a word or two.
            total: when it will be done, in `unit`; None while that is not known.
            unit: what is counted, in the plural.
            start: what was done before, such as by an earlier attempt; rates count from here.
            disable: show nothing at all, notes included; for all processes but the first.
            line_seconds: time between two lines where stderr is no terminal.
        """
        self._title, self._total, self._unit, self._disable = title, total, unit, disable
        self._line_seconds = line_seconds
        self._lock = threading.Lock()
        self._fields: dict[str, object] = {}
        self._over = threading.Event()
        self._lines: threading.Thread | None = None
        self.started_at(start)

    def started_at(self, done: int) -> Progress:
        """Sets what was done before, once it is known, and the clock to zero; returns the bar, to be entered."""
        with self._lock:
            self._start = self._done = done
            self._began = time.monotonic()
            self._history = deque([(self._began, done)])
        return self

    def update(self, done: int, *, total: int | None = None, **fields: object) -> None:
        """Notes what is done by now; what comes late from another thread does not turn it back.

        Args:
            done: how much is done, in units, what was done before included.
            total: the new total, if that has become known.
            **fields: what to show beside it, such as `loss=0.0213`; each stays until it is replaced. None removes it.
        """
        with self._lock:
            self._done = max(self._done, done)
            self._total = self._total if total is None else total
            self._fields.update(fields)

    def note(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        if not self._disable:
            _SCREEN.print(text)

    def __enter__(self) -> Progress:
        self.started_at(self._start)
        if self._disable:
            return self
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            _SCREEN.add(self)
        else:
            self._over.clear()
            self._lines = threading.Thread(target=self._print_lines, name=self._title, daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._disable:
            return
        if self._lines is not None:
            self._over.set()
            self._lines.join()
            self._lines = None
        _SCREEN.remove(self)
        elapsed = time.monotonic() - self._began
        if elapsed >= QUIET_SECONDS:
            with self._lock:
                rate = (self._done - self._start) / elapsed
                stopped = "" if kind is None else "stopped at "
                details = _joined(f"{stopped}{self._counts()} in {duration_text(elapsed)}", self._rate_text(rate))
            _SCREEN.print(f"{self._title}: {details}")

    def _print_lines(self) -> None:
        while not self._over.wait(self._line_seconds):
            _SCREEN.print(f"{self._title}: {_joined(*self._head(), *self._details())}")

    def _head(self) -> tuple[str, str]:
        with self._lock:
            percent = f"{min(100, 100 * self._done // self._total)}{THIN_SPACE}%" if self._total else ""
            return percent, self._counts()

    def _counts(self) -> str:
        of_total = f"/{count_text(self._total)}" if self._total and self._total != self._done else ""
        return f"{count_text(self._done)}{of_total} {self._unit}"

    def _rate_text(self, rate: float) -> str:
        text = count_text(round(rate)) if rate >= 100 else f"{rate:.3g}"
        return f"{text} {self._unit}/s" if self._done > self._start else ""

    def _details(self) -> list[str]:
        now = time.monotonic()
        with self._lock:
            self._history.append((now, self._done))
            while len(self._history) > 2 and now - self._history[0][0] > RATE_SECONDS:
                self._history.popleft()
            then, before = self._history[0]
            rate = (self._done - before) / max(now - then, 1e-9)
            left = "" if self._total is None or rate <= 0 else duration_text((self._total - self._done) / rate)
            fields = [f"{_words(name)} {_value(value)}" for name, value in self._fields.items() if value is not None]
            return [self._rate_text(rate), f"ETA {left}" if left else "", *fields]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws the bar: in one line if that fits, else with the details in a second one."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        title, head = Text(self._title, style="bold"), Text(_joined(*self._head(), separator="  "))
        details = Text(_joined(*self._details()), style="dim", no_wrap=True, overflow="ellipsis")
        free = options.max_width - title.cell_len - head.cell_len - 3
        in_one_line = free - details.cell_len >= 12
        width = max(4, min(40, free - details.cell_len if in_one_line else free))
        bar = ProgressBar(total=self._total, completed=self._done, width=width)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(title, bar, head, *([details] if in_one_line else []))
        yield row
        if not in_one_line:
            yield details


class _Screen:
    """The bars on the terminal, all in one live display: two displays would overwrite each other."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bars: list[Progress] = []
        self._live: Live | None = None

    def add(self, bar: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        with self._lock, suppress(OSError):
            self._bars = [*self._bars, bar]
            if self._live is None:
                self._live = Live(
                    console=Console(stderr=True, force_terminal=True),
                    get_renderable=self._render,
                    refresh_per_second=REFRESHES_PER_SECOND,
                    # What goes to a file or a pipe must go on going there, not to the terminal.
                    redirect_stdout=sys.stdout.isatty(),
                )
                self._live.start(refresh=True)

    def remove(self, bar: Progress) -> None:
        with self._lock, suppress(OSError):
            self._bars = [other for other in self._bars if other is not bar]
            if self._live is not None and not self._bars:
                live, self._live = self._live, None
                live.stop()

    def print(self, text: str) -> None:
        # A terminal or a pipe that went away must not end a run.
        with self._lock, suppress(OSError):
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def _render(self) -> Group:
        from rich.console import Group

        return Group(*self._bars)


_SCREEN = _Screen()


def count_text(number: int) -> str:
    """A number in groups of three digits, with thin spaces that do not break: 1 234 567."""
    return f"{number:,}".replace(",", THIN_SPACE)


def duration_text(seconds: float) -> str:
    """A duration in the units a person would use: `8 s`, `4 min 05 s`, `25 min`, `1 h 03 min`, `2 d 04 h`."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if whole < 60:
        return f"{whole} s"
    if minutes < 10:
        return f"{minutes} min {whole % 60:02d} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def _joined(*parts: str, separator: str = " · ") -> str:
    return separator.join(part for part in parts if part)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, int):
        return count_text(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)

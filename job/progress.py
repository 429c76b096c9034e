"""Progress of work that takes longer than two seconds: a live bar on a terminal, else a line every 30 s at most."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from rich import progress as rich_progress

LINE_SECONDS = 30.0
"""The shortest time between two lines on a stderr without a terminal."""
QUIET_SECONDS = 2.0
"""Shorter work prints no line."""
RATE_SECONDS = 30.0
"""The window of the rate and the remaining time, so that a slow start does not distort them for long."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LIKE_UNPRINTABLE = re.compile("%(?=25|7F|[0189A-F][0-9A-F])")
"""A percent sign that reads as one of `printable`, or of `printable_label`; not that of %20, as in URLs."""
_NAMED = 10
_lock = threading.RLock()
_is_verbose = _is_quiet = False
_bars: rich_progress.Progress | None = None
"""All bars of this process: two displays on one terminal would overwrite each other."""


def printable(text: str) -> str:
    """Returns text from outside as one line that is safe to print on a terminal.

    Bytes that are not UTF-8, control characters and direction marks become `%XX`, without backslashes. A backslash in a
    name would look like a separator of folders, and split off the name of a class.

    Raises:
        UnicodeError: it is not text.
    """
    return _UNPRINTABLE.sub(lambda match: quote(match[0], errors="surrogateescape"), text)


def printable_label(text: str) -> str:
    """Returns `printable` text, another one for each text: `a%01` becomes `a%2501`, and a byte 1 after an a `a%01`.

    For texts as a source has them, once: a second time would change them again.
    """
    return printable(_LIKE_UNPRINTABLE.sub("%25", text))


def some_of(names: Iterable[str]) -> str:
    """Returns the first names as one printable line, and the number of the others."""
    found = list(names)
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return ", ".join(map(printable, found[:_NAMED])) + more


def all_printable(document: Any) -> Any:
    """Returns a JSON or YAML document with all its texts made printable; for every document from a bucket."""
    match document:
        case str():
            return printable(document)
        case list():
            return [all_printable(value) for value in document]
        case dict():
            return {all_printable(key): all_printable(value) for key, value in document.items()}
    return document


def set_loudness(*, verbose: bool, quiet: bool) -> None:
    """Sets whether this process prints details, or nothing but errors, on stderr."""
    global _is_verbose, _is_quiet
    _is_verbose, _is_quiet = verbose, quiet


def shows_bars() -> bool:
    """Returns whether stderr is a terminal that takes bars, and nobody asked for quiet."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not _is_quiet


def detail(tell: Callable[[], str]) -> None:
    """Prints a line for `--verbose`; calls `tell` only then."""
    if _is_verbose:
        note(tell())


def note(text: str) -> None:
    """Prints a line on stderr, above any bars. Of several processes only the first one prints."""
    # A closed terminal or pipe must not end a run.
    with suppress(OSError):
        if _is_quiet or not _is_first():
            return
        if (bars := _bars) is not None and not bars.disable:
            bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of some work on stderr; of several processes only the first one shows it.

        with Progress("packing", total=24_000, unit="images") as bar:
            bar.update(done, loss="0.0213", epoch="3/80")

    Updates may come from any thread, at any rate. Bars may be nested: a terminal shows them one below the other.
    """

    def __init__(self, title: str, *, total: int | None = None, unit: str = "images", start: int = 0) -> None:
        """Prepares a bar, which appears when its context is entered.

        Args:
            title: the name of the work, one or two words.
            total: the amount of all work, in `unit`; None while it is unknown.
            unit: the unit, in the plural.
            start: the amount of earlier attempts: rates count from there.
        """
        self._title, self._total, self._unit, self._start = title, total, unit, start
        self._began = self._line_due = 0.0
        self._task: rich_progress.Task | None = None

    def update(self, done: float, *, total: int | None = None, **fields: str) -> None:
        """Moves the bar forward; a late update from another thread does not move it back.

        Args:
            done: the finished amount in units, with that of earlier attempts.
            total: the total, if it has become known.
            **fields: values to show beside it, such as `loss="0.0213"`; each stays until its next value.
        """
        with _lock:
            if _bars is None or self._task is None:
                return
            self._task.fields.update(fields)
            _bars.update(self._task.id, completed=max(done, self._task.completed), total=total)
            if _bars.disable and time.monotonic() >= self._line_due:
                self._line_due = time.monotonic() + LINE_SECONDS
                note(f"{self._title}: {_details(self._task, ' · ')}")

    def __enter__(self) -> Progress:
        global _bars
        with _lock:
            if _is_first() and not _is_quiet:
                if _bars is None:
                    _bars = _new_bars()
                    _bars.start()
                begun: dict[str, Any] = {"completed": self._start, "before": self._start, "unit": self._unit}
                _bars.add_task(self._title, total=self._total, **begun)
                self._task = _bars.tasks[-1]
        self._began = time.monotonic()
        # The first line comes soon: an empty log looks like that of a job that hangs.
        self._line_due = self._began + min(QUIET_SECONDS, LINE_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _bars
        if self._task is None:
            return
        with _lock, suppress(OSError):
            task, self._task = self._task, None
            assert _bars is not None
            _bars.remove_task(task.id)
            if not _bars.tasks:
                bars, _bars = _bars, None
                bars.stop()
        seconds = time.monotonic() - self._began
        if seconds >= QUIET_SECONDS:
            done, stopped = task.completed - self._start, "" if kind is None else "stopped after "
            took = f"{self._title}: {stopped}{done:,.0f} {self._unit} in {_duration(seconds)}"
            in_all = f"{_of_total(task)} in all" if done != (task.total or task.completed) else ""
            note(" · ".join(filter(None, (took, _rate_text(done / seconds, self._unit), in_all))))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _new_bars() -> rich_progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Details(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_details(task, "\n"))

    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),
        Details(Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        expand=True,
        console=Console(stderr=True),
        refresh_per_second=5,
        speed_estimate_period=RATE_SECONDS,
        # Output for a file or a pipe must not go to the terminal.
        redirect_stdout=sys.stdout.isatty(),
        disable=not shows_bars(),
    )


def _details(task: rich_progress.Task, beside: str) -> str:
    """Returns progress, rate and remaining time as text; the other fields follow after `beside`."""
    percent = f"{min(100, int(task.percentage))} %" if task.total else ""
    # If one update takes longer than the window of the rate, the average of all time replaces it.
    rate = task.speed or (task.completed - task.fields["before"]) / (task.elapsed or 1)
    left = f"ETA {_duration(task.remaining / rate)}" if rate > 0 and task.remaining is not None else ""
    counts = f"{_of_total(task)} {task.fields['unit']}"
    how_far = filter(None, (percent, counts, _rate_text(rate, task.fields["unit"]), left))
    # A copy, because another thread may add fields during the loop.
    fields = dict(task.fields).items()
    more = (f"{name.replace('_', ' ')} {value}" for name, value in fields if name not in ("unit", "before"))
    return beside.join(filter(None, (" · ".join(how_far), " · ".join(more))))


def _of_total(task: rich_progress.Task) -> str:
    of_total = f"/{task.total:,.0f}" if task.total and task.total != task.completed else ""
    return f"{task.completed:,.0f}{of_total}"


def _rate_text(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s" if rate > 0 else ""


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

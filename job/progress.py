"""Progress of work that takes longer than two seconds: a live bar on a terminal, else a line every 30 s at most."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import quote

LINE_SECONDS = 30.0
"""The shortest time between two lines on a stderr without a terminal."""
QUIET_SECONDS = 2.0
"""Shorter work prints no line."""
REDRAW_SECONDS = 0.2
"""The shortest time between two states of a bar on a terminal."""
RATE_SECONDS = 30.0
"""The window of the rate and the remaining time, so that a slow start does not distort them for long."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LIKE_UNPRINTABLE = re.compile("%(?=25|7F|[0189A-F][0-9A-F])")
"""A percent sign that reads as one of `printable`, or of `printable_label`; not that of %20, as in URLs."""
_NAMED = 10
_ERASE = "\r\x1b[2K"
"""Erases the line of a terminal."""
_lock = threading.RLock()
_is_verbose = _is_quiet = False
_open_bars: list[Progress] = []
"""Those on a terminal, the innermost last."""


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
    """Prints a line on stderr, in the place of a bar; of several processes only the first one prints."""
    # A closed terminal or pipe must not end a run.
    with suppress(OSError):
        if not _is_quiet and _is_first():
            print(f"{_ERASE * bool(_open_bars)}{text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints a result on stdout while a bar may be open."""
    if _open_bars:
        print(_ERASE, end="", file=sys.stderr, flush=True)
    print(text)


class Progress:
    """Shows the progress of some work on stderr; of several processes only the first one shows it.

        with Progress("packing", total=24_000, unit="images") as bar:
            bar.update(done, loss="0.0213", epoch="3/80")

    Updates may come from any thread, at any rate. Of nested bars a terminal shows the innermost one.
    """

    def __init__(self, title: str, *, total: int | None = None, unit: str = "images", start: int = 0) -> None:
        """Prepares a bar, which appears with its first update.

        Args:
            title: the name of the work, one or two words.
            total: the amount of all work, in `unit`; None while it is unknown.
            unit: the unit, in the plural.
            start: the amount of earlier attempts: rates count from there.
        """
        self._title, self._total, self._unit, self._start = title, total, unit, start
        self._done, self._fields = float(start), dict[str, str]()
        self._began = self._line_due = 0.0
        self._seen = deque[tuple[float, float]]()
        self._is_shown = False

    def update(self, done: float, *, total: int | None = None, **fields: str) -> None:
        """Moves the bar forward; a late update from another thread does not move it back.

        Args:
            done: the finished amount in units, with that of earlier attempts.
            total: the total, if it has become known.
            **fields: values to show beside it, such as `loss="0.0213"`; each stays until its next value.
        """
        with _lock, suppress(OSError):
            if not self._is_shown:
                return
            now = time.monotonic()
            self._done, self._total = max(done, self._done), self._total if total is None else total
            self._fields |= fields
            if now - self._seen[-1][0] >= REDRAW_SECONDS:
                self._seen.append((now, self._done))
            while len(self._seen) > 1 and self._seen[0][0] < now - RATE_SECONDS:
                self._seen.popleft()
            if now < self._line_due:
                return
            text = f"{self._title}: {self._details(now)}"
            if not shows_bars():
                self._line_due = now + LINE_SECONDS
                note(text)
            elif _open_bars[-1:] == [self]:
                self._line_due = now + REDRAW_SECONDS
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
                text = text if len(text) < columns else f"{text[: columns - 2]}…"
                print(f"{_ERASE}{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._is_shown = _is_first() and not _is_quiet
        self._began = time.monotonic()
        self._seen.append((self._began, self._done))
        # The first line comes soon: an empty log looks like that of a job that hangs.
        self._line_due = self._began + (0 if shows_bars() else min(QUIET_SECONDS, LINE_SECONDS))
        if self._is_shown and shows_bars():
            _open_bars.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _lock, suppress(OSError):
            if self in _open_bars:
                print(_ERASE, end="", file=sys.stderr, flush=True)
                _open_bars.remove(self)
            seconds = time.monotonic() - self._began
            if self._is_shown and seconds >= QUIET_SECONDS:
                done, stopped = self._done - self._start, "" if kind is None else "stopped after "
                took = f"{self._title}: {stopped}{done:,.0f} {self._unit} in {_duration(seconds)}"
                in_all = f"{self._of_total()} in all" if done != (self._total or self._done) else ""
                note(" · ".join(filter(None, (took, _rate_text(done / seconds, self._unit), in_all))))
            self._is_shown = False

    def _details(self, now: float) -> str:
        """Returns progress, rate, remaining time and the other fields as text."""
        percent = f"{min(100, int(100 * self._done / self._total))} %" if self._total else ""
        since, before = self._seen[0]
        if since == now:
            # One update takes longer than the window of the rate.
            since, before = self._began, self._start
        rate = (self._done - before) / (now - since or 1)
        left = f"ETA {_duration((self._total - self._done) / rate)}" if rate > 0 and self._total is not None else ""
        fields = (f"{name.replace('_', ' ')} {value}" for name, value in self._fields.items())
        counts = f"{self._of_total()} {self._unit}"
        return " · ".join(filter(None, (percent, counts, _rate_text(rate, self._unit), left, *fields)))

    def _of_total(self) -> str:
        of_total = f"/{self._total:,.0f}" if self._total and self._total != self._done else ""
        return f"{self._done:,.0f}{of_total}"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _rate_text(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s" if rate > 0 else ""


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

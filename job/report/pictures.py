"""Pictures small enough that all of a run's fit into one page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from job.exits import BadDataError, JobError
from job.report.small import MEMORY_BYTES, SECONDS
from job.store import Store

GRIDS = 60
"""On a page, at most: of more, as many as that, evenly spaced."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 36_000, 400_000, 600_000, 150_000
"""Of a picture, at most: all of them together, as base64, leave a page below 5 MB."""
WIDEST_PIXELS = 1200
MOST_FILE_BYTES = 1 << 27
"""Of a picture in a bucket."""


class Shelf:
    """Pictures as data URIs, each read and made small once: none changes under its name while a run goes.

    They are decoded in a process of its own, for whatever somebody put in the place of a picture must not cost a
    training its memory, its time or its life. As a context it ends that process; the next picture starts another.

    Attributes:
        missing: why a page is without a picture, by its URI.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is told what could not be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()
        self.missing = dict[str, str]()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:
                pass

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """An object's picture; empty for one that is not there, or cannot be read."""

        def data() -> bytes:
            with store.open(key) as file:
                return file.read(MOST_FILE_BYTES + 1)

        return self.made((store.uri_of(key), most_bytes, widest_pixels), data)

    def made(self, name: tuple[str, int, int], data: Callable[[], bytes]) -> str:
        """A picture by what tells it from all others: where it is from, its bytes at most, and its widest pixels."""
        if name not in self._made:
            self.missing.pop(name[0], None)
            try:
                self._made[name] = self._small(data(), *name[1:])
            except Exception as error:
                # Whatever somebody put in the place of a picture is none, which is no reason for a page to fail.
                self.missing[name[0]] = str(error) or type(error).__name__
                self._say(f"the page is without {name[0]}: {self.missing[name[0]]}")
                if isinstance(error, JobError) and not isinstance(error, BadDataError):
                    return ""
                # It would be the same again.
                self._made[name] = ""
        return self._made[name]

    def _small(self, data: bytes, most_bytes: int, widest_pixels: int) -> str:
        """See `small.small`.

        Raises:
            BadDataError: it is no picture, or one that is too large.
        """
        if len(data) > MOST_FILE_BYTES:
            raise BadDataError(f"it has more than {MOST_FILE_BYTES:,} bytes")
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-P", "-m", "job.report.small"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the program that asks.
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(b"%d %d %d\n%b" % (len(data), most_bytes, widest_pixels, data))
            process.stdin.flush()
        if not (line := process.stdout.readline()):
            self.__exit__(None, None, None)
            raise BadDataError(f"it takes more than {SECONDS} s or {MEMORY_BYTES:,} bytes of memory")
        answer = json.loads(line)
        if why := answer.get("why"):
            raise BadDataError(why)
        return str(answer["src"])


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]

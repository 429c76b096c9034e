"""Pictures small enough that all of a run's fit into one page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen

from job.exits import BadDataError, JobError
from job.report.small import MEMORY_BYTES, SECONDS
from job.store import Store

GRIDS = 60
"""On a page, at most: of more, as many as that, evenly spaced."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 36_000, 400_000, 600_000, 150_000
"""Of a picture, at most: all of them together, as base64, leave a page below 5 MB."""
WIDEST_PIXELS = 1200
MOST_FILE_BYTES = 1 << 27
"""A longer object is read up to here, and so counts as truncated."""


class PictureCache:
    """Pictures as data URIs, each read and made small once: none changes under its name while a run goes.

    Another process decodes them: a damaged or hostile file must not cost a training its memory, its time or its life.

    Attributes:
        missing: why a page is without a picture, by its URI.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is told what could not be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()
        self.missing = dict[str, str]()
        self._process: Popen[bytes] | None = None

    def close(self) -> None:
        """Ends that process; the next picture starts another."""
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError), self._process:
                self._process = None

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """An object's picture; empty for one that is not there, or cannot be read."""

        def data() -> bytes:
            with store.open(key) as file:
                return file.read(MOST_FILE_BYTES)

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
                if isinstance(error, BadDataError) or not isinstance(error, JobError | OSError):
                    # It would be the same again.
                    self._made[name] = ""
        return self._made.get(name, "")

    def _small(self, data: bytes, most_bytes: int, widest_pixels: int) -> str:
        """See `small.small`.

        Raises:
            BadDataError: it cannot be shown.
        """
        if (child := self._process) is None:
            command = [sys.executable, "-X", "utf8", "-P", "-c", "from job.report.small import main; main()"]
            # Ctrl-C is for the program that asks.
            child = self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True)
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.writelines((b"%d %d %d\n" % (len(data), most_bytes, widest_pixels), data))
            child.stdin.flush()
        if not (answer := child.stdout.readline().decode().strip()):
            self.close()
            raise BadDataError(f"it takes more than {SECONDS} s or {MEMORY_BYTES:,} bytes of memory, or ends a decoder")
        if not answer.startswith("data:"):
            raise BadDataError(answer)
        return answer


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]

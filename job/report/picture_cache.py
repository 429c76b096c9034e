"""Pictures as data URIs, small enough that all of a run's pictures fit into one page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen

from job.exits import BadDataError, JobError
from job.report.shrink import MEMORY_BYTES, SECONDS
from job.store import Store

GRIDS = 60
"""The largest number of grids on a page; of more, evenly spaced ones are chosen."""
OWN_PICTURES = 12
"""The largest number of pictures of `ddpm sample` on a page; it has links to the others."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 28_000, 400_000, 600_000, 150_000
"""Size limits of the pictures, by which a page with all of them, as base64, stays below 5 MB."""
ALL_OWN_BYTES, OWN_BYTES = 600_000, 150_000
"""Those of all pictures of `ddpm sample` together, and of one."""
WIDEST_PIXELS = 1200
MOST_FILE_BYTES = 1 << 27
"""The limit of reading: a longer object counts as truncated."""


class PictureCache:
    """A cache of pictures as data URIs, each read and shrunk once: pictures keep their names while a run trains.

    Another process decodes them, so that a damaged or hostile file cannot exhaust the memory or time of training, or
    crash it.

    Attributes:
        missing: the reasons why pictures are missing, by URI.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Makes an empty cache; `say` receives messages about pictures that cannot be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()
        self.missing = dict[str, str]()
        self._process: Popen[bytes] | None = None

    def close(self) -> None:
        """Ends the decoding process; the next picture starts another."""
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError), self._process:
                self._process = None

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """Returns the picture in an object; empty if it is missing or cannot be read."""

        def data() -> bytes:
            with store.open(key) as file:
                return file.read(MOST_FILE_BYTES)

        return self.made((store.uri_of(key), most_bytes, widest_pixels), data)

    def made(self, name: tuple[str, int, int], data: Callable[[], bytes]) -> str:
        """Returns the picture of a name (its source, and the limits of bytes and width); calls `data` if it is new."""
        if name not in self._made:
            self.missing.pop(name[0], None)
            try:
                self._made[name] = self._shrunk(data(), *name[1:])
            except Exception as error:
                # A picture that cannot be shown must not fail the page.
                self.missing[name[0]] = str(error) or type(error).__name__
                self._say(f"the page is without {name[0]}: {self.missing[name[0]]}")
                if isinstance(error, BadDataError) or not isinstance(error, JobError | OSError):
                    # A second attempt would fail in the same way.
                    self._made[name] = ""
        return self._made.get(name, "")

    def _shrunk(self, data: bytes, most_bytes: int, widest_pixels: int) -> str:
        """Shrinks a picture in the decoding process; see `shrink.shrunk`.

        Raises:
            BadDataError: the picture cannot be shown.
        """
        if (child := self._process) is None:
            command = [sys.executable, "-X", "utf8", "-P", "-c", "from job.report.shrink import main; main()"]
            # A new session, so that Ctrl-C ends only this program.
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
    """Returns at most `most` indices, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]

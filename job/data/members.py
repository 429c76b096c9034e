"""What every source of images is: an ordered stream of named files, refused as a whole if it is unsafe or damaged.

Archives come from strangers. Nothing is ever extracted to a disk, yet a name that leads outside, a link, or kilobytes
that unpack to terabytes mean that an archive is not what its user takes it for.
"""

from __future__ import annotations

import abc
import hashlib
import lzma
import math
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeVar

import numpy as np

from job.exits import BadDataError, MissingInputError, NoPermissionError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
ENTRY_BYTES = 256 * 1024 * 1024
"""Largest image file that is read."""
EXPANSION = 200
"""How many times larger than the archive its content may be. Images hardly compress; deflate alone reaches 1,032."""

_NO_TEXT = re.compile(r"[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RefusedError(Exception):
    """Why a file is not acceptable, as the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source, before its content is read."""

    name: str
    read: Callable[[], bytes] | None = None
    """None for a folder."""
    problem: str = ""
    """Why this member makes the whole source unacceptable."""
    offset: int = -1
    """Of a tar's file: where its content begins."""


class Source(abc.ABC):
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.
    """

    channels = 3
    """What its images are packed to unless somebody chooses."""
    readers = 1
    """Threads that read ahead; more than one where members can be read in any order and reading them means waiting."""

    def __init__(self, where: str) -> None:
        """`where` is the path or URI that messages name."""
        self.where = where
        self.name = printable(where.rstrip("/").rpartition("/")[2])
        self.note = ""
        """What a person should know about how the source was understood."""
        self.limit_bytes = math.inf
        """How much may come out of it; archives set it when they are opened."""

    @abc.abstractmethod
    def members(self) -> Iterator[Member]:
        """All files in order; each can be read until the next one is asked for."""

    def names(self) -> Iterator[str]:
        """Relative paths of the images, in order; reads no more than that takes, or twice that if names are equal."""
        # Eight bytes per name, so that memory hardly grows with the source.
        hashes = array("Q")
        for name, _ in self._images():
            hashes.append(_hash(name))
            yield name
        values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        if suspects := set(values[counts > 1].tolist()):
            self._refuse_equal(name for name, _ in self._images() if _hash(name) in suspects)

    def _refuse_equal(self, names: Iterable[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise BadDataError(
                    f"{self.where} has the entry {name!r} more than once, and nobody knows which is meant: "
                    "do not trust this archive"
                )
            seen.add(name)

    def entries(self) -> Iterator[tuple[str, bytes]]:
        """Relative paths and contents of the images, in order."""
        unpacked_bytes = 0
        for name, content in self._loaded():
            unpacked_bytes += len(content)
            if unpacked_bytes > self.limit_bytes:
                raise BadDataError(
                    f"{self.where} unpacks to more than {EXPANSION} times its size (at entry {name!r}): "
                    "do not trust this archive"
                )
            yield name, content

    def _loaded(self) -> Iterator[tuple[str, bytes]]:
        if self.readers == 1:
            yield from map(self._load, self._images())
        else:
            with ThreadPoolExecutor(self.readers) as pool:
                yield from in_order(pool, self._load, self._images(), window=2 * self.readers)

    def _images(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name, member in self.checked_members():
            if member.read is not None and is_image(name):
                yield name, member.read

    def checked_members(self) -> Iterator[tuple[str, Member]]:
        """All members with their names in plain form; each can be read until the next one is asked for."""
        with refusing(self.where):
            for member in self.members():
                parts = path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if member.problem:
                    raise RefusedError(f"has the entry {member.name!r}, which {member.problem}")
                yield printable("/".join(part for part in parts if part not in ("", "."))), member

    def _load(self, image: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes]:
        name, read = image
        with refusing(f"{self.where}: entry {name!r}"):
            return name, read()


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turns whatever a damaged file, archive or folder can cause into one clear error that begins with `where`.

    Raises:
        BadDataError: damaged or refused.
        MissingInputError: gone.
        NoPermissionError: not readable by this user.
    """
    try:
        yield
    except RefusedError as error:
        raise BadDataError(f"{where} {error}") from None
    except FileNotFoundError:
        raise MissingInputError(f"{where} is not there (any more)") from None
    except PermissionError:
        raise NoPermissionError(f"{where} may not be read by this user: change its permissions") from None
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error) as error:
        raise BadDataError(f"{where} is truncated or damaged ({error}): get it again") from None
    # zipfile raises RuntimeError and ValueError for directories that make no sense, gzip EOFError, bz2 OSError.
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        raise BadDataError(f"{where} cannot be read ({error}): get it again") from None


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, which must be there; no header is trusted with more memory than an image may take.

    Raises:
        RefusedError: fewer bytes, more in a file that should end here, or too many.
    """
    if size > ENTRY_BYTES:
        raise RefusedError(f"unpacks to {size} bytes, more than the {ENTRY_BYTES} that an image may have")
    content = file.read(size)
    if len(content) != size:
        raise RefusedError(f"has {len(content)} bytes where {size} were promised: it is truncated or damaged")
    return content


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], window: int
) -> Iterator[_Result]:
    """`pool.map` that takes items only `window` ahead of what it yields, so that memory does not grow with them."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def path_parts(name: str) -> tuple[str, ...]:
    """Components of a relative path; archives made on Windows may separate them by backslashes."""
    return tuple(name.replace("\\", "/").split("/"))


def is_image(name: str) -> bool:
    """Whether the name says that this is an image a person meant to keep: no hidden file, no macOS litter."""
    *folders, base = path_parts(name)
    _, dot, suffix = base.rpartition(".")
    return f"{dot}{suffix.lower()}" in SUFFIXES and not any(map(is_litter, [*folders, base]))


def is_litter(component: str) -> bool:
    """Whether an operating system or program put it there: hidden files, and the resource forks of macOS."""
    return component.startswith(".") or component == "__MACOSX"


def printable(name: str) -> str:
    """The name as one line of valid Unicode: bytes that are not UTF-8, and control characters, become `%xx`.

    Backslashes would be taken for separators of folders, and what follows them for names of classes.
    """
    text = name.encode(errors="surrogateescape").decode(errors="surrogateescape")
    text = _NO_TEXT.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02x}", text)
    return _CONTROL.sub(lambda match: f"%{ord(match[0]):02x}", text)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())

"""The files of a source, and the errors that refuse it: an archive from a stranger may be unsafe or damaged."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

from job.exits import BadDataError, MissingInputError, NoPermissionError

SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
ENTRY_BYTES = 256 * 1024 * 1024
"""Largest image file that is read."""
TABLE_BYTES = 128 * 1024 * 1024
"""Largest table of labels that is read: twice ImageNet's, in which the names of 1.3 million images are long."""
EXPANSION = 200
"""How many times larger than the archive its content may be. Images hardly compress; deflate alone reaches 1,032."""
Opener = Callable[[], BinaryIO]
"""Opens a file from its beginning, as a seekable stream; may be called several times."""

_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)


class RefusedError(Exception):
    """The reason why a file is refused, as the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source, before its content is read.

    Attributes:
        name: its relative path.
        read: returns its content.
        offset: position of the content in a tar.
        size_bytes: size of the content; 0 where the name decides it.
        label: the name of its class, if the format has one.
    """

    name: str
    read: Callable[[], bytes]
    offset: int = -1
    size_bytes: int = 0
    label: str = ""


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turns every error of a damaged file, archive or folder into one clear error that begins with `where`.

    Raises:
        BadDataError: it is damaged or refused.
        MissingInputError: it does not exist any more.
        NoPermissionError: this user may not read it.
    """
    try:
        yield
    except RefusedError as error:
        raise BadDataError(f"{where} {error}") from None
    except FileNotFoundError:
        raise MissingInputError(f"{where} is not there (any more)") from None
    except PermissionError:
        raise NoPermissionError(f"{where} may not be read by this user: change its permissions") from None
    # zipfile raises RuntimeError and ValueError for wrong fields and passwords, gzip EOFError, bz2 OSError; tarfile
    # IndexError for a truncated sparse file, and OverflowError for a size beyond all machines.
    except (*_DAMAGES, EOFError, OSError, RuntimeError, ValueError, IndexError, OverflowError) as error:
        raise BadDataError(f"{where} is truncated or damaged ({error}): get it again") from None


def path_parts(name: str) -> tuple[str, ...]:
    """Returns the components of a relative path; archives made on Windows may separate them by backslashes."""
    return tuple(name.replace("\\", "/").split("/"))


def is_image(name: str) -> bool:
    """Returns whether the name is that of an image, and not of a hidden file."""
    _, dot, suffix = path_parts(name)[-1].rpartition(".")
    return f"{dot}{suffix.lower()}" in SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Returns whether the name is that of a hidden file or of a resource fork of macOS."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in path_parts(name))


def refused(name: str, problem: str) -> RefusedError:
    """Returns the error that a source has this entry."""
    return RefusedError(f"has the entry {name!r}, which {problem}")


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """Returns the next `size` bytes. A wrong size in a header cannot take more memory than the largest image file."""
    check_size(size)
    content = file.read(size)
    if len(content) != size:
        raise RefusedError(f"has {len(content):,} bytes where {size:,} were promised: it is truncated or damaged")
    return content


def check_size(size: int, most_bytes: int = 0, what: str = "an image") -> None:
    """Raises `RefusedError` for more bytes than a file of this kind may have; by default an image file."""
    if size > (most_bytes := most_bytes or ENTRY_BYTES):
        raise RefusedError(f"has {size:,} bytes, more than the {most_bytes:,} that {what} may have")


def read_table(file: BinaryIO) -> bytes:
    """Returns the content of a file that may be a table of labels; raises `RefusedError` if it is too large."""
    check_size(file.seek(0, io.SEEK_END), TABLE_BYTES, "a table of labels")
    file.seek(0)
    return file.read()


def unpacked(file: BinaryIO) -> tuple[BinaryIO, int]:
    """Returns the content of a file that may be gzipped, and how many bytes it may have."""
    limit_bytes = max(ENTRY_BYTES, EXPANSION * file.seek(0, io.SEEK_END))
    file.seek(0)
    is_gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file, limit_bytes

"""A source of images: an ordered stream of named files, from a folder, an archive or a file of many images.

One unsafe or damaged file refuses the whole source: a path that leads outside, a link, or kilobytes that unpack to
terabytes show that an archive is not what its user expects.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from job.data.source.formats import FORMATS
from job.exits import BadDataError, MissingInputError, NoPermissionError
from job.progress import printable
from job.stop import in_order

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
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
"""Suffixes of the archives of which a folder may consist."""
EXPANDS = f"unpacks to more than {EXPANSION} times its size: do not trust this archive"
Opener = Callable[[], BinaryIO]
"""Opens a file from its beginning, as a seekable stream; may be called several times."""
ALL = "all"
"""The word for all splits of a source together."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
"""The split that each word names."""

_DATA_FILE = re.compile(rf"(?:\.(?:zip|tar|tgz)|{'|'.join(filter(None, FORMATS.values()))})(?:\.gz)?$", re.IGNORECASE)
"""Files that hold many images: a part of an image's name, but never a class."""
_REASON_CHARACTERS = 160
_SMALL_BYTES = 1 << 24
"""A file of an archive may have as many bytes, however small the archive is."""
_DAMAGES = (csv.Error, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
_FORK = re.compile(r"(^|/)(__MACOSX/|\._)")
"""A resource fork, which macOS adds beside each file under the same suffix."""
_SUFFIXES_NAMED = 20
_TABLES = (".csv", ".tsv", ".jsonl")
_WORD = "|".join(SPLITS)
# trainA and trainB are CycleGAN's; train2017 is COCO's, seg_train Kaggle's.
_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_. ]?)?({_WORD})(?:[-_. ]?val)?"
    r"[-_. ]?(?:set|data|split|images?|imgs?|jpe?g|png|tiff?|mini|full|[ab]|\d+)?",
    re.IGNORECASE,
)
# imagenet-train-00000.tar, train-00000-of-00001.parquet
_FILE = re.compile(rf"(?:^|[-_. ])({_WORD})(?=[-_. ]|\d|$)", re.IGNORECASE)


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
        reason = " ".join(str(error).split())[:_REASON_CHARACTERS]
        raise BadDataError(f"{where} is truncated or damaged ({reason}): get it again") from None


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


def unpacked(file: BinaryIO) -> tuple[BinaryIO, int]:
    """Returns the content of a file that may be gzipped, and how many bytes it may have."""
    limit_bytes = max(ENTRY_BYTES, EXPANSION * file.seek(0, io.SEEK_END))
    file.seek(0)
    is_gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file, limit_bytes


def opened_zip(file: BinaryIO, is_wanted: Callable[[str], object] = lambda name: False) -> zipfile.ZipFile:
    """Opens a zip.

    Args:
        file: the zip.
        is_wanted: whether an entry of this name will be read.

    Raises:
        RefusedError: there is something before its first entry, such as another zip; or it has odd names, or a bomb.
    """
    limit_bytes = max(ENTRY_BYTES, EXPANSION * file.seek(0, io.SEEK_END))
    try:
        # zipfile takes names without a flag for those of DOS; Linux and macOS write them in UTF-8.
        archive = zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        raise RefusedError("has names that are not in UTF-8: unpack it, and pack the folder") from None
    if first := min((info.header_offset for info in archive.infolist()), default=archive.start_dir):
        said = f"has {first:,} bytes before its first entry: was it joined by `cat`, or is it self-extracting?"
        raise RefusedError(f"{said} Unpack it, and pack the folder")
    if sum(info.file_size for info in archive.infolist() if is_wanted(info.filename)) > limit_bytes:
        raise RefusedError(EXPANDS)
    return archive


def zip_members(opener: Opener) -> Iterator[Member]:
    """Yields the files of a zip, in the order of its directory."""
    with opener() as file, opened_zip(file, is_image) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield Member(info.filename, partial(_read_zipped, archive, info), size_bytes=info.file_size)


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as stream:
        return read_exactly(stream, info.file_size)


def open_zipped(opener: Opener, name: str) -> BinaryIO:
    """Opens one file of a zip as a stream."""
    file = opener()
    limit_bytes = max(_SMALL_BYTES, EXPANSION * file.seek(0, io.SEEK_END))
    archive = opened_zip(file)
    if archive.getinfo(name).file_size > limit_bytes:
        raise RefusedError(EXPANDS)
    return cast(BinaryIO, archive.open(name))


def is_data_file(part: str) -> bool:
    """Returns whether a part of an image's name is the file that holds the image and others."""
    return _DATA_FILE.search(part) is not None


def stem_of(part: str) -> str:
    """Returns a part of a name, without the suffix of a data file."""
    return _DATA_FILE.split(part)[0]


def split_of(part: str) -> str:
    """Returns the split that a part of a name stands for: train, test or val; an empty string for none."""
    match = _FILE.search(part) if is_data_file(part) else _FOLDER.fullmatch(part)
    return SPLITS[match[1].lower()] if match else ""


def split_in(parts: Iterable[str]) -> str:
    """Returns the first split among the parts of a name; an empty string for none."""
    return next(filter(None, map(split_of, parts)), "")


@dataclass(frozen=True)
class Files:
    """The files of a folder, a bucket or a zip, before anything is known of their content.

    Attributes:
        where: the place, for messages.
        names: their relative names, in order.
        open: opens one as a seekable stream.
        chosen: the file that the user named, and not its folder; else empty.
        folder: the local folder, for libraries that read nothing else.
    """

    where: str
    names: tuple[str, ...]
    open: Callable[[str], BinaryIO]
    chosen: str = ""
    folder: Path | None = None

    @property
    def place(self) -> str:
        """Returns the chosen file, or the place of all."""
        return f"{self.where}/{self.chosen}" if self.chosen else self.where

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """Returns the names that a pattern matches from beginning to end: of a chosen file, its own alone."""
        return [name for name in self.names if pattern.fullmatch(name) and self.chosen in ("", name)]

    def read(self, name: str) -> bytes:
        """Returns the content of one; raises `RefusedError` if it is larger than a table of labels may be."""
        with self.open(name) as file:
            check_size(file.seek(0, io.SEEK_END), TABLE_BYTES, "a table of labels")
            file.seek(0)
            return file.read()


@dataclass(frozen=True)
class Source:
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.

    Attributes:
        where: the path or URI that messages name.
        listed: yields its files in order, each readable until the next one is requested; raises `RefusedError`.
        listed_in: yields the files of one split alone, if the format finds them without the others.
        with_labels: yields the same files in the same order with their labels, unread, where `listed` has none.
        table: the file that has the labels, where a table has them.
        label_by_name: returns the label of an image by that table; empty if it has none.
        classes: the names of the classes, if the format has a list of them.
        note: how the source is interpreted, for people.
        readers: number of files to read at a time.
        split: the split whose images are taken; "" takes all, and None what the names of folders say.
        other_splits: those that are left out unless a person chooses one.
        beside: the files among which a table of labels may be, if they can be read by name.
        unchosen: the words of `--labels` for labels of the format that none of the images has got.
        skipped: number of files that `images` has left out: hidden images, and other files by suffix.
    """

    where: str
    listed: Callable[[], Iterator[Member]]
    listed_in: Callable[[str], Iterator[Member]] | None = None
    with_labels: Callable[[], Iterator[Member]] | None = None
    table: str = ""
    label_by_name: Callable[[str], str] | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    readers: int = 0
    split: str | None = None
    other_splits: tuple[str, ...] = ()
    beside: Files | None = None
    unchosen: tuple[str, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def choices(self) -> tuple[str, ...]:
        """Returns the words of `--labels` for labels that none of the images has got, in tables, too."""
        names = self.beside.names if self.beside else ()
        return self.unchosen or tuple(f"{name}:COLUMN" for name in names if name.endswith(_TABLES))

    @property
    def name(self) -> str:
        """Returns the name of the source in the dataset's index."""
        return printable(self.where.rstrip("/").rpartition("/")[2])

    def changed(self, change: Callable[[Member], Member | None]) -> Source:
        """Returns the source with each of its files changed, or left out."""

        def wrapped(listed: Callable[..., Iterator[Member]] | None) -> Any:
            return listed and (lambda *words: filter(None, map(change, listed(*words))))

        listed, listed_in, with_labels = map(wrapped, (self.listed, self.listed_in, self.with_labels))
        return replace(self, listed=listed, listed_in=listed_in, with_labels=with_labels)

    def split_by(self, names: Iterable[str]) -> Source:
        """Returns the source with train alone, if the names of its files say several splits of which train is one."""
        found = {split_in(name.split("/")) for name in names}
        others = tuple(sorted(found - {"train", ""})) if "train" in found else ()
        return replace(self, split="train" if others else "", other_splits=others)

    def members(self, labelled: bool = False) -> Iterator[Member]:
        """Yields all files with normalised names, each readable until the next one is requested.

        `labelled` ones have their labels, and may not be read.
        """
        wanted, listed = SPLITS.get(self.split or ""), (labelled and self.with_labels) or self.listed
        with refusing(self.where):
            for member in self.listed_in(wanted) if self.listed_in and wanted else listed():
                parts = path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if wanted in (None, split_in(parts)):
                    name, label = printable("/".join(part for part in parts if part not in ("", "."))), member.label
                    if labelled and self.label_by_name and is_image(name):
                        label = self.label_by_name(name)
                    yield replace(member, name=name, label=label)

    def images(self, labelled: bool = False) -> Iterator[Member]:
        """Yields the images, in order, and counts the files that it leaves out; reads no content. See `members`."""
        self.skipped.clear()
        return filter(self._is_image, self.members(labelled))

    def loaded(self, images: Iterable[Member]) -> Iterator[tuple[str, bytes]]:
        """Yields the relative paths and contents of these images, in order."""
        if not self.readers:
            yield from map(self._load, images)
            return
        with ThreadPoolExecutor(self.readers) as pool:
            yield from in_order(pool, self._load, images, window=2 * self.readers)

    def _is_image(self, member: Member) -> bool:
        if is_image(member.name):
            return True
        suffix = Path(member.name).suffix.lower()
        if member.name == self.table:
            return False
        if not is_hidden(member.name):
            is_named = suffix in self.skipped or (1 < len(suffix) < 12 and len(self.skipped) < _SUFFIXES_NAMED)
            self.skipped[suffix if is_named else "other"] += 1
        elif suffix in SUFFIXES and not _FORK.search(member.name):
            self.skipped["hidden images"] += 1
        return False

    def _load(self, member: Member) -> tuple[str, bytes]:
        with refusing(f"{self.where}: entry {member.name!r}"):
            return member.name, member.read()

"""What can be packed: a folder, a zip, a tar or MNIST's idx files, here or in a bucket; and which classes it has.

Every source is an ordered stream of named files, refused as a whole if it is unsafe or damaged. Archives come from
strangers. Nothing is ever extracted to a disk, yet a name that leads outside, a link, or kilobytes that unpack to
terabytes mean that an archive is not what its user takes it for.
"""

from __future__ import annotations

import abc
import gzip
import hashlib
import io
import lzma
import math
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, cast
from urllib.parse import unquote

import numpy as np

from job.data.ahead import in_order
from job.data.shards import Digests
from job.exits import BadDataError, BadRequestError, MissingInputError, NoPermissionError
from job.store import Retry, Store, is_remote, open_store

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
ENTRY_BYTES = 256 * 1024 * 1024
"""Largest image file that is read."""
EXPANSION = 200
"""How many times larger than the archive its content may be. Images hardly compress; deflate alone reaches 1,032."""
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
"""Folders of these names say how a dataset is divided, not what its images show."""

Opener = Callable[[], BinaryIO]
"""Opens a file from its beginning, as a seekable stream; may be called several times."""

_DEFLATE_LIMIT = 1032
"""The most that deflate can expand (https://zlib.net/zlib_tech.html)."""
_SKIPPED_BYTES = 1 << 20
_BUCKET_READERS = 16
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_NAME = re.compile(r"[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_NO_TEXT = re.compile(r"[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_IS_LINK = "is a link or a device: do not trust this archive"


class RefusedError(Exception):
    """Why a file is not acceptable, as the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source, before its content is read."""

    name: str
    read: Callable[[], bytes] | None
    """None for a folder."""
    offset: int = -1
    """Of a tar's file: where its content begins."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image on its way into a dataset.

    Attributes:
        name: of its file.
        content: its encoded bytes.
        label: its class; -1 without one.
        offset: where they begin in a tar that stays in place.
    """

    name: str
    content: bytes
    label: int = -1
    offset: int = -1


class Source(abc.ABC):
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.
    """

    channels = 3
    """What its images are packed to unless somebody chooses."""

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
        """All files in order; each can be read until the next one is asked for. Raises `RefusedError`."""

    def checked_members(self) -> Iterator[tuple[str, Member]]:
        """All members with their names in plain form; each can be read until the next one is asked for."""
        with refusing(self.where):
            for member in self.members():
                parts = path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                yield printable("/".join(part for part in parts if part not in ("", "."))), member

    def names(self) -> Iterator[str]:
        """Relative paths of the images, in order; reads no more than that takes."""
        # Eight bytes per name, so that memory hardly grows with the source.
        hashes = array("Q")
        for name, _ in self._images():
            hashes.append(_name_hash(name))
            yield name
        values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        if (counts > 1).any():
            twice = values[counts > 1][0]
            name = next(name for name, _ in self._images() if _name_hash(name) == twice)
            raise BadDataError(
                f"{self.where} has the entry {name!r} more than once, and nobody knows which is meant: "
                "do not trust this archive"
            )

    def entries(self) -> Iterator[tuple[str, bytes]]:
        """Relative paths and contents of the images, in order."""
        unpacked_bytes = 0
        for name, content in self._loaded():
            unpacked_bytes += len(content)
            if unpacked_bytes > self.limit_bytes:
                raise BadDataError(f"{self.where} {_expands(name)}")
            yield name, content

    def _loaded(self) -> Iterator[tuple[str, bytes]]:
        yield from map(self._load, self._images())

    def _images(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for name, member in self.checked_members():
            if member.read is not None and is_image(name):
                yield name, member.read

    def _load(self, image: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes]:
        name, read = image
        with refusing(f"{self.where}: entry {name!r}"):
            return name, read()


class Folder(Source):
    """A local folder, in the order of its relative paths, without hidden files."""

    def __init__(self, path: Path, bucket: str = "") -> None:
        """`path` may itself be a link. What is packed must not become a source: a `bucket` below is left out.

        Raises:
            BadRequestError: the folder is itself the bucket.
        """
        self._root = path.resolve()
        super().__init__(str(self._root))
        self._bucket = Path(bucket).resolve() if bucket.startswith("/") else None
        if self._bucket == self._root:
            raise BadRequestError(f"{self._root} is both SOURCE and bucket: choose another --bucket")
        if self._bucket and self._bucket.is_dir() and self._bucket.is_relative_to(self._root):
            self.note = f"leaving out {self._bucket}, which is the bucket"

    def members(self) -> Iterator[Member]:
        """The files below, without hidden ones."""
        return self._below(self._root, "")

    def _below(self, folder: Path, prefix: str) -> Iterator[Member]:
        with os.scandir(folder) as scan:
            # Whole paths are compared, as a bucket does it: a-b/x comes before a/x.
            children = sorted(scan, key=lambda child: child.name + "/" * child.is_dir(follow_symlinks=False))
        for child in children:
            name, path = prefix + child.name, Path(child.path)
            if is_litter(child.name) or path == self._bucket:
                continue
            if child.is_dir(follow_symlinks=False):
                yield from self._below(path, f"{name}/")
            elif is_image(child.name) or child.is_dir():
                if child.is_symlink() and not path.resolve().is_relative_to(self._root):
                    raise _refused(name, "is a link that leaves the folder: put a copy in its place")
                # Following a link to a folder could go round in circles.
                if not child.is_file():
                    raise _refused(
                        name, "is a broken link, a link to a folder, or no regular file: put a copy in its place"
                    )
                yield Member(name, partial(_read_file, path))


class BucketFolder(Source):
    """A folder in a bucket, in key order. Each image costs a request: archives are read much faster."""

    def __init__(self, store: Store) -> None:
        """`store` is the folder."""
        super().__init__(store.uri)
        self._store = store

    def members(self) -> Iterator[Member]:
        """The objects below."""
        for entry in self._store.list():
            if is_image(entry.key) and entry.size_bytes > ENTRY_BYTES:
                raise _refused(
                    entry.key, f"has {entry.size_bytes} bytes, more than the {ENTRY_BYTES} that an image may have"
                )
            yield Member(entry.key, partial(self._read, entry.key))

    def _loaded(self) -> Iterator[tuple[str, bytes]]:
        with ThreadPoolExecutor(_BUCKET_READERS) as pool:
            yield from in_order(pool, self._load, self._images(), window=2 * _BUCKET_READERS)

    def _read(self, key: str) -> bytes:
        return self._store.read(key).data


class Zip(Source):
    """A zip archive, in the order of its directory."""

    def __init__(self, where: str, opener: Opener) -> None:
        super().__init__(where)
        self._open = opener

    def members(self) -> Iterator[Member]:
        """The directory's entries."""
        with self._open() as file:
            self.limit_bytes = max(ENTRY_BYTES, EXPANSION * _length_bytes(file))
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if info.flag_bits & 1:
                        raise _refused(
                            info.filename, "is encrypted: unpack the archive with its password, and pack the folder"
                        )
                    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                        raise _refused(info.filename, _IS_LINK)
                    yield Member(info.filename, None if info.is_dir() else partial(self._read, archive, info))

    def _read(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
        with archive.open(info) as stream:
            return _read_exactly(stream, info.file_size)


class Tar(Source):
    """A tar archive, plain or gzipped, in stream order."""

    def __init__(self, where: str, opener: Opener, digests: Digests | None = None) -> None:
        """With `digests`, which take every byte of it, it must be plain."""
        super().__init__(where)
        self._open, self._digests = opener, digests

    def members(self) -> Iterator[Member]:
        """The headers' entries; the archive must end as a tar does."""
        with self._open() as file:
            self.limit_bytes = max(ENTRY_BYTES, EXPANSION * _length_bytes(file))
            stream = TarStream(file, self.limit_bytes, self._digests)
            try:
                archive = tarfile.TarFile(fileobj=cast(BinaryIO, stream))
            except tarfile.TarError:
                raise RefusedError(
                    "is no archive that can be packed, or damaged: give a folder, .zip, .tar, .tar.gz or MNIST idx file"
                ) from None
            while (member := archive.next()) is not None:
                # Otherwise tarfile remembers every header, and memory grows with the archive.
                archive.members.clear()  # type: ignore[attr-defined]
                stream.member = member.name
                is_file = member.isreg() and not member.issparse()
                if not is_file and not member.isdir():
                    raise _refused(member.name, _IS_LINK)
                read = partial(self._read, archive, member) if is_file else None
                yield Member(member.name, read, member.offset_data)
            stream.finish()

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        stream = archive.extractfile(member)
        assert stream is not None
        return _read_exactly(stream, member.size)


class TarStream:
    """What `tarfile` reads from: it only goes forward, bounds each read, and knows whether the archive was whole."""

    def __init__(self, file: BinaryIO, limit_bytes: float, digests: Digests | None) -> None:
        """What is unpacked is read in full, as is everything with `digests`; else, what nobody wants is skipped."""
        self._file = _gunzipped(file)
        self._skips = self._file is file and digests is None
        self._limit_bytes, self._digests = limit_bytes, digests
        self.member = ""
        """Name of the entry whose content is next."""
        self._position = 0
        self._last_block = b""

    def tell(self) -> int:
        """Bytes up to here, unpacked."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes forward to `position`."""
        if position < self._position:
            raise tarfile.ReadError(f"a header that leads back to byte {position}")
        if self._skips:
            self._position = self._file.seek(position)
        while self._position < position:
            if not self.read(min(position - self._position, _SKIPPED_BYTES)):
                raise EOFError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """The next bytes."""
        # A header may claim any length for itself, and tarfile would believe it.
        if size > ENTRY_BYTES:
            raise tarfile.ReadError(f"a block of {size} bytes")
        self._last_block = self._file.read(size)
        self._position += len(self._last_block)
        if self._position > self._limit_bytes:
            raise RefusedError(_expands(self.member))
        if self._digests is not None:
            self._digests.update(self._last_block)
        return self._last_block

    def finish(self) -> None:
        """Raises unless the archive ends as a tar does: `tarfile` takes zeros in place of a header for the end."""
        if self._last_block != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end mark")
        # A checksum is compared when the end is reached.
        while block := self.read(_SKIPPED_BYTES):
            if block.strip(b"\0"):
                raise RefusedError(
                    "holds more behind its end mark, which is not read: was it joined with `cat`, or is it damaged? "
                    "Unpack it, and pack the folder"
                )


class Idx(Source):
    """MNIST's format (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a file of their own.

    Its images become PGM files in a folder per class.
    """

    channels = 1

    def __init__(self, where: str, images: Opener, labels: Opener | None) -> None:
        """Without `labels` there are no classes."""
        super().__init__(where)
        self._open_images, self._open_labels = images, labels

    def members(self) -> Iterator[Member]:
        """The images in file order, named after their class and number."""
        with self._open_images() as raw:
            size_bytes, file = _length_bytes(raw), _gunzipped(raw)
            limit_bytes = size_bytes if file is raw else size_bytes * _DEFLATE_LIMIT
            magic, count, height, width = struct.unpack(">4I", _read_exactly(file, 16))
            pixels = height * width
            if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
                raise RefusedError(f"is no whole MNIST image file (header {magic:#x}, {count} of {height} × {width})")
            labels = self._labels(count)
            digits, label_digits = len(str(count - 1)), len(str(max(labels, default=0)))
            header = b"P5 %d %d 255\n" % (width, height)
            for number in range(count):
                folder = f"{labels[number]:0{label_digits}d}/" if labels else ""
                yield Member(f"{folder}{number:0{digits}d}.pgm", lambda: header + _read_exactly(file, pixels))
            if file.tell() == 16 + count * pixels and file.read(1):
                raise RefusedError(f"holds more than its {count} images")

    def _labels(self, count: int) -> bytes:
        if self._open_labels is None:
            return b""
        with self._open_labels() as raw:
            file = _gunzipped(raw)
            if struct.unpack(">2I", _read_exactly(file, 8)) != (0x801, count):
                raise RefusedError("does not go with its labels, which are for another number of images")
            return _read_exactly(file, count)


def open_source(source: str, bucket: str = "", retry: Retry | None = None) -> Source:
    """Finds out what `source` is: a local path, or the URI of an object or a folder in a bucket.

    Args:
        source: a path or URI.
        bucket: where it is to be packed to, which is no part of it.
        retry: with which its own bucket is opened.

    Raises:
        MissingInputError: it is not there.
        BadRequestError: a URI that no store speaks, a folder with several MNIST sets and none for training, or one
            that is itself `bucket`.
        NoPermissionError: it may not be read.
    """
    if is_remote(source):
        return _in_bucket(source, retry)
    path = Path(unquote(source[7:]) if source.lower().startswith("file://") else source)
    # Of a user who is not there, `~nobody` is a name like any other.
    with suppress(RuntimeError):
        path = path.expanduser()
    with refusing(repr(source)):
        if path.is_dir():
            return _idx(path, _files(path)) or Folder(path, bucket)
        if not path.is_file():
            raise MissingInputError(f"there is nothing at {source!r}: give a folder or an archive of images")
        path = path.resolve()
        return _idx(path.parent, _files(path.parent), path.name) or _archive(path, _opener(path))


def _in_bucket(uri: str, retry: Retry | None) -> Source:
    folder, _, name = uri.rpartition("/")
    if name and not folder.endswith(":/") and (parent := open_store(folder, retry)).exists(name):
        files = _objects(parent) if _IDX_NAME.fullmatch(name) else {}
        return _idx(parent.uri, files, name) or _archive(uri, partial(parent.open, name))
    store = open_store(uri, retry)
    if next(iter(store.list()), None) is None:
        raise MissingInputError(f"there is nothing at {uri}: give a folder or an archive of images")
    return _idx(uri, _objects(store)) or BucketFolder(store)


def _archive(where: object, opener: Opener) -> Source:
    with opener() as file:
        is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    return Zip(str(where), opener) if is_zip else Tar(str(where), opener)


def _files(folder: Path) -> dict[str, Opener]:
    return {path.name: _opener(path) for path in folder.iterdir()}


def _opener(path: Path) -> Opener:
    return lambda: path.open("rb")


def _objects(folder: Store) -> dict[str, Opener]:
    return {entry.key: partial(folder.open, entry.key) for entry in folder.list()}


def _idx(folder: object, files: dict[str, Opener], chosen: str = "") -> Idx | None:
    """The MNIST set `chosen` of a folder's files, or else the one for training; None without any."""
    sets = sorted(name for name in files if _IDX_NAME.fullmatch(name) and "images" in name)
    train = [name for name in sets if "train" in name]
    if not sets or (chosen and not _IDX_NAME.fullmatch(chosen)):
        return None
    if not chosen and not train and len(sets) > 1:
        raise BadRequestError(f"{folder} holds several MNIST sets: give one of {', '.join(sets)} as SOURCE")
    name = chosen or (train or sets)[0]
    labels = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    source = Idx(f"{folder}/{name}", files[name], files.get(labels) or files.get(f"{labels}.gz"))
    others = [other for other in sets if other.removesuffix(".gz") != name.removesuffix(".gz")]
    if others and not chosen:
        source.note = f"packing {name}, leaving out {', '.join(others)}"
    return source


@dataclass(frozen=True)
class Survey:
    """What a first look at a source's names tells."""

    images: int
    classes: tuple[str, ...]
    depth: int
    """Number of folders above those that name the classes."""
    note: str = ""
    """What a person should know who expected classes."""

    def label(self, name: str) -> int:
        """Class of an image; -1 without classes."""
        return self.classes.index(path_parts(name)[self.depth]) if self.classes else -1


def survey(names: Iterable[str], where: str, classes: bool | None = None) -> Survey:
    """Counts the images and finds their classes: the first folders in which they differ, unless these are splits.

    Args:
        names: relative paths of all images.
        where: the source, for messages.
        classes: True if there must be classes, False for none; None takes them if each image lies in one of several.

    Raises:
        BadDataError: there are no images.
        BadRequestError: there must be classes, and there are none.
    """
    images, folders = 0, set()
    for name in names:
        images += 1
        folders.add(path_parts(name)[:-1])
    if not images:
        raise no_images(where)
    found, depth = _class_folders(folders)
    if classes and not found:
        raise BadRequestError(f"{where} has no classes: each image would have to lie in one of at least two folders")
    note = ""
    if classes is None and not found and len([folder for folder in folders if folder]) > 1:
        note = f"{where}: some images lie beside the folders of others, so the folders are not taken for classes"
    return Survey(images, () if classes is False else found, depth, note)


def no_images(where: str) -> BadDataError:
    """The error that a source is empty."""
    return BadDataError(f"{where} holds no images: none of its names ends in {', '.join(sorted(SUFFIXES))}")


def _class_folders(folders: set[tuple[str, ...]]) -> tuple[tuple[str, ...], int]:
    while True:
        levels = enumerate(zip(*folders, strict=False))
        depth = next((number for number, level in levels if len(set(level)) > 1), min(map(len, folders)))
        if any(len(folder) == depth for folder in folders):
            return (), 0
        first = {folder[depth] for folder in folders}
        if not all(name.lower() in SPLITS for name in first):
            return tuple(sorted(first)), depth
        folders = {(*folder[:depth], "", *folder[depth + 1 :]) for folder in folders}


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


def path_parts(name: str) -> tuple[str, ...]:
    """Components of a relative path; archives made on Windows may separate them by backslashes."""
    return tuple(name.replace("\\", "/").split("/"))


def is_image(name: str) -> bool:
    """Whether the name says that this is an image a person meant to keep: no hidden file, no macOS litter."""
    _, dot, suffix = path_parts(name)[-1].rpartition(".")
    return f"{dot}{suffix.lower()}" in SUFFIXES and not is_litter(name)


def is_litter(name: str) -> bool:
    """Whether an operating system or program put it there: hidden files, and the resource forks of macOS."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path_parts(name))


def printable(name: str) -> str:
    """The name as one line of valid Unicode: bytes that are not UTF-8, and control characters, become `%xx`.

    Backslashes would be taken for separators of folders, and what follows them for names of classes.
    """
    text = name.encode(errors="surrogateescape").decode(errors="surrogateescape")
    text = _NO_TEXT.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02x}", text)
    return _CONTROL.sub(lambda match: f"%{ord(match[0]):02x}", text)


def _refused(name: str, problem: str) -> RefusedError:
    return RefusedError(f"has the entry {name!r}, which {problem}")


def _expands(name: str) -> str:
    return f"unpacks to more than {EXPANSION} times its size (at entry {name!r}): do not trust this archive"


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, which must be there; no header is trusted with more memory than an image may take."""
    if size > ENTRY_BYTES:
        raise RefusedError(f"unpacks to {size} bytes, more than the {ENTRY_BYTES} that an image may have")
    content = file.read(size)
    if len(content) != size:
        raise RefusedError(f"has {len(content)} bytes where {size} were promised: it is truncated or damaged")
    return content


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _read_exactly(file, os.fstat(file.fileno()).st_size)


def _gunzipped(file: BinaryIO) -> BinaryIO:
    is_gzipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file


def _length_bytes(file: BinaryIO) -> int:
    length_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    return length_bytes


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())

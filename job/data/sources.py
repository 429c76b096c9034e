"""What can be packed: a folder, a zip, a tar or MNIST's idx files, here or in a bucket; and which classes it has.

Every source is an ordered stream of named files, refused as a whole if it is unsafe or damaged. Archives come from
strangers. Nothing is ever extracted to a disk, yet a name that leads outside, a link, or kilobytes that unpack to
terabytes mean that an archive is not what its user takes it for.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

import numpy as np

from job.data.ahead import in_order
from job.data.fetched import fetched
from job.data.shards import Digests
from job.exits import BadDataError, BadRequestError, MissingInputError, NoPermissionError
from job.progress import printable
from job.store import (
    Entry,
    Retry,
    Store,
    fsspec_configured,
    is_foreign,
    is_remote,
    open_store,
    open_to_read,
    split_chain,
    split_uri,
    without_queries,
)

if TYPE_CHECKING:
    from job.store.foreign import ForeignStore

SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
ENTRY_BYTES = 256 * 1024 * 1024
"""Largest image file that is read."""
BAD_CLASS = -2
EXPANSION = 200
"""How many times larger than the archive its content may be. Images hardly compress; deflate alone reaches 1,032."""
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
"""Folders of these names say how a dataset is divided, not what its images show."""

Opener = Callable[[], BinaryIO]
"""Opens a file from its beginning, as a seekable stream; may be called several times."""

HIDDEN = "hidden images"
"""Files that are left out because their name, or that of a folder above them, begins with a dot."""

_FORK = re.compile(r"(^|/)(__MACOSX/|\._)")
"""What macOS adds beside each file, by the same suffix."""
_SKIPPED_BYTES = 1 << 20
_SUFFIXES_NAMED = 20
_BUCKET_READERS = 16
_NOTHING_AT = "there is nothing at {}: give a folder or an archive of images"
_CIFAR_BYTES = 1 + 3 * 32 * 32
_CIFAR_NOTE = "packing the images for training; --split test packs the others"
_PATTERN = re.compile(r"([^*]*/)([^/*]*\*.*)")
_IDX_NAME = re.compile(r"[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
_EXPANDS = f"unpacks to more than {EXPANSION} times its size: do not trust this archive"


class RefusedError(Exception):
    """Why a file is not acceptable, as the end of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a source, before its content is read.

    Attributes:
        name: its relative path.
        read: gives its content.
        offset: where that begins in a tar.
    """

    name: str
    read: Callable[[], bytes]
    offset: int = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """An image on its way into a dataset.

    Attributes:
        name: of its file.
        content: its encoded bytes.
        label: its class; -1 without one, `BAD_CLASS` if that is no number of a class.
        offset: where they begin in a tar that stays in place.
    """

    name: str
    content: bytes
    label: int = -1
    offset: int = -1


@dataclass(frozen=True)
class Source:
    """An ordered, repeatable stream of images: the same source gives the same names and bytes in the same order.

    Its methods raise `BadDataError`, naming the entry, if the source is unsafe, truncated or damaged.

    Attributes:
        where: the path or URI that messages name.
        listed: gives its files in order; each can be read until the next one is asked for. Raises `RefusedError`.
        channels: what its images are packed to unless somebody chooses.
        note: what a person should know about how the source was understood.
        readers: how many files may be read at a time.
        split: takes only what lies in this folder of those that divide the source, see `SPLITS`.
        hold_out: which share of the images is kept apart.
        held: takes only those, not the others.
        skipped: how many files `names` has passed over: hidden images, and other files by suffix.
    """

    where: str
    listed: Callable[[], Iterator[Member]]
    channels: int = 3
    note: str = ""
    readers: int = 0
    split: str = ""
    hold_out: float = 0.0
    held: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """What the dataset says that it was made from."""
        return printable(self.where.rstrip("/").rpartition("/")[2])

    def members(self) -> Iterator[Member]:
        """All files, with their names in plain form; each can be read until the next one is asked for."""
        with refusing(self.where):
            for member in self.listed():
                parts = path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if not self.split or self.split == next((part for part in map(str.lower, parts) if part in SPLITS), ""):
                    yield replace(member, name=printable("/".join(part for part in parts if part not in ("", "."))))

    def names(self) -> Iterator[str]:
        """Relative paths of the images, in order; reads no more than that takes."""
        self.skipped.clear()
        for member in self.members():
            suffix = Path(member.name).suffix.lower()
            if is_image(member.name):
                if self._takes(member.name):
                    yield member.name
            elif suffix in SUFFIXES:
                if not _FORK.search(member.name):
                    self.skipped[HIDDEN] += 1
            elif not is_litter(member.name):
                is_named = suffix in self.skipped or (1 < len(suffix) < 12 and len(self.skipped) < _SUFFIXES_NAMED)
                self.skipped[suffix if is_named else "other"] += 1

    def entries(self) -> Iterator[tuple[str, bytes]]:
        """Relative paths and contents of the images, in order."""
        images = (member for member in self.members() if is_image(member.name) and self._takes(member.name))
        if not self.readers:
            yield from map(self._load, images)
            return
        with ThreadPoolExecutor(self.readers) as pool:
            yield from in_order(pool, self._load, images, window=2 * self.readers)

    def _takes(self, name: str) -> bool:
        """By its name alone, so that an image stays on its side when others come or go."""
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        return (drawn < self.hold_out) == self.held

    def _load(self, member: Member) -> tuple[str, bytes]:
        with refusing(f"{self.where}: entry {member.name!r}"):
            return member.name, member.read()


def folder_source(root: Path, bucket: str = "") -> Source:
    """A local folder, in the order of its relative paths, without hidden files.

    What is packed must not become a source: a `bucket` below is left out.

    Raises:
        BadRequestError: the folder is itself the bucket.
    """
    packed_to = Path(bucket).resolve() if bucket.startswith("/") else None
    if packed_to == root:
        raise BadRequestError(f"{root} is both SOURCE and bucket: choose another --bucket")

    def below(folder: Path, prefix: str) -> Iterator[Member]:
        with os.scandir(folder) as scan:
            # Whole paths are compared, as a bucket does it: a-b/x comes before a/x.
            children = sorted(scan, key=lambda child: child.name + "/" * child.is_dir(follow_symlinks=False))
        for child in children:
            name, path = prefix + child.name, Path(child.path)
            if path == packed_to:
                continue
            if is_litter(child.name):
                # `names` counts the images among them; folders that only the system may read are passed over.
                walk = os.walk(path) if child.is_dir(follow_symlinks=False) else [("", [], [child.name])]
                yield from (Member(f"{name}/{file}", bytes) for _, _, files in walk for file in files)
            elif child.is_dir(follow_symlinks=False):
                yield from below(path, f"{name}/")
            elif is_image(child.name) or child.is_dir():
                # Following a link to a folder could go round in circles.
                if not child.is_file() or (child.is_symlink() and not path.resolve().is_relative_to(root)):
                    raise _refused(name, "is a link out of this folder or to one, or no file: put a copy in its place")
                yield Member(name, partial(_read_file, path))
            elif child.is_file():
                yield Member(name, bytes)

    is_below = packed_to and packed_to.is_dir() and packed_to.is_relative_to(root)
    note = f"leaving out {packed_to}, which is the bucket" if is_below else ""
    return Source(str(root), partial(below, root, ""), note=note)


def _bucket_members(store: Store, entries: Sequence[Entry]) -> Iterator[Member]:
    """A folder in a bucket, in key order. Each image costs a request: archives are read much faster."""

    def read(entry: Entry) -> bytes:
        _check_size(entry.size_bytes)
        return store.read(entry.key, ENTRY_BYTES).data

    return (Member(entry.key, partial(read, entry)) for entry in entries)


def _zip_members(opener: Opener) -> Iterator[Member]:
    """A zip archive, in the order of its directory."""
    with opener() as file:
        _, limit_bytes = _unpacked(file)
        with zipfile.ZipFile(file) as archive:
            if sum(info.file_size for info in archive.infolist() if is_image(info.filename)) > limit_bytes:
                raise RefusedError(_EXPANDS)
            for info in archive.infolist():
                if not info.is_dir():
                    yield Member(info.filename, partial(_read_zipped, archive, info))


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as stream:
        return _read_exactly(stream, info.file_size)


def tar_members(opener: Opener, digests: Digests | None = None) -> Iterator[Member]:
    """A tar archive, plain or gzipped, in stream order; it must end as a tar does.

    With `digests`, which take every byte of it, it must be plain.
    """
    with opener() as file:
        stream = _TarStream(file, digests)
        try:
            archive = tarfile.TarFile(fileobj=cast(BinaryIO, stream))
        except tarfile.TarError:
            raise RefusedError(
                "is no archive that can be packed (.zip, .tar, .tar.gz, MNIST idx), or damaged"
            ) from None
        while (member := archive.next()) is not None:
            # Otherwise tarfile remembers every header, and memory grows with the archive.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0:
                raise _refused(member.name, f"has a size of {member.size:,} bytes: do not trust this archive")
            if member.isreg() and not member.issparse():
                content = cast(IO[bytes], archive.extractfile(member))
                yield Member(member.name, partial(_read_exactly, content, member.size), member.offset_data)
            elif not member.isdir():
                raise _refused(member.name, "is a link or a device: do not trust this archive")
        stream.finish()


class _TarStream:
    """What `tarfile` reads from: it only goes forward, bounds each read, and knows whether the archive was whole."""

    def __init__(self, file: BinaryIO, digests: Digests | None) -> None:
        """With `digests` everything is read; else, what nobody wants is skipped."""
        self._file, self._limit_bytes = _unpacked(file)
        if digests is not None and self._file is not file:
            raise RefusedError("is compressed: pack it with `ddpm data pack`, or unpack it to a plain .tar")
        self._digests, self._position, self._last_block = digests, 0, b""

    def tell(self) -> int:
        """Bytes up to here, unpacked."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes forward to `position`."""
        if position < self._position:
            raise tarfile.ReadError(f"a header that leads back to byte {position}")
        if position > self._limit_bytes:
            raise RefusedError(_EXPANDS)
        if self._digests is None:
            self._position = self._file.seek(position)
        while self._position < position:
            if not self.read(min(position - self._position, _SKIPPED_BYTES)):
                raise EOFError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """The next bytes."""
        # A header may claim any length for itself, and tarfile would believe it.
        if not 0 <= size <= ENTRY_BYTES:
            raise tarfile.ReadError(f"a block of {size:,} bytes")
        self._last_block = self._file.read(size)
        self._position += len(self._last_block)
        if self._position > self._limit_bytes:
            raise RefusedError(_EXPANDS)
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
                raise RefusedError("holds more behind its end mark: was it joined by `cat`? Unpack it, pack the folder")


def _idx_members(open_images: Opener, open_labels: Opener | None = None) -> Iterator[Member]:
    """MNIST's format (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a file of their own.

    Its images become PGM files in a folder per class; without labels there are no classes.
    """
    with open_images() as raw:
        file, limit_bytes = _unpacked(raw)
        magic, count, height, width = struct.unpack(">4I", _read_exactly(file, 16))
        pixels = height * width
        if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
            raise RefusedError(f"is no whole MNIST image file (header {magic:#x}, {count:,} of {height} × {width})")
        labels = _idx_labels(open_labels, count) if open_labels else b""
        digits, label_digits = len(str(count - 1)), len(str(max(labels, default=0)))
        header = b"P5 %d %d 255\n" % (width, height)
        for number in range(count):
            folder = f"{labels[number]:0{label_digits}d}/" if labels else ""
            yield Member(f"{folder}{number:0{digits}d}.pgm", lambda: header + _read_exactly(file, pixels))
        file.seek(16 + count * pixels)
        if file.read(1):
            raise RefusedError(f"holds more than the {count:,} images of its header: get it again")


def _idx_labels(opener: Opener, count: int) -> bytes:
    with opener() as raw:
        file, _ = _unpacked(raw)
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
        BadRequestError: a URI that no store speaks, or a folder that is itself `bucket`.
        NoPermissionError: it may not be read.
    """
    inside, archive = split_chain(source)
    if inside:
        return _inside(open_source(archive, bucket, retry), inside, without_queries(source))
    if is_remote(source):
        return _elsewhere(source, retry)
    path = Path(open_store(source).uri).resolve()
    folder, chosen = (path, "") if path.is_dir() else (path.parent, path.name)

    def opened(name: str) -> BinaryIO:
        return (folder / name).open("rb")

    with refusing(repr(source)):
        if chosen and not path.is_file():
            raise MissingInputError(_NOTHING_AT.format(source))
        if found := _mnist(folder, [there.name for there in folder.iterdir()], opened, chosen):
            return found
        return _archive(str(path), partial(opened, chosen)) if chosen else folder_source(path, bucket)


def _inside(archive: Source, inside: str, where: str) -> Source:
    """The files of an archive that lie in a folder of it, or match a pattern: `zip://train` or `zip://train/*.jpg`."""
    path = inside.partition("://")[2].strip("/")
    folder = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    start = f"{folder}/" if folder else ""
    wanted = _matching(path.removeprefix(start)) if "*" in path else bool
    whole = replace(archive, split="")

    def listed() -> Iterator[Member]:
        is_empty = True
        for member in whole.members():
            if member.name.startswith(start) and wanted(name := member.name.removeprefix(start)):
                is_empty = False
                yield replace(member, name=name)
        if is_empty:
            raise RefusedError(f"is empty: {'nothing matches' if '*' in path else 'no file is in'} {path!r} in there")

    if any(part.lower() in SPLITS for part in folder.split("/")):
        archive = replace(whole, note="")
    return replace(archive, where=where, listed=listed)


def _matching(pattern: str) -> Callable[[str], object]:
    with fsspec_configured():
        from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _elsewhere(uri: str, retry: Retry | None) -> Source:
    """An archive or a folder at a URI; of a folder, all files or those that match a pattern such as `train/*.jpg`."""
    folder, name = split_uri(uri)
    pattern = _PATTERN.fullmatch(uri) if without_queries(uri) == uri else None
    if pattern:
        uri = pattern[1]
    elif name and not folder.endswith("://") and (parent := open_to_read(folder, retry)).exists(name):
        if is_foreign(uri):
            path = fetched(cast("ForeignStore", parent), name, uri)
            return _archive(parent.uri_of(name), lambda: path.open("rb"))
        names = [entry.key for entry in parent.list()] if _IDX_NAME.fullmatch(name) else []
        return _mnist(parent.uri, names, parent.open, name) or _archive(uri, partial(parent.open, name))
    store = open_to_read(uri, retry)
    wanted = _matching(pattern[2]) if pattern else bool
    entries = [entry for entry in store.list() if wanted(entry.key)]
    if not entries:
        raise MissingInputError(_NOTHING_AT.format(store.uri))
    found = _mnist(store.uri, [entry.key for entry in entries], store.open)
    return found or Source(store.uri, partial(_bucket_members, store, entries), readers=_BUCKET_READERS)


def _archive(where: str, opener: Opener) -> Source:
    with refusing(where), opener() as file:
        if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
            with zipfile.ZipFile(file) as archive:
                # What is compressed in there once more has no honest limit.
                names = [name for name in archive.namelist() if is_image(name) or not name.endswith(".gz")]
            found = None if any(map(is_image, names)) else _mnist(where, names, partial(_zipped, opener))
            return found or Source(where, partial(_zip_members, opener))
        first = next(tar_members(opener), None)
    if first is not None and first.name.startswith("cifar-10-batches-"):
        return Source(where, partial(_cifar_members, opener), split="train", note=_CIFAR_NOTE)
    return Source(where, partial(tar_members, opener))


def _zipped(opener: Opener, name: str) -> BinaryIO:
    """One file of a zip, as a stream."""
    file = opener()
    _, limit_bytes = _unpacked(file)
    archive = zipfile.ZipFile(file)
    if archive.getinfo(name).file_size > limit_bytes:
        raise RefusedError(_EXPANDS)
    return cast(BinaryIO, archive.open(name))


def _cifar_members(opener: Opener) -> Iterator[Member]:
    """CIFAR-10's binary archive (Krizhevsky 2009): a class, and 3,072 bytes of a 32×32 image, channel by channel.

    Its images become PPM files, below train or test, in a folder per class.
    """
    names = list(map(str, range(10)))
    for member in tar_members(opener):
        if member.name.endswith("batches.meta.txt"):
            names = [word for word in member.read().decode("ascii", "replace").split() if word]
        elif re.search(r"cifar-10-batches-py/\w+_batch", member.name):
            raise RefusedError("holds pickles, which are programs: get cifar-10-binary.tar.gz, of the same images")
    for member in tar_members(opener):
        if not (match := re.search(r"(data_batch_\d|test_batch)\.bin$", member.name)):
            continue
        content, split = member.read(), "test" if match[1].startswith("test") else "train"
        count, rest = divmod(len(content), _CIFAR_BYTES)
        if rest or not count:
            raise _refused(member.name, f"is no whole number of images of {_CIFAR_BYTES:,} bytes: get it again")
        for number in range(count):
            image = content[number * _CIFAR_BYTES : (number + 1) * _CIFAR_BYTES]
            if image[0] >= len(names):
                raise _refused(member.name, f"has an image of class {image[0]}, of {len(names)}: get it again")
            pixels = np.frombuffer(image, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0).tobytes()
            name = f"{split}/{names[image[0]]}/{match[1]}-{number:05d}.ppm"
            yield Member(name, partial(bytes, b"P6 32 32 255\n" + pixels))


def _mnist(folder: object, names: Sequence[str], opened: Callable[[str], BinaryIO], chosen: str = "") -> Source | None:
    """The MNIST set `chosen` of a folder's files, or else the first one for training; None without any."""
    sets = sorted(name for name in names if _IDX_NAME.fullmatch(name) and "images" in name)
    if not sets or (chosen and not _IDX_NAME.fullmatch(chosen)):
        return None
    name = chosen or next((name for name in sets if "train" in name), sets[0])
    wanted = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = [partial(opened, there) for there in names if there.removesuffix(".gz") == wanted]
    others = [other for other in sets if other.removesuffix(".gz") != name.removesuffix(".gz")]
    note = f"packing {name}, leaving out {', '.join(others)}" if others and not chosen else ""
    return Source(f"{folder}/{name}", partial(_idx_members, partial(opened, name), *labels[:1]), channels=1, note=note)


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
    notes, divided = [], {part for folder in folders for part in folder if part.lower() in SPLITS}
    if len(splits := divided.difference(found)) > 1:
        named = f"{' and '.join(sorted(splits))} are packed together, as one dataset"
        notes.append(f"{where}: {named}; `ddpm data pack --split {max(splits).lower()}` would pack {max(splits)} alone")
    inner = {tuple(part for part in folder if part not in splits) for folder in folders}
    if classes is None and not found and len([folder for folder in inner if folder]) > 1:
        notes.append(f"{where}: some images lie beside the folders of others, so the folders are not taken for classes")
    return Survey(images, () if classes is False else found, depth, "\n".join(notes))


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
    # zipfile raises RuntimeError and ValueError for what makes no sense or has a password, gzip EOFError, bz2 OSError;
    # tarfile IndexError for a sparse file that is cut off, and OverflowError for a size beyond all machines.
    except (*_DAMAGES, EOFError, OSError, RuntimeError, ValueError, IndexError, OverflowError) as error:
        raise BadDataError(f"{where} is truncated or damaged ({error}): get it again") from None


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


def _refused(name: str, problem: str) -> RefusedError:
    return RefusedError(f"has the entry {name!r}, which {problem}")


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, which must be there; no header is trusted with more memory than an image may take."""
    _check_size(size)
    content = file.read(size)
    if len(content) != size:
        raise RefusedError(f"has {len(content):,} bytes where {size:,} were promised: it is truncated or damaged")
    return content


def _check_size(size: int) -> None:
    if size > ENTRY_BYTES:
        raise RefusedError(f"has {size:,} bytes, more than the {ENTRY_BYTES:,} that an image may have")


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _read_exactly(file, os.fstat(file.fileno()).st_size)


def _unpacked(file: BinaryIO) -> tuple[BinaryIO, int]:
    """What is in a file that may be gzipped, and how many bytes may come out of it."""
    limit_bytes = max(ENTRY_BYTES, EXPANSION * file.seek(0, io.SEEK_END))
    file.seek(0)
    is_gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzipped else file, limit_bytes

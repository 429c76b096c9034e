"""Sources of images to pack: a folder, a zip, a tar or MNIST's idx files, on this machine or at a URI.

Every source is an ordered stream of named files. One unsafe or damaged file refuses the whole source: a path that leads
outside, a link, or kilobytes that unpack to terabytes show that an archive is not what its user expects.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from job.data import members
from job.data.ahead import in_order
from job.data.archives import open_zipped, tar_members, zip_members
from job.data.cifar import cifar_members
from job.data.fetched import fetched
from job.data.members import Member, Opener, RefusedError
from job.data.mnist import IDX_NAME, idx_members
from job.exits import BadRequestError, MissingInputError
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

BAD_CLASS = -2
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
"""Names of folders that divide a dataset into splits, and are not classes."""

HIDDEN = "hidden images"
"""The key of hidden images among the files that are skipped."""

_FORK = re.compile(r"(^|/)(__MACOSX/|\._)")
"""A resource fork, which macOS adds beside each file under the same suffix."""
_SUFFIXES_NAMED = 20
_BUCKET_READERS = 16
_NOTHING_AT = "there is nothing at {}: give a folder or an archive of images"
_PATTERN = re.compile(r"([^*]*/)([^/*]*\*.*)")


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that is being packed.

    Attributes:
        name: name of its file.
        content: its encoded bytes.
        label: its class; -1 without one, `BAD_CLASS` for a `.cls` without a valid number.
        offset: position of the content in a tar that stays in place.
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
        listed: yields its files in order, each readable until the next one is requested; raises `RefusedError`.
        channels: channels of the packed images by default.
        note: how the source is interpreted, for people.
        readers: number of files to read at a time.
        split: the folder of `SPLITS` whose images are taken; "" takes all.
        hold_out: share of the images to hold out.
        takes_held_out: whether the held-out images are taken, or the others.
        skipped: number of files that `images` has left out: hidden images, and other files by suffix.
    """

    where: str
    listed: Callable[[], Iterator[Member]]
    channels: int = 3
    note: str = ""
    readers: int = 0
    split: str = ""
    hold_out: float = 0.0
    takes_held_out: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Returns the name of the source in the dataset's index."""
        return printable(self.where.rstrip("/").rpartition("/")[2])

    def members(self) -> Iterator[Member]:
        """Yields all files with normalised names, each readable until the next one is requested."""
        with members.refusing(self.where):
            for member in self.listed():
                parts = members.path_parts(member.name)
                if parts[0] == "" or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]):
                    raise RefusedError(f"has an entry that leads out of it, {member.name!r}: do not trust this archive")
                if not self.split or self.split == next((part for part in map(str.lower, parts) if part in SPLITS), ""):
                    yield replace(member, name=printable("/".join(part for part in parts if part not in ("", "."))))

    def images(self) -> Iterator[Member]:
        """Yields the images, in order, and counts the files that it leaves out; reads no content."""
        self.skipped.clear()
        for member in self.members():
            suffix = Path(member.name).suffix.lower()
            if members.is_image(member.name):
                if self._takes(member.name):
                    yield member
            elif suffix in members.SUFFIXES:
                if not _FORK.search(member.name):
                    self.skipped[HIDDEN] += 1
            elif not members.is_hidden(member.name):
                is_named = suffix in self.skipped or (1 < len(suffix) < 12 and len(self.skipped) < _SUFFIXES_NAMED)
                self.skipped[suffix if is_named else "other"] += 1

    def loaded(self, images: Iterable[Member]) -> Iterator[tuple[str, bytes]]:
        """Yields the relative paths and contents of these images, in order."""
        if not self.readers:
            yield from map(self._load, images)
            return
        with ThreadPoolExecutor(self.readers) as pool:
            yield from in_order(pool, self._load, images, window=2 * self.readers)

    def _takes(self, name: str) -> bool:
        """Decides by the name alone, so that an image stays held out when others are added or removed."""
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        return (drawn < self.hold_out) == self.takes_held_out

    def _load(self, member: Member) -> tuple[str, bytes]:
        with members.refusing(f"{self.where}: entry {member.name!r}"):
            return member.name, member.read()


def _folder_source(root: Path, bucket: str) -> Source:
    """Returns a local folder in the order of relative paths, without hidden files and without a `bucket` below.

    Raises:
        BadRequestError: the folder is the bucket.
    """
    packed_to = Path(bucket).resolve() if bucket.startswith("/") else None
    if packed_to == root:
        raise BadRequestError(f"{root} is both SOURCE and bucket: choose another --bucket")

    def below(folder: Path, prefix: str) -> Iterator[Member]:
        with os.scandir(folder) as scan:
            # The order of whole paths, as in a bucket: a-b/x comes before a/x.
            children = sorted(scan, key=lambda child: child.name + "/" * child.is_dir(follow_symlinks=False))
        for child in children:
            name, path = prefix + child.name, Path(child.path)
            if path == packed_to:
                continue
            if members.is_hidden(child.name):
                # `images` counts hidden images; os.walk ignores folders that only the system may read.
                walk = os.walk(path) if child.is_dir(follow_symlinks=False) else [("", [], [child.name])]
                yield from (Member(f"{name}/{file}", bytes) for _, _, files in walk for file in files)
            elif child.is_dir(follow_symlinks=False):
                yield from below(path, f"{name}/")
            elif members.is_image(child.name) or child.is_dir():
                # A link to a folder could form a cycle.
                if not child.is_file() or (child.is_symlink() and not path.resolve().is_relative_to(root)):
                    problem = "is not a file, or links to a folder or outside: put a copy in its place"
                    raise members.refused(name, problem)
                yield Member(name, partial(_read_file, path), size_bytes=_size_of(child))
            elif child.is_file():
                yield Member(name, bytes)

    is_below = packed_to and packed_to.is_dir() and packed_to.is_relative_to(root)
    note = f"leaving out {packed_to}, which is the bucket" if is_below else ""
    return Source(str(root), partial(below, root, ""), note=note)


def _size_of(child: os.DirEntry[str]) -> int:
    # Reading names a file that is gone.
    with suppress(FileNotFoundError):
        return child.stat().st_size
    return 0


def _read_file(path: Path) -> bytes:
    members.check_size(path.stat().st_size)
    return path.read_bytes()


def _read_stored(store: Store, entry: Entry) -> bytes:
    members.check_size(entry.size_bytes)
    return store.read(entry.key, members.ENTRY_BYTES).data


def open_source(source: str, bucket: str = "", retry: Retry | None = None) -> Source:
    """Opens a source: a local folder or archive, or the URI of one.

    Args:
        source: a path or URI.
        bucket: destination of the dataset, which is left out of the source.
        retry: how operations on a bucket of the source are repeated.

    Raises:
        MissingInputError: the source does not exist.
        BadRequestError: a URI that is not supported, or a folder that is `bucket`.
        NoPermissionError: the source may not be read.
    """
    inside, archive = split_chain(source)
    if inside:
        return _inside(open_source(archive, bucket, retry), inside, without_queries(source))
    if is_remote(source):
        return _elsewhere(source, retry)
    path = Path(open_store(source).uri).resolve()
    folder, chosen = (path, "") if path.is_dir() else (path.parent, path.name)
    with members.refusing(repr(source)):
        if chosen and not path.is_file():
            raise MissingInputError(_NOTHING_AT.format(source))
        files = [file.name for file in folder.iterdir()]
        if found := _mnist(folder, files, lambda name: (folder / name).open("rb"), chosen):
            return found
        return _archive(str(path), lambda: path.open("rb")) if chosen else _folder_source(path, bucket)


def _inside(archive: Source, inside: str, where: str) -> Source:
    """Returns the files of an archive in a folder, or of a pattern: `zip://train` or `zip://train/*.jpg`."""
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
            raise RefusedError(f"is empty: {'no file matches' if '*' in path else 'no file is in'} {path!r}")

    if any(part.lower() in SPLITS for part in folder.split("/")):
        archive = replace(whole, note="")
    return replace(archive, where=where, listed=listed)


def _matching(pattern: str) -> Callable[[str], object]:
    """Returns whether a name matches a pattern, as a function."""
    with fsspec_configured():
        from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _elsewhere(uri: str, retry: Retry | None) -> Source:
    """Returns an archive or a folder at a URI, or those files of a folder that match a pattern such as `*/*.jpg`."""
    folder, name = split_uri(uri)
    pattern = _PATTERN.fullmatch(uri) if without_queries(uri) == uri else None
    if pattern:
        uri = pattern[1]
    elif name and not folder.endswith("://") and (parent := open_to_read(folder, retry)).exists(name):
        if is_foreign(uri):
            path = fetched(cast("ForeignStore", parent), name, uri)
            return _archive(parent.uri_of(name), lambda: path.open("rb"))
        names = [entry.key for entry in parent.list()] if IDX_NAME.fullmatch(name) else []
        return _mnist(parent.uri, names, parent.open, name) or _archive(uri, partial(parent.open, name))
    store = open_to_read(uri, retry)
    wanted = _matching(pattern[2]) if pattern else bool
    entries = [entry for entry in store.list() if wanted(entry.key)]
    if not entries:
        raise MissingInputError(_NOTHING_AT.format(store.uri))
    if found := _mnist(store.uri, [entry.key for entry in entries], store.open):
        return found

    def listed() -> Iterator[Member]:
        return (
            Member(entry.key, partial(_read_stored, store, entry), size_bytes=entry.size_bytes) for entry in entries
        )

    # Each image costs a request: archives are read much faster.
    return Source(store.uri, listed, readers=_BUCKET_READERS)


def _archive(where: str, opener: Opener) -> Source:
    """Returns a zip or a tar, which may hold MNIST's files or those of CIFAR-10."""
    with members.refusing(where), opener() as file:
        if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
            with zipfile.ZipFile(file) as archive:
                # The size of a gzipped file in a zip is unknown before it is unpacked.
                names = [name for name in archive.namelist() if members.is_image(name) or not name.endswith(".gz")]
            found = None if any(map(members.is_image, names)) else _mnist(where, names, partial(open_zipped, opener))
            return found or Source(where, partial(zip_members, opener))
        first = next(tar_members(opener), None)
    if first is not None and first.name.startswith("cifar-10-batches-"):
        note = "packing the images for training; --split test packs the others"
        return Source(where, partial(cifar_members, opener), split="train", note=note)
    return Source(where, partial(tar_members, opener))


def _mnist(folder: object, names: Sequence[str], opened: Callable[[str], BinaryIO], chosen: str = "") -> Source | None:
    """Returns the MNIST set `chosen` among a folder's files, or the first one for training; None without any."""
    sets = sorted(name for name in names if IDX_NAME.fullmatch(name) and "images" in name)
    if not sets or (chosen and not IDX_NAME.fullmatch(chosen)):
        return None
    name = chosen or next((name for name in sets if "train" in name), sets[0])
    wanted = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = [partial(opened, file) for file in names if file.removesuffix(".gz") == wanted]
    others = [other for other in sets if other.removesuffix(".gz") != name.removesuffix(".gz")]
    note = f"packing {name}, leaving out {', '.join(others)}" if others and not chosen else ""
    return Source(f"{folder}/{name}", partial(idx_members, partial(opened, name), *labels[:1]), channels=1, note=note)

"""What can be packed: a folder, a zip, a tar or MNIST's idx files, here or in a bucket; and which classes it has."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from job.data.archives import Idx, Opener, Tar, Zip
from job.data.members import (
    ENTRY_BYTES,
    SUFFIXES,
    Member,
    Source,
    is_image,
    is_litter,
    path_parts,
    read_exactly,
    refusing,
)
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.store import Store, open_store

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
"""Folders of these names say how a dataset is divided, not what its images show."""

_IDX = re.compile(r"[^/]*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")


class Folder(Source):
    """A local folder, in the order of its relative paths."""

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
            path = Path(child.path)
            if is_litter(child.name) or path == self._bucket:
                continue
            if child.is_dir(follow_symlinks=False):
                yield from self._below(path, f"{prefix}{child.name}/")
            elif is_image(child.name) or child.is_dir():
                yield Member(prefix + child.name, partial(_read_file, path), self._problem(child, path))

    def _problem(self, child: os.DirEntry[str], path: Path) -> str:
        if child.is_symlink() and not path.resolve().is_relative_to(self._root):
            return "is a link that leaves the folder: put a copy in its place"
        # Following a link to a folder could go round in circles.
        return "" if child.is_file() else "is a broken link, a link to a folder, or no regular file: put a copy there"


class BucketFolder(Source):
    """A folder in a bucket, in key order. Each image costs a request: archives are read much faster."""

    readers = 16

    def __init__(self, store: Store) -> None:
        """`store` is the folder."""
        super().__init__(store.uri)
        self._store = store

    def members(self) -> Iterator[Member]:
        """The objects below."""
        for entry in self._store.list():
            too_large = is_image(entry.key) and entry.size_bytes > ENTRY_BYTES
            problem = f"has {entry.size_bytes} bytes, more than the {ENTRY_BYTES} that an image may have"
            yield Member(entry.key, partial(self._read, entry.key), problem if too_large else "")

    def _read(self, key: str) -> bytes:
        return self._store.read(key).data


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return read_exactly(file, os.fstat(file.fileno()).st_size)


def open_source(source: str, opened: Callable[[str], Store] = open_store, bucket: str = "") -> Source:
    """Finds out what `source` is: a local path, or the URI of an object or a folder in a bucket, which is `opened`.

    Args:
        source: a path or URI.
        opened: opens the store of a URI.
        bucket: where it is to be packed to, which is no part of it.

    Raises:
        MissingInputError: it is not there.
        BadRequestError: a URI that no store speaks, a folder with several MNIST sets and none for training, or one
            that is itself `bucket`.
        NoPermissionError: it may not be read.
    """
    scheme, separator, rest = source.partition("://")
    if separator and scheme.lower() != "file":
        return _in_bucket(source, f"{scheme}://", rest, opened)
    path = Path(unquote(rest) if separator else source)
    # Of a user who is not there, `~nobody` is a name like any other.
    with suppress(RuntimeError):
        path = path.expanduser()
    with refusing(repr(source)):
        if path.is_dir():
            return _idx(path, _local_idx_files(path)) or Folder(path, bucket)
        if not path.is_file():
            raise MissingInputError(f"there is nothing at {source!r}: give a folder or an archive of images")
        path = path.resolve()
        files = _local_idx_files(path.parent)
        return _idx(path.parent, files, path.name) or _archive(path, _opener(path))


def _in_bucket(uri: str, scheme: str, rest: str, opened: Callable[[str], Store]) -> Source:
    folder, _, name = rest.rpartition("/")
    if folder and name and (parent := opened(scheme + folder)).exists(name):
        files = _bucket_idx_files(parent) if _IDX.fullmatch(name) else {}
        return _idx(parent.uri, files, name) or _archive(uri, partial(parent.open, name))
    store = opened(uri)
    if next(iter(store.list()), None) is None:
        raise MissingInputError(f"there is nothing at {uri}: give a folder or an archive of images")
    return _idx(uri, _bucket_idx_files(store)) or BucketFolder(store)


def _archive(where: object, opener: Opener) -> Source:
    with opener() as file:
        magic = file.read(4)
    if magic in (b"PK\x03\x04", b"PK\x05\x06"):
        return Zip(str(where), opener)
    return Tar(str(where), opener, gzipped=magic.startswith(b"\x1f\x8b"))


def _idx(folder: object, files: dict[str, Opener], chosen: str = "") -> Idx | None:
    """The MNIST set `chosen`, or else the one for training; None without any."""
    images = sorted(name for name in files if "images" in name)
    train = [name for name in images if "train" in name]
    if not images or (chosen and chosen not in files):
        return None
    if not chosen and not train and len(images) > 1:
        raise BadRequestError(f"{folder} holds several MNIST sets: give one of {', '.join(images)} as SOURCE")
    name = chosen or (train or images)[0]
    stem = name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = files.get(stem) or files.get(f"{stem}.gz")
    source = Idx(f"{folder}/{name}", files[name], labels)
    others = [other for other in images if other.removesuffix(".gz") != name.removesuffix(".gz")]
    if others and not chosen:
        source.note = f"packing {name}, leaving out {', '.join(others)}"
    return source


def _opener(path: Path) -> Opener:
    return lambda: path.open("rb")


def _local_idx_files(folder: Path) -> dict[str, Opener]:
    return {path.name: _opener(path) for path in folder.iterdir() if _IDX.fullmatch(path.name)}


def _bucket_idx_files(folder: Store) -> dict[str, Opener]:
    return {entry.key: partial(folder.open, entry.key) for entry in folder.list() if _IDX.fullmatch(entry.key)}


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
        raise BadDataError(f"{where} holds no images: none of its names ends in {', '.join(sorted(SUFFIXES))}")
    found, depth = _class_folders(folders)
    if classes and not found:
        raise BadRequestError(f"{where} has no classes: each image would have to lie in one of at least two folders")
    note = ""
    if classes is None and not found and len([folder for folder in folders if folder]) > 1:
        note = f"{where}: some images lie beside the folders of others, so the folders are not taken for classes"
    return Survey(images, () if classes is False else found, depth, note)


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

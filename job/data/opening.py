"""Opens the source at a path or a URI: a folder of images, archives, or files in another format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from job.data import members
from job.data.archives import ARCHIVES, open_zipped, opened_zip, tar_members, zip_members
from job.data.fetched import fetched
from job.data.foreign_tars import find_tars
from job.data.formats import recognised
from job.data.formats.beside import labelled_beside
from job.data.formats.binary import IDX_NAME, archive_source
from job.data.formats.tables import has_shards
from job.data.formats.unread import next_step_by
from job.data.labels import sidecars, with_sidecars
from job.data.members import Member, Opener, RefusedError
from job.data.source import Files, Source
from job.data.splits import split_in
from job.exits import BadRequestError, MissingInputError
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

_BUCKET_READERS = 16
_NOTHING_AT = "there is nothing at {}: give a folder or an archive of images"
_BRACES = re.compile(r"\{.*\}")
_PATTERN = re.compile(r"([^*]*/)([^/*]*\*.*)")


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
                yield Member(name, partial(_read_file, path))

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


def open_source(source: str, bucket: str = "", retry: Retry | None = None, column: str | None = "") -> Source:
    """Opens a source: a local folder or file, or the URI of one.

    Args:
        source: a path, a URI, or a pattern of either: `*` as in a folder, `{000..099}` as in a shell.
        bucket: destination of the dataset, which is left out of the source.
        retry: how operations on a bucket of the source are repeated.
        column: the label to take where the source has several; empty for the usual one, None for no labels.

    Raises:
        MissingInputError: the source does not exist.
        BadRequestError: a URI that is not supported, a folder that is `bucket`, or several labels.
        NoPermissionError: the source may not be read.
    """
    inside, archive = split_chain(source)
    if inside:
        return _inside(open_source(archive, bucket, retry, column), inside, without_queries(source))
    path = None if is_remote(source) else Path(open_store(source).uri).resolve()
    # A local name may hold the characters of a pattern.
    if path is None or not path.exists():
        if _BRACES.search(source):
            tars = find_tars([source], retry)
            return _archives(source, [(tar.key, partial(tar.store.open, tar.key)) for tar in tars], column)
        if path is None or "*" in source:
            return _elsewhere(source, retry, column)
    with members.refusing(repr(source)):
        if path.is_dir():
            return _folder(path, bucket, column)
        if not path.is_file():
            raise MissingInputError(_NOTHING_AT.format(source))
        files = _local_files(path.parent, sorted(child.name for child in path.parent.iterdir()), path.name)
        return recognised(files, column) or _archive(str(path), lambda: path.open("rb"), column)


def _local_files(folder: Path, names: Iterable[str], chosen: str = "") -> Files:
    return Files(str(folder), tuple(names), lambda name: (folder / name).open("rb"), chosen, folder)


def _folder(root: Path, bucket: str, column: str | None) -> Source:
    """Returns a local folder of images, or of files in another format."""
    names, has_images = _names_below(root, bucket)
    files = _local_files(root, names)
    if found := _read_as(files, column, has_images):
        return found
    return labelled_beside(_folder_source(root, bucket), files, column)


def _names_below(root: Path, bucket: str) -> tuple[list[str], bool]:
    """Returns names of the files in and below a folder, without images, and whether there are images."""
    found, has_images, folders = list[str](), False, [str(root)]
    for folder in folders:
        with os.scandir(folder) as scan:
            children = sorted(scan, key=lambda child: child.name)
        for child in children:
            if members.is_hidden(child.name) or child.path == str(Path(bucket)):
                continue
            if child.is_dir(follow_symlinks=False):
                folders.append(child.path)
            elif members.is_image(child.name):
                has_images = True
            elif child.is_file():
                found.append(os.path.relpath(child.path, root))
    return found, has_images


def _read_as(files: Files, column: str | None, has_images: bool = False) -> Source | None:
    """Returns the images in files of other formats; None if these are not the dataset."""
    if has_images and not has_shards(files.names):
        return None
    if found := recognised(files, column):
        # A dataset of the hub may show some of its images on its page.
        beside = "leaving out the images beside its tables" if has_images else ""
        return replace(found, note="; ".join(filter(None, (found.note, beside))), beside=files)
    archives = [name for name in files.names if name.lower().endswith(ARCHIVES)] if not has_images else []
    opened = [(name, partial(files.open, name)) for name in archives]
    if len(opened) == 1:
        one = _archive(f"{files.where}/{opened[0][0]}", opened[0][1], column)
        return replace(one, beside=files) if len(files.names) > 1 else one
    return replace(_archives(files.where, opened, column), beside=files) if archives else None


def _archives(where: str, archives: Sequence[tuple[str, Opener]], column: str | None) -> Source:
    """Returns the images of several archives as one source; the name of its archive is a part of an image's name."""

    def listed(labelled: bool = False) -> Iterator[Member]:
        for name, opener in archives:
            for member in replace(_archive(name, opener, column), split=None).members(labelled):
                yield replace(member, name=f"{name}/{member.name}")

    return Source(where, listed, with_labels=partial(listed, True))


def _inside(archive: Source, inside: str, where: str) -> Source:
    """Returns the files of an archive in a folder, or of a pattern: `zip://train` or `zip://train/*.jpg`."""
    path = inside.partition("://")[2].strip("/")
    folder = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    start = f"{folder}/" if folder else ""
    wanted = _matching(path.removeprefix(start)) if "*" in path else bool
    whole = replace(archive, split=None)

    def listed(labelled: bool = False) -> Iterator[Member]:
        is_empty = True
        for member in whole.members(labelled):
            if member.name.startswith(start) and wanted(name := member.name.removeprefix(start)):
                is_empty = False
                yield replace(member, name=name)
        if is_empty:
            raise RefusedError(f"is empty: {'no file matches' if '*' in path else 'no file is in'} {path!r}")

    if split_in(folder.split("/")):
        archive = replace(whole, note="", other_splits=())
    labelled = partial(listed, True)
    return replace(archive, where=where, listed=listed, listed_in=None, with_labels=labelled, table=None)


def _matching(pattern: str) -> Callable[[str], object]:
    """Returns whether a name matches a pattern, as a function."""
    with fsspec_configured():
        from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _elsewhere(uri: str, retry: Retry | None, column: str | None) -> Source:
    """Returns a file or a folder at a URI, or those files of a folder that match a pattern such as `*/*.jpg`."""
    folder, name = split_uri(uri)
    pattern = _PATTERN.fullmatch(uri) if without_queries(uri) == uri else None
    if pattern:
        uri = pattern[1]
    elif name and not folder.endswith("://") and (parent := open_to_read(folder, retry)).exists(name):
        return _one_elsewhere(parent, name, uri, column)
    store = open_to_read(uri, retry)
    wanted = _matching(pattern[2]) if pattern else bool
    entries = [entry for entry in store.list() if wanted(entry.key)]
    if not entries:
        raise MissingInputError(_NOTHING_AT.format(store.uri))
    files = Files(store.uri, tuple(entry.key for entry in entries if not members.is_image(entry.key)), store.open)
    if found := _read_as(files, column, has_images=len(files.names) < len(entries)):
        return found

    def listed() -> Iterator[Member]:
        return (
            Member(entry.key, partial(_read_stored, store, entry), size_bytes=entry.size_bytes) for entry in entries
        )

    # Each image costs a request: archives are read much faster.
    return labelled_beside(Source(store.uri, listed, readers=_BUCKET_READERS), files, column)


def _one_elsewhere(parent: Store, name: str, uri: str, column: str | None) -> Source:
    """Returns the images of a file at a URI."""
    if is_foreign(uri):
        path = fetched(cast("ForeignStore", parent), name, uri)
        alone = Files(parent.uri, (name,), lambda _: path.open("rb"), name)
        return recognised(alone, column) or _archive(parent.uri_of(name), lambda: path.open("rb"), column)
    # Labels of MNIST and of arrays and names of CIFAR's classes lie in files beside the chosen one.
    has_parts = IDX_NAME.fullmatch(name) or name.endswith((".bin", ".npy"))
    names = tuple(entry.key for entry in parent.list()) if has_parts else (name,)
    files = Files(parent.uri, names, parent.open, name)
    return recognised(files, column) or _archive(uri, partial(parent.open, name), column)


def _archive(where: str, opener: Opener, column: str | None) -> Source:
    """Returns a zip or a tar, which may hold files of another format."""
    with members.refusing(where), opener() as file:
        if (start := file.read(4)) in (b"PK\x03\x04", b"PK\x05\x06"):
            with opened_zip(file) as archive:
                names = archive.namelist()
            # The size of a gzipped file in a zip is unknown before it is unpacked.
            others = [name for name in names if not members.is_image(name) and not name.endswith((".gz", "/"))]
            files = Files(where, tuple(others), partial(open_zipped, opener))
            has_images = any(map(members.is_image, names))
            found = None if has_images else recognised(files, column)
            return found or labelled_beside(Source(where, partial(zip_members, opener)), files, column)
        if unread := next_step_by(start):
            raise RefusedError(f"has no images: {unread}")
        first = next(tar_members(opener), None)
    listed = partial(tar_members, opener)
    if first is not None and (found := archive_source(first.name, where, listed, column)):
        return found
    labelled = partial(with_sidecars, where, listed, sidecars(column), column or "", adjacent=True)
    return Source(where, listed, with_labels=labelled if column is not None else None)

"""Opens the source at a path or a URI: a folder of images, archives, or files in another format."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

from job.data.pack_request import PackRequest
from job.data.source import labels, members
from job.data.source.archives import find_tars, tar_members
from job.data.source.formats import FORMATS, next_step
from job.data.source.formats.published import IDX_NAME, archive_source
from job.data.source.formats.tables import has_shards
from job.data.source.labels import Rows
from job.data.source.members import Files, Member, Opener, RefusedError, Source, refused
from job.data.source.survey import are_classes, class_folders
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.progress import Progress, printable
from job.store import (
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
from job.store.files import default_cache_dir

if TYPE_CHECKING:
    from job.store.sources import SourceStore

_BUCKET_READERS = 16
_NOTHING_AT = "there is nothing at {}: give a folder or an archive of images"
_BRACES = re.compile(r"\{.*\}")
_DATASET_JSON = "dataset.json"
"""The table of labels that StyleGAN's and EDM's `dataset_tool.py` writes (Karras et al. 2022)."""
_PATTERN = re.compile(r"([^*]*/)([^/*]*\*.*)")


def chosen_source(request: PackRequest, bucket: Store, check_stop: Callable[[], None]) -> Source:
    """Opens the source of a request, with the split and the labels that are taken; its note says which.

    Args:
        request: a checked one, of a source that is copied.
        bucket: where the dataset goes.
        check_stop: called at each image; raises `StoppedError`.

    Raises:
        MissingInputError: the source or the table of labels does not exist.
        BadRequestError: the table does not belong to the source.
        BadDataError: the source or the table is damaged, or has no such split.
    """
    retry, (file, column) = bucket.retry.elsewhere(), labels.split_labels(request.labels)
    source = open_source(request.place, bucket.uri, retry, None if request.classes is False or file else column)
    notes = [source.note]
    if request.split:
        split = "" if request.split == members.ALL else request.split
        where = f"{source.where}, split {split}" if split else source.where
        source = replace(source, split=split, where=where, other_splits=())
        if next(source.members(), None) is None:
            said = "no file or folder of it is named so. Without --split the command says which splits there are"
            raise BadDataError(f"{source.where} holds no images: {said}")
    rows, folders = _rows(source, file, retry) if file else None, Counter[tuple[str, ...]]()

    def names() -> Iterator[str]:
        # A bare name in a table must be that of one image of all splits.
        for image in (replace(source, split=None) if rows else source).images():
            check_stop()
            folders[members.path_parts(image.name)[:-1]] += 1
            yield image.name

    if rows:
        with members.refusing(rows.where):
            table = labels.join_labels(rows, names(), column)
        source = replace(source, table=table.where, label_by_name=table.of)
        notes.append(f"{table.where}: {table.names!r} names the images, {table.column!r} labels them")
    elif source.split is None:
        deque(names(), maxlen=0)
    # A folder among many that are classes says no split.
    classes = class_folders(set(folders), are_classes).names if folders else ()
    splits = {members.split_of(part) for folder in folders for part in folder if part not in classes} - {""}
    if source.split is None and "train" in splits and len(splits) > 1:
        source = replace(source, split="train", other_splits=tuple(sorted(splits - {"train"})))
        if outside := sum(images for folder, images in folders.items() if not members.split_in(folder)):
            notes.append(f"leaving out all images in none of its splits ({outside:,})")
    if others := " or ".join(f"--split {other}" for other in source.other_splits):
        notes.append(f"packing its split {source.split}; {others} would pack another; all: --split {members.ALL}")
    return replace(source, note="; ".join(filter(None, notes)))


def numbered(request: PackRequest, source: Source, bucket: Store) -> Iterator[tuple[str, Source]]:
    """Yields the columns that `--vector` names, each with the source whose labels are its numbers.

    A number is read as a label is: the rules of tables and formats are the same.

    Args:
        request: a checked one.
        source: its source, as `chosen_source` returns it.
        bucket: where the dataset goes.

    Raises:
        MissingInputError, BadRequestError, BadDataError: as `chosen_source`.
    """
    retry, (file, columns) = bucket.retry.elsewhere(), labels.split_labels(request.vector)
    for column in map(labels.NumberColumn, columns.split(",")):
        if not file:
            opened = replace(open_source(request.place, bucket.uri, retry, column), split=source.split)
            yield column, with_conditions(request, opened, bucket)[0] if request.condition else opened
            continue
        rows = _rows(source, file, retry)
        with members.refusing(rows.where):
            table = labels.join_labels(rows, (image.name for image in replace(source, split=None).images()), column)
        yield table.column, replace(source, with_labels=None, label_by_name=table.of)


def with_conditions(request: PackRequest, source: Source, bucket: Store) -> tuple[Source, Source]:
    """Returns the images of a source, and the condition images that `--condition` names, by equal paths but suffixes.

    These are another source, or of the same one: `:cond` is `a.cond.png` of `a.png`, or a column of a table.

    Args:
        request: a checked one.
        source: its source, as `chosen_source` returns it.
        bucket: where the dataset goes.

    Raises:
        MissingInputError, BadRequestError, BadDataError: as `open_source`.
    """
    retry, word = bucket.retry.elsewhere(), request.condition
    if not word.startswith(":"):
        return source, replace(open_source(word, bucket.uri, retry, None), split=None)
    first = next((member.name for member in source.images()), "")
    if re.search(rf"(?:{FORMATS['tables:table_source']})/[^/]*$", first):
        opened = open_source(request.place, bucket.uri, retry, labels.ImageColumn(word[1:]))
        return source, replace(opened, split=source.split)
    marked = re.compile(rf"(.*)\.{re.escape(word[1:])}(\.[^./]*)")

    def unmarked(member: Member) -> Member | None:
        match = marked.fullmatch(member.name)
        return replace(member, name=match[1] + match[2]) if match else None

    images = source.changed(lambda member: None if marked.fullmatch(member.name) else member)
    return images, replace(source.changed(unmarked), note="")


def _rows(source: Source, file: str, retry: Retry) -> Rows:
    """Returns the table of labels in a file, or else in one of that name beside the images of the source."""
    beside = source.beside
    if not beside or file not in beside.names:
        return labels.read_labels(file, retry)
    if Path(file).exists() and not Path(file).samefile(Path(beside.where, file)):
        there = f"one in {beside.where} and one in this folder, which ./{file} would name"
        raise BadRequestError(f"--labels {file}: there is {there}: choose, or rename one")
    with members.refusing(f"{beside.where}: {file}"):
        return labels.table_in(file, beside.read(file))


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
        DiskFullError: a file has to be fetched, and does not fit the disk.
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
        names = sorted(child.name for child in path.parent.iterdir())
        return _file(_local_files(path.parent, names, path.name), column)


def _local_files(folder: Path, names: Sequence[str], chosen: str = "") -> Files:
    return Files(str(folder), tuple(names), lambda name: (folder / name).open("rb"), chosen, folder)


def _folder(root: Path, bucket: str, column: str | None) -> Source:
    """Returns a local folder in the order of relative paths, without a `bucket` below.

    Raises:
        BadRequestError: the folder is the bucket.
    """
    packed_to = Path(bucket).resolve() if bucket.startswith("/") else None
    if packed_to == root:
        raise BadRequestError(f"{root} is both SOURCE and bucket: choose another --bucket")

    def below(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(folder) as scan:
                # The order of whole paths, as in a bucket: a-b/x comes before a/x.
                children = sorted(scan, key=lambda child: child.name + "/" * child.is_dir(follow_symlinks=False))
        except PermissionError:
            # Some hidden folders are for the system alone.
            if not members.is_hidden(prefix):
                raise
            return
        for child in children:
            if child.is_dir(follow_symlinks=False) and Path(child.path) != packed_to:
                yield from below(Path(child.path), f"{prefix}{child.name}/")
            elif not child.is_dir(follow_symlinks=False):
                yield prefix + child.name, child

    def member(name: str, child: os.DirEntry[str]) -> Member:
        read = partial(_read_file, Path(child.path))
        if members.is_hidden(name) or not (members.is_image(name) or child.is_dir()):
            return Member(name, read)
        # A link to a folder could form a cycle.
        if not child.is_file() or (child.is_symlink() and not Path(child.path).resolve().is_relative_to(root)):
            raise refused(name, "is not a file, or links to a folder or outside: put a copy in its place")
        with members.refusing(f"{root}: entry {name!r}"):
            return Member(name, read, size_bytes=child.stat().st_size)

    names, has_images = list[str](), False
    for name, child in below(root, ""):
        if members.is_image(name):
            has_images = True
        elif not members.is_hidden(name) and child.is_file():
            names.append(name)
    images = Source(str(root), lambda: (member(name, child) for name, child in below(root, "")))
    return _read_as(_local_files(root, names), images, has_images, column)


def _read_file(path: Path) -> bytes:
    members.check_size(path.stat().st_size)
    return path.read_bytes()


def _elsewhere(uri: str, retry: Retry | None, column: str | None) -> Source:
    """Returns a file or a folder at a URI, or those files of a folder that match a pattern such as `*/*.jpg`."""
    folder, name = split_uri(uri)
    pattern = _PATTERN.fullmatch(uri) if without_queries(uri) == uri else None
    if pattern:
        uri = pattern[1]
    elif name and not folder.endswith("://") and (parent := open_to_read(folder, retry)).exists(name):
        if is_foreign(uri):
            path = _fetched(cast("SourceStore", parent), name, uri)
            return _file(Files(parent.uri, (name,), lambda _: path.open("rb"), name), column)
        # Labels of MNIST and of arrays and names of CIFAR's classes lie in files beside the chosen one.
        has_parts = IDX_NAME.fullmatch(name) or name.endswith((".bin", ".npy"))
        names = tuple(entry.key for entry in parent.list()) if has_parts else (name,)
        return _file(Files(parent.uri, names, parent.open, name), column)
    store = open_to_read(uri, retry)
    wanted = _matching(pattern[2]) if pattern else bool

    def read(key: str, size_bytes: int) -> bytes:
        members.check_size(size_bytes)
        return store.read(key).data

    entries = [(entry.key, entry.size_bytes) for entry in store.list() if wanted(entry.key)]
    listed = [Member(key, partial(read, key, size_bytes), size_bytes=size_bytes) for key, size_bytes in entries]
    if not listed:
        raise MissingInputError(_NOTHING_AT.format(store.uri))
    names = tuple(key for key, _ in entries if not members.is_image(key))
    # Each image costs a request: archives are read much faster.
    images = Source(store.uri, lambda: iter(listed), readers=_BUCKET_READERS)
    return _read_as(Files(store.uri, names, store.open), images, len(names) < len(listed), column)


def _matching(pattern: str) -> Callable[[str], object]:
    """Returns whether a name matches a pattern, as a function."""
    with fsspec_configured():
        from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _place(source: str) -> Path:
    return default_cache_dir() / "sources" / hashlib.sha256(source.encode()).hexdigest()[:32]


def _fetched(store: SourceStore, key: str, source: str) -> Path:
    """Fetches the file `key` of a store, at the URL `source`, into the cache, where it stays until it is packed.

    Returns its local path. A fetch that breaks off begins again.
    """
    about, where = store.about(key), store.uri_of(key)
    if not about.size_bytes:
        raise BadDataError(f"the server does not give the size of {where}: download it, and pack the file")
    whole = _place(source) / hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    if whole.exists():
        return whole
    with Progress(f"fetching {key}", total=about.size_bytes >> 20, unit="MiB") as bar:
        store.report = lambda received_bytes: bar.update(received_bytes >> 20)
        store.download(key, whole)
    return whole


def forget(*sources: str) -> None:
    """Removes the fetched files of sources, after they are packed or refused."""
    for source in sources:
        inside, archive = split_chain(source)
        if inside:
            forget(archive)
        elif is_foreign(source):
            shutil.rmtree(_place(source), ignore_errors=True)


def _file(files: Files, column: str | None) -> Source:
    """Returns the images of the chosen file."""
    return _recognised(files, column) or _archive(files.place, partial(files.open, files.chosen), column)


def _recognised(files: Files, column: str | None) -> Source | None:
    """Returns the images of a format that is not a folder or an archive; None if the names say nothing.

    Args:
        files: the files of the place.
        column: the label to take where a format has several; empty for the usual one, None for no labels.

    Raises:
        BadRequestError: there are several labels, or a library is missing.
    """
    readers = (resolve_name(f"job.data.source.formats.{reader}") for reader in FORMATS)
    return next(filter(None, (reader(files, column) for reader in readers)), None)


def _read_as(files: Files, images: Source, has_images: bool, column: str | None) -> Source:
    """Returns the images of a folder, or those in its files of other formats if these are the dataset."""
    if not has_images or has_shards(files.names):
        if found := _recognised(files, column):
            # A dataset of the hub may show some of its images on its page.
            beside = "leaving out the images beside its tables" if has_images else ""
            return replace(found, note="; ".join(filter(None, (found.note, beside))), beside=files)
        archives = [name for name in files.names if name.lower().endswith(members.ARCHIVES)] if not has_images else []
        opened = [(name, partial(files.open, name)) for name in archives]
        if len(opened) == 1:
            one = _archive(f"{files.where}/{opened[0][0]}", opened[0][1], column)
            return replace(one, beside=files) if len(files.names) > 1 else one
        if opened:
            return replace(_archives(files.where, opened, column), beside=files)
    return _labelled_beside(images, files, column)


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

    if members.split_in(folder.split("/")):
        archive = replace(whole, note="", other_splits=())
    labelled = partial(listed, True)
    return replace(
        archive, where=where, listed=listed, listed_in=None, with_labels=labelled, table="", label_by_name=None
    )


def _archive(where: str, opener: Opener, column: str | None) -> Source:
    """Returns a zip or a tar, which may hold files of another format."""
    with members.refusing(where), opener() as file:
        if (start := file.read(4)) in (b"PK\x03\x04", b"PK\x05\x06"):
            with members.opened_zip(file) as archive:
                names = archive.namelist()
            # The size of a gzipped file in a zip is unknown before it is unpacked.
            others = [name for name in names if not members.is_image(name) and not name.endswith((".gz", "/"))]
            files = Files(where, tuple(others), partial(members.open_zipped, opener))
            has_images = any(map(members.is_image, names))
            found = None if has_images else _recognised(files, column)
            return found or _labelled_beside(Source(where, partial(members.zip_members, opener)), files, column)
        if unread := next_step(start=start):
            raise RefusedError(f"has no images: {unread}")
        first = next(tar_members(opener), None)
    listed = partial(tar_members, opener)
    if first is not None and (found := archive_source(first.name, where, listed, column)):
        return found
    labelled = partial(labels.with_sidecars, where, listed, column)
    return Source(where, listed, with_labels=labelled if column is not None else None)


def _labelled_beside(source: Source, files: Files, column: str | None) -> Source:
    """Returns the images of a source with the labels of a `dataset.json`, else those in a `.cls` beside each image.

    A `.json` beside each image is read if a person names a key of it: of images elsewhere it costs a request each.

    Raises:
        BadRequestError: several files name labels, and `column` is not None.
    """
    if others := list(filter(members.is_data_file, files.names)):
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        said = f"packing its images, and not those in {printable(others[0])}{more}: name these to pack them"
        source = replace(source, note="; ".join(filter(None, (source.note, said))))
    source = replace(source, beside=files)
    tables = [name for name in files.names if name.rpartition("/")[2] == _DATASET_JSON]
    # A person who names a column means another one than the only one here.
    if tables and column == "":
        with members.refusing(f"{files.where}: {tables[0]}"):
            found = labels.json_of(labels.text_of(files.read(tables[0])))
            if isinstance(found, dict) and found.get("labels"):
                if len(tables) > 1:
                    said = f"{files.where} has several tables of labels, {tables[0]}, {tables[1]} …"
                    raise BadRequestError(f"{said}: pack one of their folders, or use --no-classes")
                folder = tables[0].removesuffix(_DATASET_JSON)
                pairs = [(folder + name, label) for name, label in labels.pairs_in(found)]
                return replace(source, table=tables[0], label_by_name=labels.labels_of_pairs(tables[0], pairs).of)
    if any(name.lower().endswith(labels.sidecars(column, adjacent=False)) for name in files.names):
        labelled = partial(labels.with_sidecars, source.where, source.listed, column, adjacent=False)
        return replace(source, with_labels=labelled)
    return source

"""WebDataset tars of other people, which become a dataset where they lie: which a person means, and what is in them.

A sample is what lies side by side under one key, the name up to the first dot of its last component: `000000000.jpg`,
`.txt` and `.json` of img2dataset, or an image and its class in a `.cls` (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from job.data.shards import TAR_URI, Digests, split_uri
from job.data.sources import SUFFIXES, Member, Sample, Source, is_litter, refusing, tar_members
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.store import Retry, Store, open_store
from job.store.base import is_key

MOST_TARS = 100_000
"""What the five digits in a shard's name can count."""

_ENDLESS = re.compile(r"[1-9]\d{6}\.\.|\.\.-?0*[1-9]\d{6}")
_SAMPLE_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_CLASS = re.compile(rb"\s*(\d{1,5})\s*")
_CLASS_BYTES = 64
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


@dataclass(frozen=True)
class ForeignTar:
    """A plain tar in somebody's bucket or folder: the store and key to read it with, and its size."""

    store: Store
    key: str
    bytes: int

    @property
    def uri(self) -> str:
        """Absolute, and the same however it was typed."""
        return self.store.uri_of(self.key)

    def samples(self, digests: Digests | None = None) -> Iterator[Sample]:
        """All samples that have an image, in order; `digests` take every byte of the tar meanwhile.

        Raises:
            BadDataError: the tar is unsafe, truncated or damaged; it names the entry.
            BadRequestError: it is compressed.
        """
        tar = split_uri(self.key)[1]
        for _, files in groupby(self._files(digests), key=lambda file: file[0]):
            image: Sample | None = None
            label, has_plain_name = -1, False
            for _, suffix, member in files:
                is_plain, is_image = f".{suffix}" in SUFFIXES, f".{suffix.rpartition('.')[2]}" in SUFFIXES
                with refusing(f"{self.uri}: entry {member.name!r}"):
                    # `photo.jpg` is meant where there is a `photo.mask.png` as well.
                    if is_image and (image is None or (is_plain and not has_plain_name)):
                        image = Sample(f"{tar}/{member.name}", member.read(), offset=member.offset)
                        has_plain_name = is_plain
                    elif suffix == "cls" and (match := _CLASS.fullmatch(member.read()[:_CLASS_BYTES])):
                        label = int(match[1])
            if image is not None:
                yield replace(image, label=label)

    def _files(self, digests: Digests | None) -> Iterator[tuple[str, str, Member]]:
        """Key, suffix and the file itself, of each that belongs to a sample."""
        for member in Source(self.uri, partial(tar_members, self._open, digests)).members():
            if not is_litter(member.name) and (match := _SAMPLE_KEY.fullmatch(member.name)):
                yield match[1], match[2].lower(), member

    def _open(self) -> BinaryIO:
        file = self.store.open(self.key)
        if file.read(6).startswith(_COMPRESSED):
            raise BadRequestError(
                f"{self.uri} is compressed, and no image can be read from its middle: pack it with `ddpm data pack`, "
                "or unpack it to a plain .tar"
            )
        file.seek(0)
        return file


def find_tars(words: Iterable[str], retry: Retry | None = None) -> list[ForeignTar]:
    """The tars that `words` name, in that order; those of a folder in key order, with those of its sub-folders.

    Args:
        words: URIs of tars and folders, or patterns of such, which are expanded as a shell does it.
        retry: with which their buckets are opened.

    Raises:
        MissingInputError: there is nothing at one of them.
        BadRequestError: a pattern that is none, the same tar twice, or more than `MOST_TARS`.
        BadDataError: a folder without tars.
    """
    tars: dict[str, ForeignTar] = {}
    for word in words:
        for tar in _tars_at(word, retry):
            if tar.uri in tars:
                raise BadRequestError(f"{tar.uri} is named twice: its images would count twice")
            if not re.fullmatch(TAR_URI, tar.uri) or re.search("[\ud800-\udfff]", tar.uri):
                raise BadRequestError(f"{tar.uri!r} has bytes in its name that no index can hold: rename it")
            tars[tar.uri] = tar
            if len(tars) > MOST_TARS:
                raise BadRequestError(f"more than {MOST_TARS:,} tars: a dataset has no names for so many shards")
    return list(tars.values())


def _expanded(pattern: str) -> list[str]:
    if "{" not in pattern and "}" not in pattern:
        return [pattern]
    try:
        # Each range is held in memory whole, so its ends are looked at first.
        uris = [] if _ENDLESS.search(pattern) else list(islice(braceexpand(pattern, escape=False), MOST_TARS + 1))
    except (ValueError, RecursionError):
        raise BadRequestError(f"{pattern!r}: write a pattern as {{00000..00099}} or {{a,b}}") from None
    if not 0 < len(uris) <= MOST_TARS:
        raise BadRequestError(f"{pattern!r} stands for more than {MOST_TARS:,} tars")
    return uris


def _tars_at(word: str, retry: Retry | None) -> Iterator[ForeignTar]:
    uris = [uri.rstrip("/") for uri in _expanded(word)]
    stores: dict[str, Store] = {}
    listed: dict[str, dict[str, int]] = {}
    for uri in uris:
        folder, name = split_uri(uri) if "/" in uri else (".", uri)
        # A bucket itself lies in no folder.
        if folder.endswith(":/") or name in ("", "~", "..", "."):
            yield from _tars_below(open_store(uri, retry))
            continue
        if folder not in stores:
            stores[folder] = store = open_store(folder, retry)
            # A pattern costs a bucket one listing, instead of a question for each tar.
            if len(uris) > 1 and "://" in store.uri:
                listed[folder] = {entry.key: entry.size_bytes for entry in store.list()}
        store = stores[folder]
        size_bytes = listed[folder].get(name) if folder in listed else _size_bytes(store, name)
        if size_bytes is None:
            yield from _tars_below(open_store(uri, retry))
        else:
            yield ForeignTar(store, name, size_bytes)


def _tars_below(store: Store) -> Iterator[ForeignTar]:
    nowhere = store.uri.startswith("/") and not Path(store.uri).is_dir()
    objects = [] if nowhere else list(store.list())
    if not objects:
        raise MissingInputError(f"there is nothing at {store.uri}: give tars, a pattern, or a folder of tars")
    tars = [entry for entry in objects if entry.key.endswith(".tar") and not is_litter(entry.key)]
    if not tars:
        raise BadDataError(f"{store.uri} holds no .tar: only tars that are not compressed can be indexed in place")
    for entry in tars:
        yield ForeignTar(store, entry.key, entry.size_bytes)


def _size_bytes(store: Store, name: str) -> int | None:
    if not is_key(name) or not store.exists(name):
        return None
    with store.open(name) as file:
        return file.seek(0, io.SEEK_END)

"""WebDataset tars that are indexed in place: finds them, and reads their samples.

A sample consists of adjacent files with the same key, the path up to the first dot of the file's name: `000000000.jpg`,
`.txt` and `.json` of img2dataset, or an image and its class in a `.cls` (https://github.com/webdataset/webdataset). Of
several images under a key the one with the plain name is taken, `a.jpg` beside `a.mask.png`. Without a plain name, or
with numbers such as `a.1.jpg`, the choice is ambiguous, and the tar is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice

from braceexpand import braceexpand

from job.data.archives import tar_members
from job.data.labels import SAMPLE_KEY, sidecar_label, sidecars
from job.data.members import SUFFIXES, Member, RefusedError, is_hidden, refusing
from job.data.shards import Digests, is_tar_uri
from job.data.source import Source
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.progress import printable
from job.store import Retry, Store, open_to_read, split_uri, without_queries

MOST_TARS = 1_000_000
"""The number of tars that a pattern of six digits can count; the index names each, and is held in memory."""

_CLASS = re.compile(r"0|[1-9]\d{0,4}")


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that is being packed.

    Attributes:
        name: name of its file.
        content: its encoded bytes.
        label: its class; -1 without one.
        offset: position of the content in a tar that stays in place.
    """

    name: str
    content: bytes
    label: int = -1
    offset: int = -1


@dataclass(frozen=True)
class ForeignTar:
    """A plain tar in a bucket or a folder: its store, key and size."""

    store: Store
    key: str
    bytes: int

    @property
    def uri(self) -> str:
        """Returns the absolute URI, which is the same for all spellings."""
        return self.store.uri_of(self.key)

    def samples(self, digests: Digests | None = None, label_key: str | None = "") -> Iterator[Sample]:
        """Yields all samples that have an image, in order, and updates `digests` with every byte of the tar.

        `label_key` is that of the labels in `.json` files, None for no labels; see `sidecar_label`.

        Raises:
            BadDataError: the tar is unsafe, truncated, damaged or compressed, or a sample has several possible images;
                the message names the entry.
        """
        tar, suffixes = split_uri(self.key)[1], sidecars(label_key)
        for key, files in groupby(self._files(digests), key=lambda file: file[0]):
            image: Sample | None = None
            labels, plain_names, is_numbered, names = dict[str, str](), 0, False, list[str]()
            for _, suffix, member in files:
                is_plain = f".{suffix}" in SUFFIXES
                with refusing(f"{self.uri}: entry {member.name!r}"):
                    if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
                        names.append(member.name)
                        is_numbered |= suffix[0].isdigit()
                        # `photo.jpg` is the image, `photo.mask.png` is not.
                        if image is None or (is_plain and not plain_names):
                            image = Sample(f"{tar}/{member.name}", member.read(), offset=member.offset)
                        plain_names += is_plain
                    elif f".{suffix}" in suffixes:
                        labels[suffix] = said = sidecar_label(suffix, member.read(), label_key or "")
                        if said and not _CLASS.fullmatch(said):
                            said = f"has the label {said!r}, and no number up to 99999"
                            raise RefusedError(f"{said}: `ddpm data pack` takes names, --no-classes no labels")
            # `photo.1.jpg` belongs to another image than `photo.jpg`.
            if len(names) > 1 and (is_numbered or plain_names != 1):
                raise BadDataError(
                    f"{self.uri}: {names[0]!r} and {names[1]!r} would be one sample, for its key ends at the first dot "
                    "of a name, and one image would be lost: rename them, or pack the tar with `ddpm data pack`"
                )
            label = next(filter(None, map(labels.get, ("cls", "json"))), "-1")
            if image is not None:
                yield replace(image, label=int(label))
            elif labels.get("cls"):
                raise BadDataError(f"{self.uri}: entry {f'{key}.cls'!r} labels no image beside it: put it there")

    def _files(self, digests: Digests | None) -> Iterator[tuple[str, str, Member]]:
        """Yields the key and suffix of each file of a sample, and the file."""
        for member in Source(self.uri, partial(tar_members, partial(self.store.open, self.key), digests)).members():
            if not is_hidden(member.name) and (match := SAMPLE_KEY.fullmatch(member.name)):
                yield match[1], match[2].lower(), member


def find_tars(words: Iterable[str], retry: Retry | None = None) -> list[ForeignTar]:
    """Finds the tars that `words` name, in that order; those of a folder and its sub-folders in key order.

    Args:
        words: URIs of tars and folders, or brace patterns, which are expanded as in a shell.
        retry: how operations on their buckets are repeated.

    Raises:
        MissingInputError: a tar does not exist, or a folder holds no tar.
        BadRequestError: a wrong pattern, the same tar twice, or more than `MOST_TARS`.
    """
    tars: dict[str, ForeignTar] = {}
    for word in words:
        if without_queries(word) != word:
            raise BadRequestError(f"{without_queries(word)}?…: its query may be a signature, which an index would show")
        for tar in _tars_at(word, retry):
            if tar.uri in tars:
                raise BadRequestError(f"{tar.uri} is named twice: its images would count twice")
            if not is_tar_uri(tar.uri) or printable(tar.uri) != tar.uri:
                raise BadRequestError(f"{tar.uri!r} cannot be in an index: http:// and control characters may not")
            tars[tar.uri] = tar
            if len(tars) > MOST_TARS:
                raise BadRequestError(f"more than {MOST_TARS:,} tars: index them as several datasets")
    return list(tars.values())


def _tars_at(word: str, retry: Retry | None) -> Iterator[ForeignTar]:
    try:
        # braceexpand would keep the whole range in memory.
        if re.search(r"\d{7}\.\.|\.\.-?\d{7}", word):
            raise ValueError
        uris = list(islice(braceexpand(word, escape=False), MOST_TARS + 1))
    except (ValueError, RecursionError):
        said = f"{word!r}: write a pattern as {{00000..00099}} or {{a,b}}, of numbers up to six digits"
        raise BadRequestError(said) from None
    listed: dict[str, dict[str, ForeignTar]] = {}
    for uri in uris:
        folder, name = split_uri(uri) if "/" in uri else (".", uri)
        if ".tar" not in name:
            yield from _tars_below(open_to_read(uri, retry))
        elif len(uris) == 1:
            store = open_to_read(folder, retry)
            with store.open(name) as file:
                yield ForeignTar(store, name, file.seek(0, io.SEEK_END))
        else:
            # A pattern costs one listing per folder, instead of a request per tar.
            if folder not in listed:
                listed[folder] = {tar.key: tar for tar in _tars_below(open_to_read(folder, retry))}
            if name not in listed[folder]:
                raise MissingInputError(f"there is nothing at {uri}")
            yield listed[folder][name]


def _tars_below(store: Store) -> Iterator[ForeignTar]:
    tars = [entry for entry in store.list() if entry.key.endswith(".tar") and not is_hidden(entry.key)]
    if not tars:
        raise MissingInputError(f"{store.uri} holds no .tar")
    for entry in tars:
        yield ForeignTar(store, entry.key, entry.size_bytes)

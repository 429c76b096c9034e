"""The files in a tar, and the samples of WebDataset tars that are indexed in place.

Nothing is extracted to a disk; an unsafe, truncated or damaged archive is refused.

A sample consists of adjacent files with the same key, the path up to the first dot of the file's name: `000000000.jpg`,
`.txt` and `.json` of img2dataset, or an image and its class in a `.cls` (https://github.com/webdataset/webdataset). Of
several images under a key the one with the plain name is taken, `a.jpg` beside `a.mask.png`. Without a plain name, or
with numbers such as `a.1.jpg`, the choice is ambiguous, and the tar is refused.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import IO, BinaryIO, cast

from braceexpand import braceexpand

from job.data.shards import Digests, is_tar_uri
from job.data.source import members
from job.data.source.labels import sample_key, with_sidecars
from job.data.source.members import Member, Opener, RefusedError, Source, refused
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.progress import printable
from job.store import Retry, Store, open_to_read, split_uri, without_queries

MOST_TARS = 1_000_000
"""The number of tars that a pattern of six digits can count; the index names each, and is held in memory."""

_SKIPPED_BYTES = 1 << 20
_CLASS = re.compile(r"0|[1-9]\d{0,4}")


def tar_members(opener: Opener, digests: Digests | None = None) -> Iterator[Member]:
    """Yields the files of a tar, plain or gzipped, in stream order, and checks that the tar is complete.

    `digests` are updated with every byte of it; then it must be plain.
    """
    with opener() as file:
        stream = _TarStream(file, digests)
        try:
            archive = tarfile.TarFile(fileobj=cast(BinaryIO, stream))
        except tarfile.TarError:
            with suppress(zipfile.BadZipFile, ValueError, OSError):
                members.opened_zip(file)
            raise RefusedError("is damaged, or not a .zip, .tar, .tar.gz or MNIST idx file") from None
        while (member := archive.next()) is not None:
            # tarfile would keep every header, and memory would grow with the archive.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0:
                raise refused(member.name, f"has a size of {member.size:,} bytes: do not trust this archive")
            if member.isreg() and not member.issparse():
                content = cast(IO[bytes], archive.extractfile(member))
                read = partial(members.read_exactly, content, member.size)
                yield Member(member.name, read, member.offset_data, member.size)
            elif not member.isdir():
                raise refused(member.name, "is a link or a device: do not trust this archive")
        stream.finish()


class _TarStream:
    """The stream from which `tarfile` reads: forward only, with limited reads, and a check that the tar is complete."""

    def __init__(self, file: BinaryIO, digests: Digests | None) -> None:
        """Reads every byte for `digests`; without them, skips the content that is not read."""
        self._file, self._limit_bytes = members.unpacked(file)
        if digests is not None and self._file is not file:
            raise RefusedError("is compressed: pack it with `ddpm data pack`, or unpack it to a plain .tar")
        self._digests, self._position, self._last_block = digests, 0, b""

    def tell(self) -> int:
        """Returns the position in the unpacked stream."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes forward to `position`."""
        if position < self._position:
            raise tarfile.ReadError(f"a header that leads back to byte {position}")
        if position > self._limit_bytes:
            raise RefusedError(members.EXPANDS)
        if self._digests is None:
            self._position = self._file.seek(position)
        while self._position < position:
            if not self.read(min(position - self._position, _SKIPPED_BYTES)):
                raise EOFError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """Returns the next bytes."""
        # A header may give itself any length, and tarfile would allocate that.
        if not 0 <= size <= members.ENTRY_BYTES:
            raise tarfile.ReadError(f"a block of {size:,} bytes")
        self._last_block = self._file.read(size)
        self._position += len(self._last_block)
        if self._position > self._limit_bytes:
            raise RefusedError(members.EXPANDS)
        if self._digests is not None:
            self._digests.update(self._last_block)
        return self._last_block

    def finish(self) -> None:
        """Checks the end mark and the rest: to `tarfile` a tar also ends at zeros in place of a header."""
        if self._last_block != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end mark")
        # gzip compares its checksum at the end of the stream.
        while block := self.read(_SKIPPED_BYTES):
            if block.strip(b"\0"):
                raise RefusedError("holds more behind its end mark: was it joined by `cat`? Unpack it, pack the folder")


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that is being packed.

    Attributes:
        name: name of its file.
        content: its encoded bytes.
        label: its class; -1 without one.
        offset: position of the content in a tar that stays in place.
        numbers: its vector by name.
        condition: its condition image, encoded.
    """

    name: str
    content: bytes
    label: int = -1
    offset: int = -1
    numbers: Mapping[str, float] | None = None
    condition: bytes | None = None


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
        tar = split_uri(self.key)[1]
        source = Source(self.uri, partial(tar_members, partial(self.store.open, self.key), digests))

        def listed() -> Iterator[Member]:
            for member in source.members():
                if members.is_image(member.name):
                    with members.refusing(f"{self.uri}: entry {member.name!r}"):
                        # A tar is a stream: what is not read before the next file is gone.
                        member = replace(member, read=partial(bytes, member.read()))
                yield member

        with members.refusing(self.uri):
            labelled = with_sidecars(self.uri, listed, label_key)
            for key, files in groupby(filter(lambda file: members.is_image(file.name), labelled), sample_key):
                images = list(files)
                # `photo.jpg` is the image, `photo.mask.png` is not, and `photo.1.jpg` belongs to another one.
                plain = [image for image in images if image.name[len(key) :].lower() in members.SUFFIXES]
                if len(images) > 1 and (len(plain) != 1 or any(image.name[len(key) + 1].isdigit() for image in images)):
                    said = f"{images[0].name!r} and {images[1].name!r} would be one sample, for its key ends at the"
                    said += " first dot of a name: rename them, or pack the tar with `ddpm data pack`"
                    raise BadDataError(f"{self.uri}: {said}")
                image = (plain or images)[0]
                if image.label and not _CLASS.fullmatch(image.label):
                    said = f"has the label {image.label!r}, and no number up to 99999"
                    raise refused(image.name, f"{said}: `ddpm data pack` takes names, --no-classes no labels")
                yield Sample(f"{tar}/{image.name}", image.read(), int(image.label or -1), image.offset)


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
            yield from _tars_below(open_to_read(uri, retry)).values()
        elif len(uris) == 1:
            store = open_to_read(folder, retry)
            with store.open(name) as file:
                yield ForeignTar(store, name, file.seek(0, io.SEEK_END))
        else:
            # A pattern costs one listing per folder, instead of a request per tar.
            if folder not in listed:
                listed[folder] = _tars_below(open_to_read(folder, retry))
            if name not in listed[folder]:
                raise MissingInputError(f"there is nothing at {uri}")
            yield listed[folder][name]


def _tars_below(store: Store) -> dict[str, ForeignTar]:
    """Returns the tars of a folder and its sub-folders by key."""
    tars = {
        entry.key: ForeignTar(store, entry.key, entry.size_bytes)
        for entry in store.list()
        if entry.key.endswith(".tar") and not members.is_hidden(entry.key)
    }
    if not tars:
        raise MissingInputError(f"{store.uri} holds no .tar")
    return tars

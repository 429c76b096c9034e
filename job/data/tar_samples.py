"""The samples of a WebDataset tar, each with the place of its image, and the hashes of the tar: all in one reading.

A sample is what lies side by side under one key, the name up to the first dot of its last component: `000000000.jpg`,
`.txt` and `.json` of img2dataset, or an image and its class in a `.cls` (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import BinaryIO

import google_crc32c

from job.data.archives import Tar, TarStream
from job.data.members import SUFFIXES, Member, RefusedError, is_litter, path_parts, refusing
from job.data.tar_uris import TarUri
from job.exits import BadRequestError

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_CLASS = re.compile(rb"\s*(\d{1,5})\s*")
_CLASS_BYTES = 64
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_IMAGES_PER_SAMPLE = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """An image as it lies in a tar.

    Attributes:
        name: of its file.
        content: its encoded bytes.
        offset: where they begin in the tar.
        label: its class; -1 without one.
    """

    name: str
    content: bytes
    offset: int
    label: int = -1


@dataclass
class _Parts:
    """Of one sample, while its files go by."""

    key: str
    images: list[tuple[str, Sample]] = field(default_factory=list)
    label: int = -1

    def take(self, suffix: str, name: str, member: Member) -> None:
        assert member.read is not None
        if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
            if len(self.images) == _IMAGES_PER_SAMPLE:
                raise RefusedError(
                    f"is one of more than {_IMAGES_PER_SAMPLE} images of sample {self.key!r}: samples are told apart "
                    "by what their names have before the first dot"
                )
            self.images.append((suffix, Sample(name, member.read(), member.offset)))
        elif suffix == "cls" and (match := _CLASS.fullmatch(member.read()[:_CLASS_BYTES])):
            self.label = int(match[1])

    def sample(self) -> Sample | None:
        # `photo.jpg` is meant where there is a `photo.mask.png` as well.
        images = sorted(self.images, key=lambda image: f".{image[0]}" not in SUFFIXES)
        return replace(images[0][1], label=self.label) if images else None


class SampledTar(Tar):
    """A plain tar that is read once, from its first byte to its last."""

    def __init__(self, tar: TarUri) -> None:
        """Opens nothing yet."""
        super().__init__(tar.uri, partial(tar.store.open, tar.key), gzipped=False)
        self._stream: _HashingStream | None = None

    def stream(self, file: BinaryIO) -> TarStream:
        """One that reads everything, for the hashes."""
        if file.read(6).startswith(_COMPRESSED):
            raise BadRequestError(
                f"{self.where} is compressed, and no image can be read from its middle: pack it with `ddpm data pack`, "
                "or unpack it to a plain .tar"
            )
        file.seek(0)
        self._stream = _HashingStream(file, self.limit_bytes, skips=False)
        return self._stream

    def samples(self) -> Iterator[Sample]:
        """All samples that have an image, in order; the hashes are there once they are exhausted.

        Raises:
            BadDataError: the tar is unsafe, truncated or damaged, or two of its files have one name; it names which.
            BadRequestError: it is compressed.
        """
        for key, group in groupby(self._files(), key=lambda file: file[0]):
            parts = _Parts(key)
            for _, suffix, name, member in group:
                with refusing(f"{self.where}: entry {name!r}"):
                    parts.take(suffix, name, member)
            if (sample := parts.sample()) is not None:
                yield sample

    @property
    def bytes(self) -> int:
        """Size of the tar."""
        assert self._stream is not None
        return self._stream.tell()

    @property
    def sha256(self) -> str:
        """Of the whole tar."""
        assert self._stream is not None
        return self._stream.sha256.hexdigest()

    @property
    def crc32c(self) -> str:
        """Of the whole tar."""
        assert self._stream is not None
        return f"{self._stream.crc32c:08x}"

    def _files(self) -> Iterator[tuple[str, str, str, Member]]:
        """Key, suffix and name of each file that belongs to a sample."""
        seen: set[str] = set()
        for name, member in self.checked_members():
            if member.read is None or any(map(is_litter, path_parts(name))):
                continue
            if name in seen:
                with refusing(self.where):
                    raise RefusedError(f"has the entry {name!r} more than once: do not trust this archive")
            seen.add(name)
            if match := _KEY.fullmatch(name):
                yield match[1], match[2].lower(), name, member


class _HashingStream(TarStream):
    def __init__(self, file: BinaryIO, limit_bytes: float, *, skips: bool) -> None:
        super().__init__(file, limit_bytes, skips=skips)
        self.sha256, self.crc32c = hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self.sha256.update(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        return data

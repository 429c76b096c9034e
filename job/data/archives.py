"""The files in a zip or a tar, which is never extracted to a disk and is refused if it is not what it says."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from typing import IO, BinaryIO, cast

from job.data.members import (
    ENTRY_BYTES,
    EXPANSION,
    Member,
    Opener,
    RefusedError,
    is_image,
    read_exactly,
    refused,
    unpacked,
)
from job.data.shards import Digests

_EXPANDS = f"unpacks to more than {EXPANSION} times its size: do not trust this archive"
_SKIPPED_BYTES = 1 << 20


def zip_members(opener: Opener) -> Iterator[Member]:
    """A zip archive, in the order of its directory."""
    with opener() as file:
        _, limit_bytes = unpacked(file)
        with zipfile.ZipFile(file) as archive:
            if sum(info.file_size for info in archive.infolist() if is_image(info.filename)) > limit_bytes:
                raise RefusedError(_EXPANDS)
            for info in archive.infolist():
                if not info.is_dir():
                    yield Member(info.filename, partial(_read_zipped, archive, info), size_bytes=info.file_size)


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as stream:
        return read_exactly(stream, info.file_size)


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
                raise refused(member.name, f"has a size of {member.size:,} bytes: do not trust this archive")
            if member.isreg() and not member.issparse():
                content = cast(IO[bytes], archive.extractfile(member))
                yield Member(member.name, partial(read_exactly, content, member.size), member.offset_data, member.size)
            elif not member.isdir():
                raise refused(member.name, "is a link or a device: do not trust this archive")
        stream.finish()


class _TarStream:
    """What `tarfile` reads from: it only goes forward, bounds each read, and knows whether the archive was whole."""

    def __init__(self, file: BinaryIO, digests: Digests | None) -> None:
        """With `digests` everything is read; else, what nobody wants is skipped."""
        self._file, self._limit_bytes = unpacked(file)
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


def open_zipped(opener: Opener, name: str) -> BinaryIO:
    """One file of a zip, as a stream."""
    file = opener()
    _, limit_bytes = unpacked(file)
    archive = zipfile.ZipFile(file)
    if archive.getinfo(name).file_size > limit_bytes:
        raise RefusedError(_EXPANDS)
    return cast(BinaryIO, archive.open(name))

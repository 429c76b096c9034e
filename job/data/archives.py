"""The files in a zip or a tar. Nothing is extracted to a disk; an unsafe, truncated or damaged archive is refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import IO, BinaryIO, cast

from job.data import members
from job.data.members import Member, Opener, RefusedError
from job.data.shards import Digests

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
"""Suffixes of the archives of which a folder may consist."""
EXPANDS = f"unpacks to more than {members.EXPANSION} times its size: do not trust this archive"

_SMALL_BYTES = 1 << 24
"""A file of an archive may have as many bytes, however small the archive is."""
_SKIPPED_BYTES = 1 << 20


def opened_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Opens a zip; raises `RefusedError` for anything before its first entry, such as another zip, or odd names."""
    try:
        # zipfile takes names without a flag for those of DOS; Linux and macOS write them in UTF-8.
        archive = zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        raise RefusedError("has names that are not in UTF-8: unpack it, and pack the folder") from None
    if first := min((info.header_offset for info in archive.infolist()), default=archive.start_dir):
        raise RefusedError(
            f"has {first:,} bytes before its first entry, and images in them would be lost: was it joined by `cat`, or "
            "is it a self-extracting program? Unpack it, and pack the folder"
        )
    return archive


def zip_members(opener: Opener) -> Iterator[Member]:
    """Yields the files of a zip, in the order of its directory."""
    with opener() as file:
        _, limit_bytes = members.unpacked(file)
        with opened_zip(file) as archive:
            if sum(info.file_size for info in archive.infolist() if members.is_image(info.filename)) > limit_bytes:
                raise RefusedError(EXPANDS)
            for info in archive.infolist():
                if not info.is_dir():
                    yield Member(info.filename, partial(_read_zipped, archive, info), size_bytes=info.file_size)


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as stream:
        return members.read_exactly(stream, info.file_size)


def open_zipped(opener: Opener, name: str) -> BinaryIO:
    """Opens one file of a zip as a stream."""
    file = opener()
    limit_bytes = max(_SMALL_BYTES, members.EXPANSION * file.seek(0, io.SEEK_END))
    archive = opened_zip(file)
    if archive.getinfo(name).file_size > limit_bytes:
        raise RefusedError(EXPANDS)
    return cast(BinaryIO, archive.open(name))


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
                opened_zip(file)
            raise RefusedError("is damaged, or not a .zip, .tar, .tar.gz or MNIST idx file") from None
        while (member := archive.next()) is not None:
            # tarfile would keep every header, and memory would grow with the archive.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0:
                raise members.refused(member.name, f"has a size of {member.size:,} bytes: do not trust this archive")
            if member.isreg() and not member.issparse():
                content = cast(IO[bytes], archive.extractfile(member))
                read = partial(members.read_exactly, content, member.size)
                yield Member(member.name, read, member.offset_data, member.size)
            elif not member.isdir():
                raise members.refused(member.name, "is a link or a device: do not trust this archive")
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
            raise RefusedError(EXPANDS)
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
            raise RefusedError(EXPANDS)
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

"""Archives as sources of images: zip, tar, and MNIST's idx files."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, cast

from job.data.members import ENTRY_BYTES, EXPANSION, Member, RefusedError, Source, read_exactly

Opener = Callable[[], BinaryIO]
"""Opens the archive from its beginning, as a seekable stream."""

_BLOCK_BYTES = 1 << 20
_DEFLATE_LIMIT = 1032
"""The most that deflate can expand (https://zlib.net/zlib_tech.html)."""


class Zip(Source):
    """A zip archive, in the order of its directory."""

    def __init__(self, where: str, opener: Opener) -> None:
        """`opener` may be called several times."""
        super().__init__(where)
        self._open = opener

    def members(self) -> Iterator[Member]:
        """The directory's entries."""
        with self._open() as file:
            self.limit_bytes = max(ENTRY_BYTES, EXPANSION * _size_bytes(file))
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    problem = ""
                    if info.flag_bits & 1:
                        problem = "is encrypted: unpack the archive with its password, and pack the folder"
                    elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                        problem = "is a link or a device: do not trust this archive"
                    read = None if info.is_dir() else partial(self._read, archive, info)
                    yield Member(info.filename, read, problem)

    def _read(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
        with archive.open(info) as stream:
            return read_exactly(stream, info.file_size)


class Tar(Source):
    """A tar archive, plain or gzipped, in stream order."""

    def __init__(self, where: str, opener: Opener, gzipped: bool) -> None:
        """`opener` may be called several times."""
        super().__init__(where)
        self._open, self._gzipped = opener, gzipped

    def members(self) -> Iterator[Member]:
        """The headers' entries; the archive must end as a tar does."""
        with self._open() as file:
            self.limit_bytes = max(ENTRY_BYTES, EXPANSION * _size_bytes(file))
            stream = self.stream(file)
            try:
                archive = tarfile.TarFile(fileobj=cast(BinaryIO, stream))
            except tarfile.TarError:
                raise RefusedError(
                    "is no archive that can be packed, or damaged: give a folder, .zip, .tar, .tar.gz or MNIST idx file"
                ) from None
            while (member := archive.next()) is not None:
                # Otherwise tarfile remembers every header, and memory grows with the archive.
                archive.members.clear()  # type: ignore[attr-defined]
                stream.member = member.name
                is_file = member.isreg() and not member.issparse()
                yield Member(
                    member.name,
                    partial(self._read, archive, member) if is_file else None,
                    "" if is_file or member.isdir() else "is a link or a device: do not trust this archive",
                    member.offset_data,
                )
            stream.finish()

    def stream(self, file: BinaryIO) -> TarStream:
        """What the headers are read from."""
        return TarStream(file, self.limit_bytes, gzipped=self._gzipped)

    def _read(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        stream = archive.extractfile(member)
        assert stream is not None
        return read_exactly(stream, member.size)


class TarStream:
    """What `tarfile` reads from: it only goes forward, bounds each read, and knows whether the archive was whole."""

    def __init__(self, file: BinaryIO, limit_bytes: float, *, gzipped: bool = False, skips: bool = True) -> None:
        """Without `skips` every byte is read; what is unpacked always is."""
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if gzipped else file
        self._skips = skips and not gzipped
        self._limit_bytes = limit_bytes
        self.member = ""
        """Name of the entry whose content is next."""
        self._position = 0
        self._last_block = b""

    def tell(self) -> int:
        """Bytes up to here, unpacked."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes forward to `position`."""
        if self._skips:
            self._position = self._file.seek(position)
        while self._position < position:
            if not self.read(min(position - self._position, _BLOCK_BYTES)):
                raise EOFError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """The next bytes."""
        # A header may claim any length for itself, and tarfile would believe it.
        if size > ENTRY_BYTES:
            raise tarfile.ReadError(f"a block of {size} bytes")
        self._last_block = self._file.read(size)
        self._position += len(self._last_block)
        if self._position > self._limit_bytes:
            raise RefusedError(
                f"unpacks to more than {EXPANSION} times its size (at entry {self.member!r}): do not trust this archive"
            )
        return self._last_block

    def finish(self) -> None:
        """Raises unless the archive ends as a tar does: `tarfile` takes zeros in place of a header for the end."""
        if self._last_block != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end mark")
        # A checksum is compared when the end is reached.
        while block := self.read(_BLOCK_BYTES):
            if block.strip(b"\0"):
                raise RefusedError(
                    "holds more behind its end mark, which is not read: was it joined with `cat`, or is it damaged? "
                    "Unpack it, and pack the folder"
                )


class Idx(Source):
    """MNIST's format (LeCun et al. 1998): big-endian headers, one byte per pixel, labels in a file of their own.

    Its images become PGM files in a folder per class.
    """

    channels = 1

    def __init__(self, where: str, images: Opener, labels: Opener | None) -> None:
        """Without `labels` there are no classes."""
        super().__init__(where)
        self._open_images, self._open_labels = images, labels

    def members(self) -> Iterator[Member]:
        """The images in file order, named after their class and number."""
        with self._open_images() as raw:
            size = _size_bytes(raw)
            file = _gunzipped(raw)
            limit_bytes = size if file is raw else size * _DEFLATE_LIMIT
            magic, count, height, width = struct.unpack(">4I", read_exactly(file, 16))
            pixels = height * width
            if magic != 0x803 or not 16 < 16 + count * pixels <= limit_bytes:
                raise RefusedError(f"is no whole MNIST image file (header {magic:#x}, {count} of {height} × {width})")
            labels = self._labels(count)
            digits, label_digits = len(str(count - 1)), len(str(max(labels, default=0)))
            header = b"P5 %d %d 255\n" % (width, height)
            for number in range(count):
                folder = f"{labels[number]:0{label_digits}d}/" if labels else ""
                yield Member(f"{folder}{number:0{digits}d}.pgm", lambda: header + read_exactly(file, pixels))
            if file.tell() == 16 + count * pixels and file.read(1):
                raise RefusedError(f"holds more than its {count} images")

    def _labels(self, count: int) -> bytes:
        if self._open_labels is None:
            return b""
        with self._open_labels() as raw:
            file = _gunzipped(raw)
            if struct.unpack(">2I", read_exactly(file, 8)) != (0x801, count):
                raise RefusedError("does not go with its labels, which are for another number of images")
            return read_exactly(file, count)


def _gunzipped(file: BinaryIO) -> BinaryIO:
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if gzipped else file


def _size_bytes(file: BinaryIO) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size

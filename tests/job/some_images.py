"""Images and archives that tests make for themselves."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 48) -> Image.Image:
    """Smooth colours with some noise: no two seeds, and no two pixels, are alike."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    phase = rng.uniform(0, 6, size=(3, 1, 1))
    waves = 127 + 90 * np.sin(phase + 7 * rows + 5 * columns * rng.uniform(0.5, 2, size=(3, 1, 1)))
    noisy = waves + rng.normal(0, 6, size=(3, height, width))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_png(levels: np.ndarray, significant_bits: int = 0) -> bytes:
    """16-bit samples [H, W] or [H, W, 2 to 4] as PNG, with the chunk sBIT or without; Pillow writes no colours so."""
    height, width, channels = (*levels.shape, 1)[:3]
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    header = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"sBIT": bytes([significant_bits] * channels),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
        if kind != b"sBIT" or significant_bits
    )


def deep_tiff(levels: np.ndarray, bits: int = 16, order: str = "<", **tags: int) -> bytes:
    """Samples of 12 or 16 bits [H, W] or [H, W, 3] as an uncompressed TIFF; `tags` as t281=4095."""
    height, width, channels = (*levels.shape, 1)[:3]
    if bits == 12:
        digits = "".join(f"{level:03x}" for level in levels.flatten())
        data = bytes.fromhex(digits)
    else:
        data = levels.astype(f"{order}u2").tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1 if channels == 1 else 2, 273: 8, 277: channels}
    entries |= {278: height, 279: len(data)} | {int(tag[1:]): value for tag, value in tags.items()}
    end = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory = b""
    for tag, value in sorted(entries.items()):
        count = channels if tag == 258 else 1
        content = struct.pack(f"{order}I", end) if count > 1 else struct.pack(f"{order}HH", value, 0)
        directory += struct.pack(f"{order}HHI", tag, 3, count) + content
    magic = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return (
        magic
        + data
        + struct.pack(f"{order}H", len(entries))
        + directory
        + bytes(4)
        + struct.pack(f"{order}{channels}H", *[bits] * channels)
    )


def png(seed: int, width: int = 16, height: int = 16) -> bytes:
    """A picture as PNG."""
    return encoded(picture(seed, width, height))


def jpeg(seed: int, width: int = 40, height: int = 48) -> bytes:
    """A picture as JPEG."""
    return encoded(picture(seed, width, height), "JPEG", quality=90)


def zip_of(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A stored zip with these entries in this order."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def tar_of(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar, gzipped if its name says so, with these entries in this order."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folder_of(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A folder with these files."""
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def idx(array: np.ndarray) -> bytes:
    """The array in the format of MNIST's files."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mnist(folder: Path, split: str, images: np.ndarray, labels: np.ndarray | None, gz: bool) -> None:
    """Writes a set of images and labels as MNIST names them."""
    folder.mkdir(exist_ok=True)
    for kind, array in [("images-idx3", images), ("labels-idx1", labels)]:
        if array is not None:
            content = gzip.compress(idx(array)) if gz else idx(array)
            (folder / f"{split}-{kind}-ubyte{'.gz' if gz else ''}").write_bytes(content)


@pytest.fixture(name="digits")
def digits_fixture() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 28, 28)), np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5])

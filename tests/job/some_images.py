"""Images and archives that tests make for themselves."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
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

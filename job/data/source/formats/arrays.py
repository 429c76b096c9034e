"""NumPy's files of images, `.npy` and `.npz`: Keras', MedMNIST's, samples of guided-diffusion, batches of ImageNet-64.

Headers are checked against the sizes of their files, pickles are not read, and pixels are read image by image. Names
tell what an array is: `x_train` and `y_train`, `val_images` and `val_labels`, `data` and `labels`.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from job.data.codecs import encode
from job.data.images import MOST_CHANNELS
from job.data.source import members
from job.data.source.formats import netpbm
from job.data.source.labels import chosen_label, label_of, text_of
from job.data.source.members import Files, Member, RefusedError, Source, refused
from job.exits import BadDataError, BadRequestError

_FILE = re.compile(r".*\.np[yz]", re.IGNORECASE)
_IMAGES = {"x", "image", "images", "img", "imgs", "data", "samples"}
_LABELS = {"y", "label", "labels", "class", "classes", "cls", "target", "targets"}
# `np.savez` names arrays so that got no name.
_UNNAMED = {"arr_0": "images", "arr_1": "labels"}

_HEADER_BYTES = 10_240
_LEAST_SIDE = 4
_ONE_IMAGE_SIDE = 32
"""The least side of [H, W, C] for one image: narrower ones are many of W columns and C rows."""
_NEXT_STEP = "save it as uint8 or uint16 [images, height, width, channels] in C order, and pack that"

# Of headers that Python 2 wrote.
warnings.filterwarnings("ignore", message="Reading `.npy`")


@dataclass(frozen=True)
class _Array:
    """An array, by its header.

    Attributes:
        path: its file, and its name in an `.npz` below: the beginning of the names of its images.
        dtype: of its values.
        shape: as in the header.
        is_fortran: whether the first index changes fastest.
        start: position of the first value in its stream.
        size_bytes: size of the stream.
        open: opens the stream.
        is_one: whether the file holds one image, which may have a folder for its class.
    """

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    start: int
    size_bytes: int
    open: Callable[[], BinaryIO]
    is_one: bool = False

    @property
    def split(self) -> str:
        """Returns the split that the path names, if it does."""
        return members.split_in(self.path.split("/"))

    @property
    def words(self) -> list[str]:
        """Returns the words of the name, without that of a split."""
        name = PurePosixPath(self.path).stem.lower()
        return [word for word in re.split(r"[\W_]+", _UNNAMED.get(name, name)) if word and word not in members.SPLITS]

    @property
    def key(self) -> str:
        """Returns the name by which a person chooses it as labels."""
        return "_".join(self.words)

    @property
    def set(self) -> list[str]:
        """Returns the words that images and their labels have in common."""
        return [word for word in self.words if word not in _IMAGES | _LABELS]

    @property
    def are_labels(self) -> bool:
        """Returns whether its name is one of labels."""
        return not _LABELS.isdisjoint(self.words)

    @property
    def stored(self) -> tuple[tuple[int, ...], tuple[int, int, int]] | None:
        """Returns the shape of each image, and the axes that make it [height, width, channels]; None for no images.

        Images are [N, H, W, C], [N, C, H, W] or [N, H, W] of uint8 or uint16, with up to 16 channels; or flat: grey, or
        channel by channel as ImageNet-64.
        """
        if self.dtype not in (np.uint8, np.uint16) or self.is_fortran or self.are_labels:
            return None
        if min(self.shape, default=0) < 1:
            return None
        shape: tuple[int, ...]
        match self.shape:
            case (_, height, width, 1 | 3 as channels):
                shape, axes = (height, width, channels), (0, 1, 2)
            case (_, 1 | 3 as channels, height, width):
                shape, axes = (channels, height, width), (1, 2, 0)
            case (_, height, width, channels) if channels <= MOST_CHANNELS and channels < min(height, width):
                shape, axes = (height, width, channels), (0, 1, 2)
            case (_, channels, height, width) if channels <= MOST_CHANNELS and channels < min(height, width):
                shape, axes = (channels, height, width), (1, 2, 0)
            case (_, height, width):
                shape, axes = (height, width, 1), (0, 1, 2)
            case (_, pixels) if (side := math.isqrt(pixels)) ** 2 == pixels:
                shape, axes = (side, side, 1), (0, 1, 2)
            case (_, pixels) if 3 * (side := math.isqrt(pixels // 3)) ** 2 == pixels:
                shape, axes = (3, side, side), (1, 2, 0)
            case _:
                return None
        # [H, W, 3] is one image, and a header could promise a billion images of one pixel.
        return (shape, axes) if min(shape[axis] for axis in axes[:2]) >= _LEAST_SIDE else None

    def __str__(self) -> str:
        """Returns what a message says of it."""
        kind = f"{self.dtype.name} {[*self.shape]}{' in Fortran order' if self.is_fortran else ''}"
        return f"{self.path} is {kind}{': pickles, which are programs' if self.dtype.hasobject else ''}"

    def may_label(self, counts: Container[int]) -> bool:
        """Returns whether its values could be the labels of so many images."""
        return self.dtype.kind in "biufSU" and self.shape[1:] in ((), (1,)) and self.shape[0] in counts

    def check(self) -> None:
        """Raises `RefusedError` if its header promises more or fewer bytes than there are."""
        promised_bytes = self.start + math.prod(self.shape) * self.dtype.itemsize
        if promised_bytes != self.size_bytes:
            raise refused(self.path, f"has {self.size_bytes:,} bytes, and promises {promised_bytes:,}: get it again")


def array_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of one file or of all in a folder, with labels of the same file or of an `.npy` beside."""
    names = files.matching(_FILE)
    if not names:
        return None
    sets, others = list[tuple[_Array, _Array | None]](), list[_Array]()
    for arrays in _groups(files, names):
        # Arrays beside a chosen one are read for its labels alone.
        are_images = [one for one in arrays if one.stored and {one.path, one.path.rpartition("/")[0]} & {*names}]
        named = [array for array in are_images if not _IMAGES.isdisjoint(array.words)] or are_images
        others += [array for array in arrays if array not in named]
        for images in named:
            with members.refusing(files.place):
                images.check()
                has_none = column is None or images.is_one
                labels = None if has_none else _labels_of(files.place, images, named, arrays, column or "")
            sets.append((images, labels))
    if not sets and not files.chosen and any(name.lower().endswith(members.ARCHIVES) for name in files.names):
        return None
    if not sets:
        said = "; ".join(map(str, sorted(others, key=lambda array: array.are_labels)[:3])) or "its .npz are empty"
        raise BadDataError(f"{files.place} holds no array of images: {said}: {_NEXT_STEP}")
    left_out = [array.path for array in others if array.stored]
    counts = {images.shape[0] for images, labels in sets if labels is None}
    return Source(
        files.place,
        partial(_members, sets),
        note=f"leaving out {', '.join(left_out[:3])}" if left_out else "",
        unchosen=tuple(f":{array.key}" for array in others if array.may_label(counts)),
    ).split_by(images.path for images, _ in sets)


def _groups(files: Files, names: Sequence[str]) -> Iterator[list[_Array]]:
    """Yields the arrays of each `.npz`, and the `.npy` of each folder."""
    for name in names:
        if name.lower().endswith(".npz"):
            with members.refusing(f"{files.where}/{name}"):
                yield _zipped(files, name)
    plain = [name for name in names if name.lower().endswith(".npy")]
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in plain):
        arrays = list[_Array]()
        for name in files.names:
            if name.rpartition("/")[0] == folder and name.lower().endswith(".npy"):
                with members.refusing(f"{files.where}/{name}"), closing(files.open(name)) as file:
                    arrays.append(_array(name, file, file.seek(0, io.SEEK_END), partial(files.open, name)))
        yield arrays


def _zipped(files: Files, name: str) -> list[_Array]:
    """Returns the arrays of an `.npz`."""
    with closing(files.open(name)) as file:
        if isinstance(file, zipfile.ZipExtFile):
            raise RefusedError("is a zip in a zip: unzip the outer one, and pack the folder")
        with members.opened_zip(file, is_array := re.compile(r".*\.npy").fullmatch) as archive:
            arrays = list[_Array]()
            for inner in filter(is_array, dict.fromkeys(archive.namelist())):
                with archive.open(inner) as stream:
                    opener = partial(members.open_zipped, partial(files.open, name), inner)
                    arrays.append(_array(f"{name}/{inner}", stream, archive.getinfo(inner).file_size, opener))
    return arrays


def _array(path: str, stream: Any, size_bytes: int, opener: Callable[[], BinaryIO]) -> _Array:
    """Returns the array whose header is at the beginning of a stream."""
    stream.seek(0)
    start = io.BytesIO(stream.read(_HEADER_BYTES))
    formats = np.lib.format
    readers = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
    try:
        shape, is_fortran, dtype = readers[formats.read_magic(start)](start)
    # NumPy evaluates the header as a Python literal, which raises anything from TokenError to MemoryError.
    except Exception:
        raise refused(path, "is damaged, or not an array: get it again") from None
    is_one = len(shape) == 3 and 0 < shape[2] <= MOST_CHANNELS and min(shape[:2]) >= _ONE_IMAGE_SIDE
    shape = (1, *shape) if is_one else shape
    return _Array(path, dtype, shape, is_fortran, start.tell(), size_bytes, opener, is_one)


def _labels_of(
    where: str, images: _Array, all_images: Iterable[_Array], arrays: Iterable[_Array], column: str
) -> _Array | None:
    """Returns the labels of an array of images, from the same file or folder; None without any."""
    count = images.shape[0]
    of_others = [other.set for other in all_images if other is not images and other.split == images.split]
    beside = {
        array.key: array
        for array in arrays
        if array.split == images.split and (array.are_labels or array.key == column) and array.set not in of_others
    }
    exact = {key: array for key, array in beside.items() if array.set == images.set}
    found = exact if exact and not column else beside
    if not found and not column:
        return None
    labels = found[chosen_label(where, [*found], column, usual=())]
    if not labels.may_label({count}):
        how = "as numbers or as str" if labels.dtype.hasobject else "so (a one-hot vector by argmax)"
        said = f"{labels}, and not one label for each of {count:,} images"
        raise BadRequestError(f"{where}: {said}: save it {how}, or use --no-classes")
    labels.check()
    return labels


def _members(sets: Iterable[tuple[_Array, _Array | None]]) -> Iterator[Member]:
    """Yields the images as files: PPM or PGM, PNG of 16 bits, or `.npy` of other than one or three channels."""
    for images, labels in sets:
        assert images.stored
        size_bytes, digits = math.prod(images.stored[0]) * images.dtype.itemsize, len(str(images.shape[0] - 1))
        values = None
        if labels:
            with closing(labels.open()) as stream:
                stream.seek(labels.start)
                content = members.read_exactly(stream, labels.shape[0] * labels.dtype.itemsize)
            values = np.frombuffer(content, labels.dtype)
        with closing(images.open()) as stream:
            for number in range(images.shape[0]):
                read = partial(_file, stream, images, images.start + number * size_bytes)
                label = "" if values is None else _label(values[number : number + 1])
                yield Member(f"{images.path}/{number:0{digits}d}.ppm", read, size_bytes=size_bytes, label=label)


def _file(stream: BinaryIO, images: _Array, at: int) -> bytes:
    assert images.stored
    shape, axes = images.stored
    stream.seek(at)
    content = members.read_exactly(stream, math.prod(shape) * images.dtype.itemsize)
    pixels = np.frombuffer(content, images.dtype).reshape(shape).transpose(axes)
    return netpbm(pixels) if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3) else encode(pixels)


def _label(value: np.ndarray) -> str:
    """Returns the label in an array of one."""
    if value.dtype.kind == "U":
        # Python itself fails on an array of text with a number beyond all characters.
        order = "utf-32-be" if value.dtype.byteorder == ">" else "utf-32-le"
        return label_of(value.tobytes().decode(order, "replace").rstrip("\0"))
    said = value.item()
    return label_of(text_of(said) if isinstance(said, bytes) else said)

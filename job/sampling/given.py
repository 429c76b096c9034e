"""The images and numbers that a sampling command gives: to edit, and as conditions."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import numpy as np

from ddpm.image_size import ImageSize
from job.data.images import Recipe, RejectedImageError, prepare
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.requests import MAX_NUMBERS, SampleRequest, parse_numbers
from job.runs.run import Editing, RunHandle
from job.store.files import os_errors

RESAMPLINGS = 10
"""The number of Lugmayr et al. 2022."""
STRENGTHS = {"img2img": 0.6, "invert": 1.0}
"""The default share of the steps of a mode."""
ROW_IMAGES = 8
"""Images of a row between two vectors."""


@dataclass(frozen=True, eq=False)
class GivenImages:
    """The given images of an editing mode."""

    editing: Editing
    images: np.ndarray | None = None
    """uint8 [n, H, W, C]; None for interpolation between seeds."""
    labels: Sequence[int] = ()
    """The classes of images of the dataset."""
    unknown: np.ndarray | None = None
    """The part to replace, bool [H, W]."""


@dataclass(frozen=True, eq=False)
class GivenConditions:
    """The conditions that a command names, which the seeds take in turn."""

    pictures: np.ndarray | None = None
    """uint8, or uint16 of 16 bits, [n, h, w, C]."""
    hidden: np.ndarray | None = None
    """The part of them to fill in, bool [H, W]."""
    rows: tuple[tuple[float, ...], ...] = ()
    """Vectors, of numbers as in the dataset."""
    is_row: bool = False
    """Whether each seed takes all vectors, which become a row of a picture."""
    sha256: str = ""
    """The hash of it all."""

    @property
    def count(self) -> int:
        """The number of pictures or vectors, whichever is larger."""
        return max(0 if self.pictures is None else len(self.pictures), len(self.rows))


NO_CONDITIONS = GivenConditions()


def given_images(request: SampleRequest, of_run: RunHandle) -> GivenImages | None:
    """Returns the images that a command edits; None without `--mode`.

    Raises:
        BadRequestError: the run's images cannot be edited, there is no such image, or the mask is empty or whole.
        MissingInputError, BadDataError: a file is missing, or damaged.
    """
    if not request.mode:
        return None
    if request.mode == "interpolate":
        return GivenImages(Editing(mode="interpolate"))
    labels, name, index = list[int](), request.image, of_run.index
    channels, size = of_run.pixel_shape[0], ImageSize(*of_run.pixel_shape[1:])
    if index and index.encoding:
        raise BadRequestError(f"--mode {request.mode} needs pixels, and {index.name} holds latents: leave it out")
    if of_run.config.data.bits != 8 or channels not in (1, 3):
        what = f"{of_run.config.data.bits} bits in {channels} channels"
        raise BadRequestError(f"--mode {request.mode} edits 8 bits in 1 or 3 channels, and not {what}: leave it out")
    if "--image" not in request.files:
        from job.data.reading.cache import ImageCache

        numbers = np.array(parse_numbers(name, "--image"))
        if index is None:
            raise BadRequestError(f"--image {name}: the run was imported without a dataset, so name a file")
        if max(numbers) >= index.images:
            raise BadRequestError(f"--image {name}: {index.name} has the images 0 to {index.images - 1:,}")
        cache = ImageCache(of_run.bucket, index)
        # An image of the dataset keeps its own class.
        images, labels = cache.read(numbers), cache.labels(numbers).tolist()
    else:
        recipe = Recipe(size, "center", index.resize_filter if index else "lanczos", channels, min_side=1)
        image, name = _read_image("--image", name, recipe)
        images = image[None]
    if request.mode == "img2img" or request.mode == "invert":
        strength = request.strength or STRENGTHS[request.mode]
        return GivenImages(Editing(mode=request.mode, image=name, strength=strength), images, labels)
    unknown, mask = _unknown(request.mask or "half", size)
    editing = Editing(mode="inpaint", image=name, mask=mask, resamplings=request.resamplings or RESAMPLINGS)
    return GivenImages(editing, images, labels, unknown)


def _unknown(mask: str, size: ImageSize) -> tuple[np.ndarray, str]:
    """Returns the part of images that `--mask` names, bool [H, W], and its name, or the SHA-256 of its file."""
    unknown, (height, width), name = np.zeros(size.shape, bool), size.shape, mask
    if mask == "half":
        unknown[:, width // 2 :] = True
    elif mask == "centre":
        unknown[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    else:
        levels, name = _read_image("--mask", mask, Recipe(size, "center", "box", 1, min_side=1))
        unknown = levels[:, :, 0] > 127
    if unknown.all() or not unknown.any():
        raise BadRequestError(f"--mask {mask}: inpaint replaces the white part, here all of it or nothing")
    return unknown, name


def given_conditions(request: SampleRequest, of_run: RunHandle) -> GivenConditions:
    """Returns the conditions that a command names.

    Raises:
        BadRequestError: the network takes no such condition, or a vector has other numbers.
        MissingInputError, BadDataError: a file is missing, or damaged.
    """
    settings, size, index = of_run.config.condition, ImageSize(*of_run.config.image_shape[1:]), of_run.index
    takes = {"condition": settings.channels, "vector": settings.vector, "vectors": settings.vector}
    if wrong := [name for name, has in takes.items() if getattr(request, name) and not has]:
        raise BadRequestError(f"--{wrong[0]}: run {request.run!r} has no condition of this kind: leave it out")
    hidden, pictures, parts = None, None, list[str]()
    if request.condition:
        where = Path(request.condition)
        files = sorted(path for path in where.iterdir() if not path.name.startswith(".")) if where.is_dir() else [where]
        if not files:
            raise MissingInputError(f"--condition {where} is an empty folder")
        channels = of_run.config.image_shape[0] if settings.derive else settings.channels
        recipe = Recipe(settings.small_size(size), "center", settings.resize_filter, channels, min_side=1)
        if index:
            # In another range than the training's the network would see another brightness.
            pixel_range = index.pixel_range if settings.derive else index.condition_range
            recipe = replace(recipe, bits=index.bits, pixel_range=pixel_range)
        read, hashes = zip(*(_read_image("--condition", str(path), recipe) for path in files), strict=True)
        pictures, parts = np.stack(read), [*hashes]
        if request.mask:
            if not settings.derive.startswith("mask"):
                raise BadRequestError(f"--mask: run {request.run!r} has not learnt masks: leave it out")
            hidden, name = _unknown(request.mask, size)
            parts.append(name)
    names, is_row = index.vector_names if index else (), ":" in request.vector
    if request.vector:
        rows = [_numbers("--vector", part.split(","), names) for part in request.vector.split(":")]
        if is_row:
            rows = np.linspace(rows[0], rows[-1], ROW_IMAGES).tolist()
    else:
        rows = _read_rows(request.vectors, names) if request.vectors else []
    parts += map(str, rows)
    sha256 = hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""
    return GivenConditions(pictures, hidden, tuple(map(tuple, rows)), is_row, sha256)


def _numbers(where: str, words: Sequence[str], names: Sequence[str]) -> list[float]:
    with suppress(ValueError):
        numbers = [*map(float, words)]
        if len(numbers) == len(names) and all(map(isfinite, numbers)):
            return numbers
    raise BadRequestError(f"{where} {','.join(words):.99}: use {len(names)} finite numbers, of {', '.join(names)}")


def _read_rows(file: str, names: Sequence[str]) -> list[list[float]]:
    """Returns the vectors in a CSV file, whose first line may name its columns."""
    with os_errors(f"--vectors {file}"):
        lines = [line for line in csv.reader(Path(file).read_text(errors="replace").splitlines()) if line]
    columns, first = [*range(len(names))], 1
    if lines and {*names} <= {*lines[0]}:
        head, *lines = lines
        columns, first = [head.index(name) for name in names], 2
    rows = [[line[column] for column in columns if column < len(line)] for line in lines]
    if not 0 < len(rows) <= MAX_NUMBERS:
        raise BadRequestError(f"--vectors {file} has {len(rows):,} vectors: use 1 to {MAX_NUMBERS:,}")
    return [_numbers(f"--vectors {file}, line {number}:", row, names) for number, row in enumerate(rows, first)]


def _read_image(option: str, path: str, recipe: Recipe) -> tuple[np.ndarray, str]:
    """Returns an image file of the machine of the command, resized, and the SHA-256 of the file."""
    with os_errors(f"{option} {path}"):
        encoded = Path(path).read_bytes()
    try:
        return prepare(encoded, recipe), hashlib.sha256(encoded).hexdigest()
    except RejectedImageError as error:
        raise BadDataError(f"{option} {path} {error}") from None

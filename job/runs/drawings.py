"""Drawn images in a run's folder: pictures with their names and provenance, and batches of images in pieces.

The name of a picture holds the settings that it was drawn with, so that other settings do not overwrite it. Its
provenance is a sealed record whose key holds the picture's key and SHA-256, and which is written before the picture. If
a process is killed between the two, or draws the picture a second time, the picture still has the record of its bytes.

A batch of many images has a folder. Its `drawing.json` is created first, each piece before its record, and `index.json`
when all pieces are there. Sampling never overwrites or deletes objects in it, and `ddpm runs prune` deletes only pieces
without a record. Pieces therefore match their records, even if several processes make the same piece, and a piece that
a killed process left without a record is as good as any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from math import ceil
from typing import Literal

from pydantic import Field

from job.config import Drawing, Section, Size
from job.data.order import epochs_completed_by
from job.pieces import PieceRecord
from job.runs.layout import CheckpointRef, Located, ObjectKind
from job.runs.records import RunRecord, attempt_id
from job.sealed import SHA256_PATTERN, NamedObject, Sealed, code_version
from job.store import Store

LOSS_FIGURE = ObjectKind.FIGURE.key(name="loss", picture="png")
SCORES_FIGURE = ObjectKind.FIGURE.key(name="scores", picture="png")


class Provenance(RunRecord):
    """The provenance of one picture: the attempt and the weights that drew it."""

    key: str
    """Below its run."""
    picture_sha256: str
    fence: int
    """The fence of the attempt whose weights drew it."""
    attempt: str
    """The id of that attempt, which no other run has; empty if its record was not readable."""
    images_seen: int
    """The progress of these weights."""
    code_version: str

    def is_at(self, place: Located) -> bool:
        """Returns whether it lies under the key and hash of its picture."""
        return (self.key, self.picture_sha256) == (place.of, place.sha256)


def put_picture(run: Store, key: str, picture: bytes, ref: CheckpointRef) -> None:
    """Puts a picture and its provenance, and replaces an earlier picture of the same key.

    Args:
        run: the run's folder.
        key: of the picture below the run.
        picture: the content of the file.
        ref: the attempt whose weights drew it, and their progress.
    """
    sha256 = hashlib.sha256(picture).hexdigest()
    record = Provenance(
        key=key,
        picture_sha256=sha256,
        fence=ref.fence,
        attempt=attempt_id(run, ref.fence),
        images_seen=ref.images_seen,
        code_version=code_version(),
    )
    run.put(ObjectKind.PROVENANCE.key(of=key, sha256=sha256), record.to_json())
    run.put(key, picture)


def label_of(images_seen: int, dataset_images: int, batch_size_images: int) -> str:
    """Returns a moment's label: `epoch-0080` (`epoch-0000` at the start), or `images-000012345` inside an epoch."""
    epochs = epochs_completed_by(images_seen, dataset_images, batch_size_images) if images_seen else (0,)
    return f"epoch-{epochs[-1]:04d}" if epochs else f"images-{images_seen:09d}"


def moment_of(label: str) -> str:
    """Returns a label for people: `epoch 80`, or `12,345 images`."""
    unit, _, number = label.partition("-")
    return f"epoch {int(number):,}" if unit == "epoch" else f"{int(number):,} images"


def title_of(run: Store, moment: str, how: str, seeds: Sequence[int]) -> str:
    """Returns the title of a picture: `celeba · epoch 80 · ddim, 100 steps · seeds 0-63`.

    Args:
        run: the run's folder.
        moment: such as `epoch 80`; see `moment_of`.
        how: the sampler and its settings; see `Drawing.words`.
        seeds: of the images.
    """
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    words = [f"{first}-{last}" if last > first else f"{first}" for first, last in ranges]
    shown = ", ".join(words) if len(words) <= 8 else f"{', '.join(words[:8])} … ({len(seeds):,} in all)"
    of_seeds = f"seed{'s' * (len(seeds) > 1)} {shown}"
    return " · ".join((run.uri.rpartition("/")[2], moment, how, of_seeds))


def file_words(numbers: str, comma: str) -> str:
    """Returns a list of numbers as part of a file name, with another `comma`; a long list as its hash."""
    words = "".join(numbers.split()).replace(",", comma)
    # File systems limit names to 255 bytes.
    return words if len(words) <= 80 else hashlib.sha256(words.encode()).hexdigest()[:16]


def grid_key(label: str, how: str) -> str:
    """Returns the key of a sample grid; `how` it was drawn is a `Drawing.name`."""
    return ObjectKind.PICTURE.key(name=f"{label}-{how}", picture="png")


def denoising_key(label: str, how: str) -> str:
    """Returns the key of the GIF that shows the denoising of a few images."""
    return ObjectKind.PICTURE.key(name=f"denoising-{label}-{how}", picture="gif")


class Editing(Section):
    """The settings of an edit of given images, in the place of new ones."""

    mode: Literal["inpaint", "img2img", "invert", "interpolate"]
    image: str = ""
    """Numbers of images in the dataset such as 3,17, or the SHA-256 of a file."""
    mask: str = ""
    """For `inpaint`: half, centre, or the SHA-256 of a file."""
    resamplings: int = Field(default=0, ge=0, le=1000)
    """For `inpaint`: how often each group of steps is repeated (Lugmayr et al. 2022)."""
    strength: float = Field(default=0.0, ge=0, le=1)
    """For `img2img` and `invert`: the share of the steps that they take."""

    @property
    def name(self) -> str:
        """Returns the edit as part of a picture's name."""
        return "-".join(part.replace(" ", "-") for part in self._parts)

    @property
    def words(self) -> str:
        """Returns the edit for people."""
        return ", ".join(self._parts)

    @property
    def _parts(self) -> list[str]:
        given = {key: value for key, value in self.model_dump(exclude={"mode"}).items() if value}
        return [self.mode, *(f"{key} {_in_name(value)}" for key, value in given.items())]


def _in_name(value: object) -> str:
    text = file_words(f"{value}", "_")
    return text[:12] if re.fullmatch(SHA256_PATTERN, text) else text


class NumberedDrawing(Drawing):
    """All settings that decide the images of a batch, and the cut into pieces."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    checkpoint_sha256: str = Field(pattern=SHA256_PATTERN)
    worse_sha256: str = ""
    """The hash of the worse checkpoint that autoguidance uses; empty without autoguidance."""
    editing: Editing | None = None
    custom_sampler: str = ""
    """`module:function` and the SHA-256 of the module's file, for a sampler of the user."""
    found: tuple[int, ...] = ()
    """The timesteps of the grid `found`."""
    size: Size
    channels: int = Field(ge=1, le=3)
    classes: tuple[str, ...]
    first_seed: int = Field(ge=0)
    count: int = Field(ge=1)
    piece_images: int = Field(ge=1)
    save: Literal["shards", "png"]

    @property
    def pieces(self) -> int:
        """Returns the number of pieces."""
        return ceil(self.count / self.piece_images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it all."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def seeds(self, number: int) -> range:
        """Returns the seeds of a piece."""
        first, end = self.first_seed + number * self.piece_images, self.first_seed + self.count
        return range(first, min(first + self.piece_images, end))


class FoundGrid(RunRecord):
    """The timesteps found for a number of steps. The record is created once, so that all pictures use the same ones."""

    steps: int = Field(ge=1)
    numbers: tuple[int, ...]
    """The timesteps of the process, from the most noise to the least."""
    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    """The checkpoint whose network they were found with."""
    weights: str
    created: str
    code_version: str

    def is_at(self, place: Located) -> bool:
        """Returns whether it lies under its number of steps."""
        return self.steps == len(self.numbers) == place.steps


class DrawingRecord(Sealed):
    """The content of `drawing.json`, created before the first piece, so that no two drawings share a folder."""

    drawing: NumberedDrawing


def named_piece(record: PieceRecord, drawing: NumberedDrawing) -> NamedObject:
    """Returns what the index says of a piece; a folder of images has the hash of its `sha256sum *.png`."""
    if drawing.save == "shards":
        return record.files[0]
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in record.files)
    named = NamedObject.of(record.files[0].key.rpartition("/")[0], lines.encode())
    return named.model_copy(update={"size_bytes": sum(file.size_bytes for file in record.files)})


class BatchIndex(Sealed):
    """The list of all pieces in order. It depends on them alone, so that every process writes the same bytes."""

    drawing: NumberedDrawing
    pieces: tuple[NamedObject, ...]

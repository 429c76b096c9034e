"""What is drawn, in a run's folder: pictures, what they are called and where each comes from; images in pieces.

A picture's name says what it shows, so that what differs does not overwrite each other. Its provenance lies in a sealed
record of its own, named by the picture's key and SHA-256 and written before the picture. So a picture always has the
record of its own bytes beside those of pictures that it replaced, whoever was killed or drew it a second time.

A batch of many images has a folder, with `drawing.json` created first, each piece before its record, and `index.json`
when all pieces are there. Nobody who samples writes over or deletes anything in it, and `ddpm runs prune` deletes only
what has no record. So what lies there stays what its record says, however many processes make the same piece, and a
piece without a record, left by a process that was killed, is as good as another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from math import ceil
from typing import Literal

from pydantic import Field

from ddpm.epochs import epochs_completed_by
from job.code_version import code_version
from job.config import Drawing, Section
from job.pieces import PieceRecord
from job.runs.layout import CheckpointRef, Located, ObjectKind
from job.runs.records import RunRecord, attempt_id
from job.sealed import SHA256_PATTERN, NamedObject, Sealed
from job.store import Store

LOSS_FIGURE = ObjectKind.FIGURE.key(name="loss", picture="png")

SCORES_FIGURE = ObjectKind.FIGURE.key(name="scores", picture="png")


class Provenance(RunRecord):
    """Where one picture comes from."""

    key: str
    """Below its run."""
    picture_sha256: str
    fence: int
    """Of the attempt whose weights it shows."""
    attempt: str
    """The id of that attempt, which tells runs apart; empty if nobody could tell."""
    images_seen: int
    """By these weights."""
    code_version: str

    def is_at(self, place: Located) -> bool:
        """In a record of its picture, by the hash of that."""
        return (self.key, self.picture_sha256) == (place.of, place.sha256)


def put_picture(run: Store, key: str, picture: bytes, ref: CheckpointRef) -> None:
    """Puts a picture and where it comes from at `key`, whatever was there before.

    Args:
        run: the run's folder.
        key: below it.
        picture: the file.
        ref: the attempt whose weights it shows, and how many images these have seen.
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
    """`epoch-0080`, `epoch-0000` before any image was seen, or `images-000012345` for a checkpoint inside an epoch."""
    epochs = epochs_completed_by(images_seen, dataset_images, batch_size_images) if images_seen else (0,)
    return f"epoch-{epochs[-1]:04d}" if epochs else f"images-{images_seen:09d}"


def moment_of(label: str) -> str:
    """A label for people: `epoch 80`, or `12,345 images`."""
    unit, _, number = label.partition("-")
    return f"epoch {int(number):,}" if unit == "epoch" else f"{int(number):,} images"


def title_of(run: Store, moment: str, how: str, seeds: Sequence[int]) -> str:
    """What a picture shows: `celeba · epoch 80 · ddim, 100 steps · seeds 0-63`.

    Args:
        run: the run's folder.
        moment: such as `epoch 80`; see `moment_of`.
        how: it was drawn; see `Drawing.words`.
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
    """A list of numbers as part of a name, with another `comma`; its hash where it is long."""
    words = "".join(numbers.split()).replace(",", comma)
    # File systems end names at 255 bytes.
    return words if len(words) <= 80 else hashlib.sha256(words.encode()).hexdigest()[:16]


def grid_key(label: str, how: str) -> str:
    """Where a grid of a moment lies; `how` it was drawn is a `Drawing.name`."""
    return ObjectKind.PICTURE.key(name=f"{label}-{how}", picture="png")


def denoising_key(label: str, how: str) -> str:
    """Where the way from noise to image lies, as a GIF."""
    return ObjectKind.PICTURE.key(name=f"denoising-{label}-{how}", picture="gif")


class Editing(Section):
    """What is drawn instead of new images."""

    mode: Literal["inpaint", "img2img", "invert", "interpolate"]
    image: str = ""
    """Numbers in the dataset such as 3,17, or the SHA-256 of a file."""
    mask: str = ""
    """Of `inpaint`: half, centre, or the SHA-256 of a file."""
    resamplings: int = Field(default=0, ge=0, le=1000)
    """Of `inpaint`: how often each span of steps is walked."""
    strength: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps that `img2img` and `invert` take."""

    @property
    def name(self) -> str:
        """Part of a picture's name."""
        return "-".join(part.replace(" ", "-") for part in self._parts)

    @property
    def words(self) -> str:
        """The same for people."""
        return ", ".join(self._parts)

    @property
    def _parts(self) -> list[str]:
        given = {key: value for key, value in self.model_dump(exclude={"mode"}).items() if value}
        return [self.mode, *(f"{key} {_in_name(value)}" for key, value in given.items())]


def _in_name(value: object) -> str:
    text = file_words(f"{value}", "_")
    return text[:12] if re.fullmatch(SHA256_PATTERN, text) else text


class NumberedDrawing(Drawing):
    """All that decides the images of a batch, and how they are cut into pieces."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    checkpoint_sha256: str = Field(pattern=SHA256_PATTERN)
    worse_sha256: str = ""
    """Of the checkpoint that autoguidance guides away from, if it does."""
    editing: Editing | None = None
    own_sampler: str = ""
    """`module:function` and the SHA-256 of the module's file, if it is somebody's own."""
    found: tuple[int, ...] = ()
    """The points that are visited on the grid `found`."""
    size: int = Field(gt=0)
    channels: int = Field(ge=1, le=3)
    classes: tuple[str, ...]
    first_seed: int = Field(ge=0)
    count: int = Field(ge=1)
    piece_images: int = Field(ge=1)
    save: Literal["shards", "png"]

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return ceil(self.count / self.piece_images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it all."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def seeds(self, number: int) -> range:
        """The seeds of a piece."""
        first, end = self.first_seed + number * self.piece_images, self.first_seed + self.count
        return range(first, min(first + self.piece_images, end))


class FoundGrid(RunRecord):
    """The points that were found for so many steps. Created once: all pictures of so many steps visit the same."""

    steps: int = Field(ge=1)
    numbers: tuple[int, ...]
    """Of the process's points, from the most noise to the least."""
    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    """Whose network they were found on."""
    weights: str
    created: str
    code_version: str

    def is_at(self, place: Located) -> bool:
        """In the record of its number of steps."""
        return self.steps == len(self.numbers) == place.steps


class DrawingRecord(Sealed):
    """`drawing.json`: written before the first piece, so that no two drawings can share a folder."""

    drawing: NumberedDrawing


def named_piece(record: PieceRecord, drawing: NumberedDrawing) -> NamedObject:
    """Returns what the index says of a piece; a folder of images has the hash of its `sha256sum *.png`."""
    if drawing.save == "shards":
        return record.files[0]
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in record.files)
    named = NamedObject.of(record.files[0].key.rpartition("/")[0], lines.encode())
    return named.model_copy(update={"size_bytes": sum(file.size_bytes for file in record.files)})


class BatchIndex(Sealed):
    """All pieces in order. It depends on them alone: whoever sees the last piece first writes the same bytes."""

    drawing: NumberedDrawing
    pieces: tuple[NamedObject, ...]

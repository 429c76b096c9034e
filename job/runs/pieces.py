"""Many images of one checkpoint, in pieces that are committed one by one: the records that say which are there.

A batch of images has a folder, with `drawing.json` created first, each piece before its record, and `index.json` when
all pieces are there. Nobody who samples writes over or deletes anything in it, and `ddpm runs prune` deletes only what
has no record. So what lies there stays what its record says, however many processes make the same piece, and a piece
without a record, left by a process that was killed, is as good as another.
"""

from __future__ import annotations

import hashlib
from math import ceil
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from job.sealed import SHA256_PATTERN, Sealed


class Drawing(BaseModel):
    """All that decides the images, and how they are cut into pieces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    checkpoint_sha256: str = Field(pattern=SHA256_PATTERN)
    weights: Literal["ema", "model"]
    sampler: str
    steps: int = Field(ge=1)
    spacing: str
    eta: float
    variance: str
    precision: str
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

    def seeds(self, number: int) -> range:
        """The seeds of a piece."""
        first, end = self.first_seed + number * self.piece_images, self.first_seed + self.count
        return range(first, min(first + self.piece_images, end))

    def slice(self, index: int, slices: int) -> range:
        """The pieces of slice `index` (from 0) of `slices`: each n-th, so that all finish at about the same time."""
        return range(index, self.pieces, slices)

    def label(self, seed: int) -> int:
        """The class of an image: classes go round; -1 without classes."""
        return seed % len(self.classes) if self.classes else -1

    def image_name(self, seed: int) -> str:
        """An image's name, without its ending."""
        return f"{seed:09d}"


class Opening(Sealed):
    """`drawing.json`: written before the first piece, so that no two drawings can share a folder."""

    format: int = Field(default=1, ge=1, le=1)
    drawing: Drawing


class PieceFile(BaseModel):
    """One object of a piece."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^piece-\d{5}(\.tar|/\d{9,18}\.png)$")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=SHA256_PATTERN)


class PieceRecord(Sealed):
    """A piece that is there. Its existence is the commit."""

    format: int = Field(default=1, ge=1, le=1)
    number: int = Field(ge=0)
    first_seed: int = Field(ge=0)
    images: int = Field(ge=1)
    files: tuple[PieceFile, ...] = Field(min_length=1)
    drawing: Drawing
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Without this, two that make the same piece in the same second could both take themselves for the first."""
    created: str
    code_version: str


class PieceEntry(BaseModel):
    """What the index says about a piece; a folder's `sha256` is that of its files' lines as `sha256sum` prints them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^piece-\d{5}(\.tar)?$")
    first_seed: int
    images: int
    bytes: int
    sha256: str = Field(pattern=SHA256_PATTERN)


class BatchIndex(Sealed):
    """All pieces in order. It depends on them alone: whoever sees the last piece first writes the same bytes."""

    format: int = Field(default=1, ge=1, le=1)
    drawing: Drawing
    pieces: tuple[PieceEntry, ...]


def piece_name(number: int) -> str:
    """A piece's name: that of its folder, and without endings of its shard and record."""
    return f"piece-{number:05d}"


def piece_entry(record: PieceRecord) -> PieceEntry:
    """What the index says about a piece."""
    files = record.files
    lines = "".join(f"{file.sha256}  {file.name.rpartition('/')[2]}\n" for file in files)
    is_shard = record.drawing.save == "shards"
    return PieceEntry(
        name=files[0].name if is_shard else piece_name(record.number),
        first_seed=record.first_seed,
        images=record.images,
        bytes=sum(file.bytes for file in files),
        sha256=files[0].sha256 if is_shard else hashlib.sha256(lines.encode()).hexdigest(),
    )

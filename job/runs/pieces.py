"""Many images of one checkpoint, in pieces that are committed one by one: the records that say which are there.

A batch of images has a folder, with `drawing.json` created first, each piece before its record, and `index.json` when
all pieces are there. Nobody who samples writes over or deletes anything in it, and `ddpm runs prune` deletes only what
has no record. So what lies there stays what its record says, however many processes make the same piece, and a piece
without a record, left by a process that was killed, is as good as another.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import Field

from job.runs.layout import Located
from job.runs.records import NamedObject, RunRecord
from job.sealed import SHA256_PATTERN, Part, Sealed


class Drawing(Part):
    """All that decides the images, and how they are cut into pieces."""

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

    drawing: Drawing


class PieceRecord(RunRecord):
    """A piece that is there. Its existence is the commit."""

    number: int = Field(ge=0)
    files: tuple[NamedObject, ...] = Field(min_length=1)
    drawing: Drawing
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Without this, two that make the same piece in the same second could both take themselves for the first."""
    created: str
    code_version: str

    def is_at(self, place: Located) -> bool:
        """In the record of its number."""
        return self.number == place.piece

    @property
    def in_index(self) -> NamedObject:
        """What the index says about it; a folder has the hash of its `sha256sum *.png`."""
        if self.drawing.save == "shards":
            return self.files[0]
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        named = NamedObject.of(self.files[0].key.rpartition("/")[0], lines.encode())
        return named.model_copy(update={"size_bytes": sum(file.size_bytes for file in self.files)})


class BatchIndex(Sealed):
    """All pieces in order. It depends on them alone: whoever sees the last piece first writes the same bytes."""

    drawing: Drawing
    pieces: tuple[NamedObject, ...]

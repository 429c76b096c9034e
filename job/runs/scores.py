"""What came of an evaluation: scores, and all that decides them.

    RUN/evaluations/epoch-0490-ddim-100-0-5000-inception-1f3a9c02/piece-00012.safetensors   features, until the end
                                                                  scores.json               created once, at the end
    BUCKET/datasets/NAME-SIZE/references/inception-50000-7be2…/piece-00012.safetensors      features of real images

A score without its protocol says nothing: other images, filters, networks or counts give another. So both are one
record, with the score of real images against other real images beside it.
"""

from __future__ import annotations

from pydantic import Field

from ddpm.catalogue import METRICS, Metric
from job.runs.layout import CheckpointRef, Located
from job.runs.records import RunRecord
from job.runs.samples import NumberedDrawing
from job.sealed import SHA256_PATTERN, Part


def score_name(score: str, extractor: str) -> str:
    """Returns the name of a score by its network: `fid` is Inception's alone, and MobileNetV2's is `fd-mobilenet`."""
    name = score.removesuffix("_std")
    metric = METRICS.get(name, Metric(""))
    if extractor == "inception" or metric.of == "likelihood":
        return score
    return f"{metric.elsewhere or name}{score.removeprefix(name)}-{extractor}"


class Reference(Part):
    """The real images, and the network that saw them."""

    dataset: str
    dataset_id: str = Field(pattern=SHA256_PATTERN)
    size: int
    crop: str
    resize_filter: str
    images: int = Field(ge=1)
    """So many, drawn from all of them by a fixed order."""
    of_images: int = Field(ge=1)
    extractor: str
    extractor_sha256: str = Field(pattern=SHA256_PATTERN)

    def __str__(self) -> str:
        which = f"{self.images:,} images" if self.images == self.of_images else f"{self.images:,} of {self.of_images:,}"
        return f"{which} of {self.dataset}-{self.size} (crop {self.crop}, {self.resize_filter})"


class Scores(RunRecord):
    """How far the images of a drawing are from real ones."""

    drawing: NumberedDrawing
    reference: Reference
    values: dict[str, float]
    """By the name of the score."""
    floor: dict[str, float]
    """The same of real images against others."""
    floor_images: tuple[int, int]
    """How many real ones, and against how many."""
    bits_per_dim_images: int
    """Of how many images that bound is, if it is there."""
    held_out: bool
    """Whether nobody learnt from these."""
    batch: str
    created: str
    code_version: str

    def is_at(self, place: Located) -> bool:
        """In the folder of its batch."""
        return self.batch == place.batch

    @property
    def ref(self) -> CheckpointRef:
        """Whose images they are."""
        return CheckpointRef.parse(self.drawing.checkpoint.partition("/")[2])

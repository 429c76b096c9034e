"""The record of an evaluation: scores, with the protocol that decides them.

    RUN/evaluations/epoch-0490-ddim-100-0-5000-inception-1f3a9c02/piece-00012.safetensors   features, until the end
                                                                  scores.json               created once, at the end
    BUCKET/datasets/NAME-SIZE/references/inception-50000-7be2…/piece-00012.safetensors      features of real images

A score without its protocol means nothing: it depends on the images, the resize filter, the network and the counts. One
record therefore holds both, and beside them the score of real images against other real images.
"""

from __future__ import annotations

from pydantic import Field

from ddpm.catalogue import METRICS, Metric
from job.config import Size
from job.runs.drawings import NumberedDrawing
from job.runs.layout import CheckpointRef, Located
from job.runs.records import RunRecord
from job.sealed import SHA256_PATTERN, RecordPart


def score_name(score: str, extractor: str) -> str:
    """Returns the name of a score by its network: `fid` is Inception's alone, and MobileNetV2's is `fd-mobilenet`."""
    name = score.removesuffix("_std")
    metric = METRICS.get(name, Metric(""))
    if extractor == "inception" or metric.of == "likelihood":
        return score
    return f"{metric.elsewhere or name}{score.removeprefix(name)}-{extractor}"


class Reference(RecordPart):
    """The real images, and the network that extracted their features."""

    dataset: str
    dataset_id: str = Field(pattern=SHA256_PATTERN)
    size: Size
    crop: str
    resize_filter: str
    images: int = Field(ge=1)
    """The number of images, chosen from `of_images` by a fixed order."""
    of_images: int = Field(ge=1)
    extractor: str
    extractor_sha256: str = Field(pattern=SHA256_PATTERN)

    def __str__(self) -> str:
        which = f"{self.images:,} images" if self.images == self.of_images else f"{self.images:,} of {self.of_images:,}"
        return f"{which} of {self.dataset}-{self.size} (crop {self.crop}, {self.resize_filter})"


class Scores(RunRecord):
    """The distances between the images of a drawing and real ones."""

    drawing: NumberedDrawing
    reference: Reference
    values: dict[str, float]
    """The scores by name."""
    floor: dict[str, float]
    """The same scores of real images against other real images."""
    floor_images: tuple[int, int]
    """The numbers of real images on the two sides."""
    bits_per_dim_images: int
    """The number of images behind the score `bpd`, if there is one."""
    held_out: bool
    """Whether these images were held out from training."""
    batch: str
    created: str
    code_version: str

    def is_at(self, place: Located) -> bool:
        """Returns whether it lies in the folder of its batch."""
        return self.batch == place.batch

    @property
    def ref(self) -> CheckpointRef:
        """Returns the checkpoint that drew the images."""
        return CheckpointRef.parse(self.drawing.checkpoint.partition("/")[2])

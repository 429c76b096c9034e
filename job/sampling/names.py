"""What pictures and images are called below RUN/samples: what differs does not overwrite each other."""

from __future__ import annotations

import hashlib

from ddpm.epochs import epochs_completed_by

SAMPLES = "samples"


def label_of(images_seen: int, dataset_images: int, batch_size_images: int) -> str:
    """`epoch-0080`, or `images-000012345` for a checkpoint inside an epoch."""
    epochs = epochs_completed_by(images_seen, dataset_images, batch_size_images)
    return f"epoch-{epochs[-1]:04d}" if epochs else f"images-{images_seen:09d}"


def how_drawn(sampler: str, steps: int, *, raw: bool = False, precision: str = "", seeds: str = "") -> str:
    """All that decides the images of a checkpoint, as part of a name: `ddim-100-raw-seeds-0-63`.

    `precision` is named where it is not the run's own.
    """
    how = f"{sampler}-{steps}{'-raw' if raw else ''}{f'-{precision}' if precision else ''}"
    return f"{how}-seeds-{file_words(seeds, '_')}" if seeds else how


def file_words(numbers: str, comma: str) -> str:
    """A list of numbers as part of a name, with another `comma`; its hash where it is long."""
    words = "".join(numbers.split()).replace(",", comma)
    # File systems end names at 255 bytes.
    return words if len(words) <= 80 else hashlib.sha256(words.encode()).hexdigest()[:16]

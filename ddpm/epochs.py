"""Epochs as arithmetic on images seen. Image n of a run is position n mod N of epoch n div N, for N images.

Batches straddle epochs, without dropping or repeating an image. So an epoch may end inside a batch, and work "after an
epoch" is done at the first batch boundary at or after its last image.
"""

from __future__ import annotations


def images_at_epoch(epoch: int, dataset_images: int, batch_size_images: int) -> int:
    """Returns `images_seen` at the first batch boundary at or after `epoch` passes over the dataset."""
    return -(-epoch * dataset_images // batch_size_images) * batch_size_images


def epochs_completed_by(images_seen: int, dataset_images: int, batch_size_images: int) -> range:
    """Returns the epochs that the batch ending at `images_seen` completed; a batch may be larger than the dataset."""
    before = max(0, images_seen - batch_size_images)
    return range(before // dataset_images + 1, images_seen // dataset_images + 1)


def crosses(images_seen: int, batch_size_images: int, every_images: int) -> bool:
    """Returns whether the batch ending at `images_seen` reached or passed a multiple of `every_images`."""
    return images_seen // every_images > (images_seen - batch_size_images) // every_images

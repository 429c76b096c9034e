"""Batches of a run, read ahead.

They straddle epochs, without dropping or repeating an image. So an epoch may end inside a batch, and work "after an
epoch" is done at the first batch boundary at or after its last image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from job.data.reading.order import Int64s, Order
from job.exits import StoppedError
from job.stop import NEVER, Stop

if TYPE_CHECKING:
    import torch

    from job.data.reading.cache import ImageCache

PREFETCH_BATCHES = 4
"""Number of batches that are read ahead."""
_CHUNK_IMAGES = 8192
_LOOK_SECONDS = 0.5
_LAST_BATCH_SECONDS = 2.0


class LoadedBatch(NamedTuple):
    """This process's part of one global batch.

    Attributes:
        image_numbers: int64 [b].
        images: uint8 [b, C, H, W], or float16 [b, 2 C, h, w] of latents; channels_last in memory.
        labels: int64 [b], or None without classes.
    """

    image_numbers: Int64s
    images: torch.Tensor
    labels: torch.Tensor | None


def stream_batches(
    cache: ImageCache,
    order: Order,
    *,
    batch_size_images: int,
    first_image: int,
    last_image: int | None,
    places: range | None = None,
    pin_memory: bool = False,
    with_labels: bool = True,
    stop: Stop = NEVER,
) -> BatchStream:
    """Yields this process's images of each global batch, read ahead in one thread.

    Global batches are full, also across epochs: the k-th covers `batch_size_images` images of the run from
    `first_image + k * batch_size_images` on. They end where `last_image` is reached; without it, never.

    An error in the thread is raised at its place in the sequence.

    Args:
        cache: reads the images.
        order: order of the images.
        batch_size_images: size of the global batch, over all processes.
        first_image: number of the first image, on any batch boundary of the run.
        last_image: how many images of the run are needed at least, or None for no end.
        places: this process's places in each global batch; None: all.
        pin_memory: whether batches are page-locked, so that a GPU copies them in the background.
        with_labels: whether batches have the dataset's classes, as the network has.
        stop: polled during the wait for a batch, as a heartbeat, also while the bucket of a shard is away.
    """
    import torch

    def batches() -> Iterator[LoadedBatch]:
        own = range(batch_size_images) if places is None else places
        for first, indices, numbers in _parts(order, batch_size_images, first_image, last_image, own):
            cache.prefetch(order, first)
            images = torch.empty((len(indices), *cache.index.image_shape), dtype=torch.uint8, pin_memory=pin_memory)
            cache.read(indices, out=images.numpy())
            images = images.view(torch.float16) if cache.index.encoding else images
            labels = torch.from_numpy(cache.labels(indices)) if with_labels and cache.index.classes else None
            if labels is not None and pin_memory:
                labels = labels.pin_memory()
            yield LoadedBatch(numbers, images.permute(0, 3, 1, 2), labels)

    return BatchStream(batches(), stop)


class BatchStream(Iterator[LoadedBatch]):
    """Batches that a thread reads ahead, from the first call until they end or `close` is called."""

    def __init__(self, batches: Iterator[LoadedBatch], stop: Stop) -> None:
        """Takes its arguments from `stream_batches`."""
        self._batches, self._stop = batches, stop
        self._reader = ThreadPoolExecutor(1, "batches")
        self._coming: deque[Future[LoadedBatch | None]] = deque()
        self._is_closed = False

    def __next__(self) -> LoadedBatch:
        """Waits for the next batch and returns it."""
        self._read_ahead(PREFETCH_BATCHES + 1)
        if not self._coming:
            raise StopIteration
        coming = self._coming.popleft()
        while not coming.done() and not wait([coming], _LOOK_SECONDS).done:
            self._stop()
        if coming.exception() is None and (batch := coming.result()) is not None:
            return batch
        self.close()
        raise coming.exception() or StopIteration

    def holds(self, count: int) -> bool:
        """Returns at once whether the next `count` batches are read, or all that remain; not if a stop ended a read."""
        self._read_ahead(PREFETCH_BATCHES)
        coming = islice(self._coming, count)
        return all(batch.done() and not isinstance(batch.exception(), StoppedError) for batch in coming)

    def close(self) -> None:
        """Ends the thread, and waits at most `_LAST_BATCH_SECONDS` for its current batch."""
        self._is_closed = True
        self._reader.shutdown(wait=False, cancel_futures=True)
        wait([batch for batch in self._coming if not batch.cancelled()], _LAST_BATCH_SECONDS)
        self._coming.clear()

    def _read_ahead(self, count: int) -> None:
        while len(self._coming) < count and not self._is_closed:
            self._coming.append(self._reader.submit(next, self._batches, None))


def _parts(
    order: Order, batch_size: int, first: int, last: int | None, places: range
) -> Iterator[tuple[int, Int64s, Int64s]]:
    """Yields each batch's first image, and the indices and numbers at these places, computed for thousands at once."""
    chunk_batches = max(1, _CHUNK_IMAGES // batch_size)
    while last is None or first < last:
        batches = chunk_batches if last is None else min(chunk_batches, -(-(last - first) // batch_size))
        firsts = first + batch_size * np.arange(batches)
        numbers = firsts[:, None] + np.arange(places.start, places.stop, places.step)
        yield from zip(firsts.tolist(), order.indices(numbers.ravel()).reshape(numbers.shape), numbers, strict=True)
        first += batches * batch_size

"""The batches of a run, from any image number on, for any number of processes. Its only state is an image number."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from job.data.cache import ImageCache
from job.data.order import Order
from job.exits import StoppedError
from job.stop import NEVER, Stop

_CHUNK_IMAGES = 8192
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 2.0


class Batch(NamedTuple):
    """This process's part of one global batch.

    Attributes:
        first_image: number of the global batch's first image.
        image_numbers: int64 [b].
        images: uint8 [b, C, H, W], channels_last in memory.
        labels: int64 [b], or None without classes.
    """

    first_image: int
    image_numbers: npt.NDArray[np.int64]
    images: torch.Tensor
    labels: torch.Tensor | None


def stream_batches(
    cache: ImageCache,
    order: Order,
    *,
    batch_size_images: int,
    first_image: int,
    last_image: int | None,
    rank: int = 0,
    world_size: int = 1,
    prefetch_batches: int = 4,
    pin_memory: bool = False,
    with_labels: bool = True,
    stop: Stop = NEVER,
) -> BatchStream:
    """Yields rank's images first + rank, first + rank + world_size, … of each global batch, read ahead in one thread.

    Global batches are full, also across epochs: the k-th covers `batch_size_images` images of the run from
    `first_image + k * batch_size_images` on. The last is the one that reaches `last_image`; without that there is none.

    An error in the thread is raised here, in its place in the sequence.

    Args:
        cache: where the images are.
        order: which image is which.
        batch_size_images: over all processes.
        first_image: number of the first image, on any batch boundary of the run.
        last_image: how many images of the run are wanted at least, or None for no end.
        rank: this process.
        world_size: all processes; ranks beyond a remainder get one image less.
        prefetch_batches: batches that are ready before they are asked for, at least 2.
        pin_memory: page-locked batches, which a GPU can copy while this process goes on.
        with_labels: whether the network has classes; without, a dataset's classes are left out.
        stop: asked now and then while a batch is waited for, so that waiting for a bucket is not taken for hanging.
    """

    def read() -> Iterator[Batch]:
        first = first_image
        for indices, numbers in _slots(order, batch_size_images, first_image, last_image, rank, world_size):
            cache.prefetch(order, first)
            yield _batch(cache, first, indices, numbers, pin_memory, with_labels)
            first += batch_size_images

    return BatchStream(read(), max(2, prefetch_batches), stop)


class BatchStream(Iterator[Batch]):
    """Batches that a thread reads ahead. It begins at the first question, and ends with the stream."""

    def __init__(self, batches: Iterator[Batch], prefetch_batches: int, stop: Stop) -> None:
        """See `stream_batches`."""
        self._ahead = _Ahead(batches, Queue(prefetch_batches))
        self._stop = stop
        self._thread: threading.Thread | None = None

    def __next__(self) -> Batch:
        """The next batch, which is waited for."""
        self._start()
        item = self._take()
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def holds(self, count: int) -> bool:
        """Whether the next `count` batches are here, or all that there will be; waits for none.

        One that a stop kept from coming is not here.
        """
        self._start()
        return self._ahead.holds(count)

    def close(self) -> None:
        """Ends the thread; a batch that it is reading is waited for, but not one whose shard does not come."""
        self._ahead.closed.set()
        # The thread may be waiting for room, once at most: after that it looks whether it is still wanted.
        try:
            while True:
                self._ahead.ready.get_nowait()
        except Empty:
            over = time.monotonic() + _CLOSE_SECONDS
            while self._thread is not None and self._thread.is_alive() and time.monotonic() < over:
                self._thread.join(_POLL_SECONDS)
                self._stop()

    def __del__(self) -> None:
        """A loop that broke off has no further use for it."""
        self.close()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._ahead.read, name="batches", daemon=True)
            self._thread.start()

    def _take(self) -> Batch | BaseException | None:
        while not self._ahead.closed.is_set():
            try:
                return self._ahead.ready.get(timeout=_POLL_SECONDS)
            except Empty:
                self._stop()
        return None


@dataclass
class _Ahead:
    """What the thread works on. It does not know the stream, so that one nobody refers to is closed."""

    batches: Iterator[Batch]
    ready: Queue[Batch | BaseException | None]
    closed: threading.Event = field(default_factory=threading.Event)
    has_ended: bool = False
    was_stopped: bool = False

    def read(self) -> None:
        try:
            for batch in self.batches:
                self.ready.put(batch)
                if self.closed.is_set():
                    return
            self.has_ended = True
            self.ready.put(None)
        except BaseException as error:
            self.was_stopped = isinstance(error, StoppedError)
            self.has_ended = not self.was_stopped
            self.ready.put(error)

    def holds(self, count: int) -> bool:
        # The error of a stop, which lies behind the last batch, may be in there as well.
        return self.has_ended or self.ready.qsize() - self.was_stopped >= count


def _slots(
    order: Order, batch_size: int, first: int, last: int | None, rank: int, world_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Dataset indices and image numbers of this rank, a batch at a time; ordered by thousands, which is far cheaper."""
    slots = np.arange(rank, batch_size, world_size)
    chunk_batches = max(1, _CHUNK_IMAGES // batch_size)
    while last is None or first < last:
        count = chunk_batches if last is None else min(chunk_batches, -(-(last - first) // batch_size))
        numbers = first + batch_size * np.arange(count)[:, None] + slots
        yield from zip(order.indices(numbers.ravel()).reshape(numbers.shape), numbers, strict=True)
        first += count * batch_size


def _batch(
    cache: ImageCache,
    first_image: int,
    indices: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    pin_memory: bool,
    with_labels: bool,
) -> Batch:
    size, channels = cache.index.size, cache.index.channels
    images = torch.empty((len(indices), size, size, channels), dtype=torch.uint8, pin_memory=pin_memory)
    cache.read(indices, out=images.numpy())
    labels = None
    if with_labels and cache.index.classes:
        labels = torch.from_numpy(cache.labels(indices).astype(np.int64))
        labels = labels.pin_memory() if pin_memory else labels
    return Batch(first_image, numbers, images.permute(0, 3, 1, 2), labels)

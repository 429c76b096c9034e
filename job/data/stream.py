"""The batches of a run, from any image number on, for any number of processes. Its only state is an image number."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Empty, Queue
from typing import NamedTuple

import numpy as np
import torch

from job.data.cache import ImageCache
from job.data.order import Int64s, Order
from job.exits import StoppedError
from job.stop import NEVER, Stop

PREFETCH_BATCHES = 4
"""Batches that are ready before they are asked for."""
_CHUNK_IMAGES = 8192
_LOOK_SECONDS = 0.5
_LAST_BATCH_SECONDS = 2.0


class LoadedBatch(NamedTuple):
    """This process's part of one global batch.

    Attributes:
        first_image: number of the global batch's first image.
        image_numbers: int64 [b].
        images: uint8 [b, C, H, W], channels_last in memory.
        labels: int64 [b], or None without classes.
    """

    first_image: int
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
    rank: int = 0,
    world_size: int = 1,
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
        pin_memory: page-locked batches, which a GPU can copy while this process goes on.
        with_labels: whether the network has classes; without, a dataset's classes are left out.
        stop: beats while a batch is waited for, such as one whose shard lies in a bucket that is away.
    """

    def batches() -> Iterator[LoadedBatch]:
        has_labels = with_labels and cache.index.classes
        slots = _slots(order, batch_size_images, first_image, last_image, rank, world_size)
        for first, indices, numbers in slots:
            cache.prefetch(order, first)
            images = torch.empty((len(indices), *cache.index.image_shape), dtype=torch.uint8, pin_memory=pin_memory)
            cache.read(indices, out=images.numpy())
            labels = torch.from_numpy(cache.labels(indices)) if has_labels else None
            if labels is not None and pin_memory:
                labels = labels.pin_memory()
            yield LoadedBatch(first, numbers, images.permute(0, 3, 1, 2), labels)

    return BatchStream(batches(), stop)


class BatchStream(Iterator[LoadedBatch]):
    """Batches that a thread reads ahead, from the first question until they end or `close` is called."""

    def __init__(self, batches: Iterator[LoadedBatch], stop: Stop) -> None:
        """See `stream_batches`."""
        self._batches, self._stop = batches, stop
        self._ready: Queue[LoadedBatch | BaseException | None] = Queue(PREFETCH_BATCHES)
        self._closed = threading.Event()
        self._has_ended = self._was_stopped = False
        self._thread: threading.Thread | None = None

    def __next__(self) -> LoadedBatch:
        """The next batch, which is waited for."""
        self._start()
        item = None
        while not self._closed.is_set():
            try:
                item = self._ready.get(timeout=_LOOK_SECONDS)
                break
            except Empty:
                self._stop()
        if isinstance(item, LoadedBatch):
            return item
        self.close()
        raise StopIteration if item is None else item

    def holds(self, count: int) -> bool:
        """Whether the next `count` batches are here, or all that there will be; waits for none.

        One that a stop kept from coming is not here.
        """
        self._start()
        # The error of a stop, which lies behind the last batch, may be in there as well.
        return self._has_ended or self._ready.qsize() - self._was_stopped >= count

    def close(self) -> None:
        """Ends the thread; a batch that it is reading is waited for, but not one whose shard does not come."""
        self._closed.set()
        over = time.monotonic() + _LAST_BATCH_SECONDS
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < over:
            # It may be waiting for room.
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(_LOOK_SECONDS / 10)
            self._stop()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="batches", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        try:
            for batch in self._batches:
                self._ready.put(batch)
                if self._closed.is_set():
                    return
            self._has_ended = True
            self._ready.put(None)
        except BaseException as error:
            self._was_stopped = isinstance(error, StoppedError)
            self._has_ended = not self._was_stopped
            self._ready.put(error)


def _slots(
    order: Order, batch_size: int, first: int, last: int | None, rank: int, world_size: int
) -> Iterator[tuple[int, Int64s, Int64s]]:
    """First image of each batch, and this rank's indices and image numbers; thousands at once, which is far cheaper."""
    slots = np.arange(rank, batch_size, world_size)
    chunk_batches = max(1, _CHUNK_IMAGES // batch_size)
    while last is None or first < last:
        batches = chunk_batches if last is None else min(chunk_batches, -(-(last - first) // batch_size))
        firsts = first + batch_size * np.arange(batches)
        numbers = firsts[:, None] + slots
        yield from zip(firsts.tolist(), order.indices(numbers.ravel()).reshape(numbers.shape), numbers, strict=True)
        first += batches * batch_size

"""`ddpm sample --count`: many images of a checkpoint, in pieces, by any number of processes on any number of machines.

Each process makes pieces of its own and commits them; those of one command meet to share the weights and at the end.
Which pieces are there decides what is left to do, so that a job goes on wherever it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from ddpm import figures
from job.exits import BadDataError, StoppedError
from job.processes.launched import lost_peer
from job.processes.ranks import Agreement, meet
from job.progress import Progress
from job.requests import SampleRequest
from job.runs.checkpoints import CheckpointRef
from job.runs.provenance import put_picture
from job.runs.retention import reading
from job.sampling.names import SAMPLES
from job.sampling.piece_files import Images, PieceWriter, read_images
from job.sampling.pieces import GRID, Batch, PieceRecord
from job.sampling.plan import SamplePlan, plan_batches, plan_sampling
from job.sampling.sample import Painter, load_weights, look_for, sampling_of
from job.stop import NEVER, Stop


def run_batches(request: SampleRequest, stop: Stop = NEVER) -> None:
    """Draws this slice of the images of each chosen checkpoint, and prints where they lie.

    Args:
        request: what to draw.
        stop: asked all the while.

    Raises:
        MissingInputError: no such run or checkpoint; the message names those there are.
        BadRequestError: images drawn otherwise lie where these would.
        BadDataError: a checkpoint or a record is damaged; the message names the object.
        BucketAwayError: the bucket stayed away beyond the limit.
        StoppedError: a signal came; whole pieces are saved, and the same command goes on.
    """
    plan = plan_sampling(request, stop)
    ranks = meet(stop)
    # A run that trains meanwhile may show each process another newest checkpoint.
    plan = replace(plan, checkpoints=ranks.on_main(lambda: plan.checkpoints))
    precision = request.precision or plan.config.train.precision
    painter = Painter(plan.config, ranks, precision, stop, Agreement(ranks.world_size, flags=1))
    for ref, batch in zip(plan.checkpoints, plan_batches(plan, request), strict=True):
        _Slice(request, plan, painter, stop, ref, batch).make()


class _Slice:
    """One slice of one checkpoint's images, made by all processes of this command."""

    def __init__(
        self,
        request: SampleRequest,
        plan: SamplePlan,
        painter: Painter,
        stop: Stop,
        ref: CheckpointRef,
        batch: Batch,
    ) -> None:
        self.request, self.plan, self.painter, self.stop = request, plan, painter, stop
        self.ref, self.batch = ref, batch
        self.ranks, self.sampling = painter.ranks, sampling_of(plan)
        self.batch_size = request.batch_size or plan.config.sample.batch_size
        index, slices = request.slice_of
        self.numbers = batch.drawing.slice(index, slices)
        self.name = batch.store.uri.rpartition("/")[2]
        self._renew: Callable[[], None] = lambda: None
        """Says that the run is still being sampled from."""
        self.slice_name = f"slice {index}/{slices}" if slices > 1 else ""

    def make(self) -> None:
        """Makes the pieces that are missing, and the index if that completes it. Collective."""
        missing = self.ranks.on_main(self._begin)
        made_images, started = 0, time.monotonic()
        with ExitStack() as stack:
            # Each for itself: one that commits its last piece may outlive the others.
            self._renew = stack.enter_context(reading(self.plan.run, self.ref))
            if missing:
                load_weights(self.plan.run, self.ref, self.batch.drawing.weights, self.painter.network, self.ranks)
                started = time.monotonic()
                made_images = self._draw(missing)
            seconds = time.monotonic() - started
            self.ranks.on_main(lambda: self._finish(missing, made_images, seconds))

    def _begin(self) -> list[int]:
        """The pieces of this slice that are not there; those that are have readable records."""
        batch = self.batch
        batch.begin()
        there = batch.committed()
        found = [number for number in self.numbers if number in there]
        sizes = {entry.key: entry.size_bytes for entry in batch.store.list()}
        for record in self._records(found):
            batch.check_files(record, sizes)
        return [number for number in self.numbers if number not in there]

    def _draw(self, missing: list[int]) -> int:
        """Draws pieces until none is left, and returns how many images all processes committed."""
        rank, world_size, batch = self.ranks.rank, self.ranks.world_size, self.batch
        total, left = self._images(self.numbers), self._images(missing)
        title = f"{self.name} {self.slice_name}".strip()
        writer, done = PieceWriter(batch, self.stop), 0

        def advance(images: int) -> None:
            nonlocal done
            done += images
            self._renew()
            # What the others have drawn by now is about as much.
            bar.update(min(total, total - left + done * world_size))

        try:
            with Progress(title, total=total, start=total - left, disable=rank != 0) as bar, writer:
                for number in missing[rank::world_size]:
                    if batch.is_committed(number):
                        advance(len(batch.drawing.seeds(number)))
                    else:
                        writer.submit(number, self._draw_piece(number, advance))
            (made_images,) = self.ranks.sum(writer.made_images)
        except (StoppedError, RuntimeError) as error:
            # A process that is stopped does not wait for the others, whose pieces may take long: its end ends them.
            if isinstance(error, RuntimeError) and not (self.stop() and lost_peer(error)):
                raise
            of_rank = f" of process {rank}" if world_size > 1 else ""
            raise StoppedError(
                f"stopped by {self.stop.reason} after {writer.made_images:,} images{of_rank} of "
                f"{self.name}; all whole pieces are saved, and the same command goes on from there"
            ) from None
        return made_images

    def _draw_piece(self, number: int, advance: Callable[[int], None]) -> Images:
        """The images of a piece: uint8 [n, H, W, C].

        Batches are cut within the piece: rounding depends on a batch's company, so this gives equal bytes each time.

        Raises:
            StoppedError: this process was asked to stop.
        """
        seeds, parts = self.batch.drawing.seeds(number), list[Images]()
        for start in range(0, len(seeds), self.batch_size):
            some = seeds[start : start + self.batch_size]
            parts.append(figures.to_uint8(self.painter.generate(some, self.sampling, self._check_stopped)))
            advance(len(some))
        return np.concatenate(parts)

    def _check_stopped(self, *_: Any) -> None:
        self.stop.check("while sampling")

    def _records(self, numbers: Sequence[int]) -> list[PieceRecord]:
        with Progress("reading records", total=len(numbers), unit="records") as bar:

            def read(done: int) -> None:
                bar.update(done)
                self._check_stopped()

            return self.batch.load_all(numbers, read)

    def _images(self, numbers: Sequence[int]) -> int:
        return sum(len(self.batch.drawing.seeds(number)) for number in numbers)

    def _finish(self, missing: list[int], made_images: int, seconds: float) -> None:
        """Says what was done, and writes grid and index if all pieces of all slices are there."""
        batch, drawing = self.batch, self.batch.drawing
        there = self._images(self.numbers) - self._images(missing)
        rate = f" at {made_images / seconds:.2f} images/s" if made_images else ""
        note = f"{made_images:,} made{rate}, {there:,} there before"
        to_come = drawing.pieces - len(batch.committed())
        if to_come and not self.slice_name:
            raise BadDataError(
                f"{batch.store.uri}: {to_come:,} pieces that were there have gone meanwhile: find out who deleted "
                "them; the same command makes them again"
            )
        if to_come:
            print(
                f"{batch.store.uri}  ({self.slice_name} is done: {note}; "
                f"{to_come:,} of {drawing.pieces:,} pieces are to come from others)"
            )
            return
        if batch.index() is None:
            self._publish()
        print(batch.describe(note if missing else "complete already"))

    def _publish(self) -> None:
        """Writes the grid of the first images, then the index."""
        batch, drawing, config = self.batch, self.batch.drawing, self.plan.config
        records = self._records(range(drawing.pieces))
        images = read_images(batch, records[0], config.sample.images)
        seeds = drawing.seeds(0)[: len(images)]
        grid = look_for(config, self.plan.index, None).grid(images, seeds)
        key = f"{SAMPLES}/{self.name}/{GRID}"
        put_picture(self.plan.run, key, grid, fence=self.ref.fence, images_seen=self.ref.images_seen)
        batch.commit_index(records)

"""Saving while training goes on: training waits for a copy into host buffers, and a thread does the rest.

copy to host → (training goes on) → safetensors files on the local disk → objects under a fresh prefix → manifest →
deletion of old checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.coordination.lease import Lease
from job.coordination.sealed import NamedObject
from job.exits import BucketAwayError, StoppedError
from job.runs.checkpoints import Manifest, commit_manifest, files_for_diffusers
from job.runs.layout import OF_CHECKPOINT, CheckpointRef, ObjectKind, located
from job.runs.metric_rows import History, Row
from job.runs.outlook import Cadence
from job.runs.records import Attempt
from job.runs.retention import Retention, Retirement
from job.runs.run import put_picture
from job.stop import GRACE_VARIABLE, Stop
from job.store import Store
from job.store.files import os_errors, scratch_folder

WAIT_SECONDS = 0.1
Tensors = dict[str, dict[str, Tensor]]
"""By group and name."""

PART_BYTES = 320 * 1024 * 1024
"""Ho et al.'s network for CIFAR-10 needs one part for each group; larger ones still keep all connections busy."""
PARALLEL_UPLOADS = 4
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}
"""The names in safetensors' headers (github.com/huggingface/safetensors, format)."""


def plan_parts(tensors: Tensors) -> Tensors:
    """Returns the tensors of each file: groups are cut at about `PART_BYTES`, and a larger tensor has a file alone."""
    parts: Tensors = {}
    for group, named in tensors.items():
        number = size_bytes = 0
        for name, tensor in named.items():
            if size_bytes and size_bytes + tensor.nbytes > PART_BYTES:
                number, size_bytes = number + 1, 0
            parts.setdefault(f"{group}-{number:02d}.safetensors", {})[name] = tensor
            size_bytes += tensor.nbytes
    return parts


class CheckpointFiles:
    """Uploads the files of a run's checkpoints: a host copy of the live tensors, and its descriptions for diffusers.

    The host buffers are contiguous, allocated and touched once, and pinned for CUDA.

    Attributes:
        unet_group: the group whose weights lie where diffusers reads them.
        descriptions: the objects beside them, by key below the checkpoint.
    """

    def __init__(
        self,
        live: Tensors,
        retention: Retention,
        classes: tuple[str, ...],
        receive: Callable[[Tensors], None] = lambda host: None,
    ) -> None:
        # In the order of the files, whose tensors then lie side by side.
        self._live = {group: _in_order(named) for group, named in live.items()}
        self._retention, self._receive = retention, receive
        self._host: Tensors = {}
        device = next(tensor.device for named in live.values() for tensor in named.values())
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for group, named in self._live.items():
            self._host[group] = {}
            for is_code, same in groupby(named.items(), lambda item: item[1].dtype == torch.uint8):
                of_dtype = dict(same)
                sizes = [tensor.numel() for tensor in of_dtype.values()]
                flat = torch.empty(
                    sum(sizes), dtype=torch.uint8 if is_code else torch.float32, pin_memory=device.type == "cuda"
                )
                flat.fill_(0)  # touches every page: a first save into fresh pages takes ten times as long
                views = zip(of_dtype.items(), flat.split(sizes), strict=True)
                self._host[group] |= {name: view.view(tensor.shape) for (name, tensor), view in views}
        self._parts = plan_parts(self._host)
        self.unet_group, self._names, self.descriptions = files_for_diffusers(retention.config, classes, self._parts)

    def copy(self) -> None:
        """Copies the live values into the host buffers: on a GPU beside the next step, up to `before_change`."""
        is_beside = self._stream is not None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        # On an Apple GPU nothing would wait for a copy beside a step, and PyTorch asks it for a stream of CUDA in vain.
        with torch.cuda.stream(self._stream) if is_beside else nullcontext():
            for group, named in self._live.items():
                here = {name: tensor for name, tensor in named.items() if not tensor.is_meta}
                torch._foreach_copy_(
                    [self._host[group][name] for name in here], list(here.values()), non_blocking=is_beside
                )
        self._receive(self._host)

    def before_change(self) -> None:
        """Makes the GPU, and not this thread, wait for the copy: the next kernels change the live values."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def tensors_of(self, ref: CheckpointRef) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields the tensors of a checkpoint by key: the host copy, and a snapshot of its averages if one is due."""
        if self._stream is not None:
            self._stream.synchronize()
        takes_snapshot = self._retention.takes_snapshot(ref.images_seen)
        averages = self._retention.config.ema.names if takes_snapshot else ()
        for name, tensors in self._parts.items():
            yield f"{ref.key}/{self._names.get(name, name)}", tensors
            if name.rpartition("-")[0] in averages:
                yield f"{ObjectKind.SNAPSHOT.folder}/{ref}/{name}", {n: t.half() for n, t in tensors.items()}

    def upload(
        self, run: Store, lease: Lease, ref: CheckpointRef, when_written: Callable[[], None]
    ) -> tuple[NamedObject, ...]:
        """Uploads the files of a checkpoint, and calls `when_written` as soon as the host copy may be overwritten."""
        with scratch_folder("save") as folder, ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:

            def upload(path: Path, key: str) -> None:
                # A process that slept may have lost the run: without this it would upload a whole useless checkpoint.
                run.retry(lease.confirm)
                run.move(path, key, fresh=True)

            records, uploads = [], []
            for number, (key, tensors) in enumerate(self.tensors_of(ref)):
                path = folder / f"{number}.safetensors"
                records.append(write_part(path, key, tensors))
                uploads.append(pool.submit(upload, path, key))
            when_written()
            for one in uploads:
                one.result()
        for name, data in self.descriptions.items():
            run.create(key := f"{ref.key}/{name}", data)
            records.append(NamedObject.of(key, data))
        return tuple(records)


def write_part(path: Path, key: str, tensors: dict[str, Tensor]) -> NamedObject:
    """Writes tensors on the host to a file, byte for byte as safetensors does, and hashes it on the way.

    The library's own function takes several times as long for many small tensors, and keeps the interpreter from the
    threads that train meanwhile.

    Returns:
        The entry of a record that names the file as the object at `key`.
    """
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    in_order = _in_order(tensors)
    for name, tensor in in_order.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with os_errors(path), path.open("wb") as file:
        flat = (tensor.numpy() for tensor in _joined(in_order.values()))
        contents: list[Any] = [len(text).to_bytes(8, "little"), text, *flat]
        for content in contents:
            file.write(content)
            sha256.update(content)
    return NamedObject(key=key, size_bytes=8 + len(text) + end, sha256=sha256.hexdigest())


def _in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the order of a file: larger types first, which stay aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields the same values as flat tensors; those that lie side by side in one buffer are one.

    So the host copy of a part takes one write instead of hundreds, of which each waits for the interpreter.
    """
    first, values = None, 0
    for tensor in map(Tensor.contiguous, tensors):
        if first is not None:
            is_next = tensor.storage_offset() == first.storage_offset() + values
            if is_next and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr():
                values += tensor.numel()
                continue
            yield first.as_strided((values,), (1,))
        first, values = tensor, tensor.numel()
    if first is not None:
        yield first.as_strided((values,), (1,))


@dataclass(frozen=True)
class LeasedRun:
    """A run whose lease an attempt has, so that no other attempt writes to it."""

    store: Store
    """The run's folder."""
    retention: Retention
    record: Attempt
    """Of the attempt."""
    lease: Lease
    classes: tuple[str, ...]
    """The names of its classes."""
    damaged: Collection[CheckpointRef] = ()
    """Checkpoints that do not verify: they do not count for retention, and are kept for inspection."""


class CheckpointWriter:
    """Commits checkpoints in a thread, in order, while training goes on.

    While the bucket is away the thread retries. It then commits the newest of the checkpoints that fell due meanwhile,
    the metrics of the others, and every picture. An error that ends the thread, such as a bucket that stays away beyond
    the limit, is raised by every later call.

    Attributes:
        rows: of the metrics since the last checkpoint; training appends to them.
        retention: the rules that decide which checkpoints stay.
        cadence: the interval between saves, and the measured duration of the last one.
    """

    def __init__(
        self,
        leased: LeasedRun,
        live: Tensors,
        *,
        before: Manifest | None,
        stop: Stop,
        receive: Callable[[Tensors], None] = lambda host: None,
    ) -> None:
        """Allocates the host buffers and starts the thread.

        Args:
            leased: the run.
            live: the tensors to save, by group.
            before: of the restored checkpoint, whose metrics and snapshots stay those of the run.
            stop: asked while the main thread waits.
            receive: fills those of the host buffers whose live tensors other processes have, and are `meta` here.
        """
        self.rows = list[Row]()
        self._snapshots = before.snapshots if before else ()
        self._lineage = (*before.lineage, str(before.ref)) if before else ()
        self.retention = leased.retention
        self._leased, self._stop = leased, stop
        # Unlike `stop` this ends no upload that is under way when a stop is requested.
        self._closing = Stop(stop.grace_seconds)
        self._run = leased.store.within(leased.store.retry.limit_seconds, self._closing)
        self._history = History(self._run, before.segments if before else (), leased.retention.config)
        self._files = CheckpointFiles(live, leased.retention, leased.classes, receive)
        every_minutes = leased.retention.config.checkpoint.every_minutes
        self.cadence = Cadence(self._run, every_minutes, stop.grace_seconds)
        self._retirement = Retirement(self._run, leased.lease, leased.damaged)
        self._changed = threading.Condition()
        self._queued: tuple[Manifest, list[Row]] | None = None
        self._later: list[Callable[[Store], None]] = []
        self._reading_host = self._committing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def overdue(self) -> bool:
        """Returns whether the last checkpoint is older than the cadence allows."""
        return self.cadence.is_over and not self._busy

    @property
    def troubled(self) -> bool:
        """Returns whether `raise_trouble` raises."""
        return bool(self._leased.lease.lost) or self._error is not None

    def raise_trouble(self) -> None:
        """Raises the reason why this attempt cannot go on, if there is one.

        Raises:
            LostRunError: another attempt took the run.
            JobError: saving failed for good.
        """
        self._leased.lease.check_lost()
        if self._error is not None:
            raise self._error

    def save(self, images_seen: int, loss_sums: list[list[float]]) -> None:
        """Queues a checkpoint of this moment, with the metric rows since the one before.

        Blocks for a local write that is under way, and on a CPU for a copy of the live tensors; on a GPU they must not
        change before `before_change`. While the bucket is away it also blocks for a queued checkpoint that must not be
        replaced: one that is kept for good, or has a snapshot.

        Raises:
            BucketAwayError: a stop was requested, and no time is left to wait.
        """
        self.cadence.begin()
        record = self._leased.record
        manifest = Manifest(
            fence=record.fence,
            attempt=record.id,
            images_seen=images_seen,
            loss_sums=loss_sums,
            lineage=self._lineage,
            files=(),
            unet_group=self._files.unet_group,
        )
        with self._change():
            while self._reading_host or (self._queued and self.retention.needs(self._queued[0].images_seen)):
                self._wait_a_little()
            self.raise_trouble()
            self._files.copy()
            # A checkpoint that this one replaces leaves it its rows.
            rows = (self._queued[1] if self._queued else []) + self.rows
            self._queued, self.rows = (manifest, rows), []
        self.cadence.copied()

    def before_change(self) -> None:
        """Lets the GPU finish the copy of the last save before it changes the live tensors."""
        self._files.before_change()

    def put(self, key: str, picture: bytes, *, images_seen: int) -> None:
        """Queues the upload of a picture by the weights of `images_seen`."""
        ref = CheckpointRef(self._leased.record.fence, images_seen)
        self.do_later(lambda run: put_picture(run, key, picture, ref))

    def do_later(self, work: Callable[[Store], None]) -> None:
        """Queues a function of the run's store, which the thread calls after everything that was queued before."""
        with self._change():
            self.raise_trouble()
            self._later.append(work)

    def wait(self) -> None:
        """Returns when everything that was queued is in the bucket.

        Raises:
            BucketAwayError: a stop was requested, and there was not enough time for the last checkpoint.
            StoppedError: there was not enough time for the last pictures.
        """
        with self._changed:
            while self._busy or self._later:
                self._wait_a_little()
            self.raise_trouble()

    def close(self, wait: bool) -> None:
        """Ends the thread; with `wait` it first commits the queue, for as long as a preemption would allow."""
        over = time.monotonic() + (self._stop.grace_seconds if wait else 0.0)

        def is_time_left() -> bool:
            self._stop()
            return time.monotonic() < over and self._stop.seconds_left_to_save() > 0

        with self._change():
            while (self._busy or self._later) and self._error is None and is_time_left():
                self._changed.wait(WAIT_SECONDS)
            self._closing.request("the end of its process")
        # A thread that waits for a silent bucket cannot be joined; it ends with the process.
        while self._thread.is_alive() and is_time_left():
            self._thread.join(WAIT_SECONDS)
        if self._error is not None:
            raise self._error

    @property
    def _busy(self) -> bool:
        return self._committing or self._queued is not None

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def _wait_a_little(self) -> None:
        self.raise_trouble()
        if self._stop() and self._stop.seconds_left_to_save() <= 0:
            if self._busy:
                raise BucketAwayError(
                    f"{self._run.uri} did not take the last checkpoint in the {self._stop.grace_seconds:g} s "
                    f"({GRACE_VARIABLE}) between the notice and the end: what was learnt since the one before will be "
                    "learnt again by the same command"
                )
            raise StoppedError(
                f"stopped before the last pictures were in {self._run.uri}; every checkpoint is, and the same command "
                "goes on from there"
            )
        self._changed.wait(WAIT_SECONDS)

    def _work(self) -> None:
        try:
            while self._has_work():
                # In order: a resumed attempt makes only the picture of the checkpoint that it begins with. After a
                # stop request the checkpoint goes first, because there may be no time for both.
                if self._later and not (self._queued and self._stop.reason):
                    self._run.retry(self._leased.lease.confirm)
                    self._later[0](self._run)
                    with self._change():
                        del self._later[0]
                else:
                    self._retirement.after(self._commit(), self.retention)
        except BaseException as error:
            with self._change():
                self._error = error
                self._committing = self._reading_host = False

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._queued or self._later or self._closing.reason):
                self._changed.wait()
            return not self._closing.reason

    def _commit(self) -> Manifest:
        """Commits the queued checkpoint: its files, its rows, a last check of the lease, the manifest."""
        with self._change():
            assert self._queued is not None
            (manifest, rows), self._queued = self._queued, None
            self._committing = self._reading_host = True
        began, processor_began, outages = time.monotonic(), time.thread_time(), self._run.retry.outages
        uploaded = self._files.upload(self._run, self._leased.lease, manifest.ref, self._release_host)
        files = tuple(file for file in uploaded if located(file.key).kind in OF_CHECKPOINT)
        self._snapshots += tuple(file for file in uploaded if file not in files)
        self._history.add(rows, manifest.ref, is_hurried=bool(self._stop.reason))
        named = {"files": files, "snapshots": self._snapshots, "segments": self._history.segments}
        manifest = manifest.model_copy(update=named)

        def commit() -> None:
            # After an outage the lease is checked again: another attempt may have taken the run meanwhile.
            self._leased.lease.confirm()
            commit_manifest(self._run, manifest)

        self._run.retry(commit)
        # The wait for a bucket that is away would pass for the duration of a save.
        if self._run.retry.outages == outages:
            self.cadence.committed(time.monotonic() - began, time.thread_time() - processor_began)
        with self._change():
            self._committing = False
        return manifest

    def _release_host(self) -> None:
        with self._change():
            self._reading_host = False

"""Saving without stopping: training waits for a copy into host buffers, a thread does the rest.

copy to host → (training goes on) → safetensors files on the local disk → objects under a fresh prefix → manifest →
old checkpoints are retired. How often is as configured, or more often where a preemption leaves no time for a last one.
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from job.exits import BucketAwayError, JobError, LostRunError, StoppedError
from job.runs import metrics, pipeline
from job.runs.checkpoints import Manifest, commit_manifest, list_checkpoints, sha256_of
from job.runs.layout import OF_CHECKPOINT, CheckpointRef, ObjectKind, located
from job.runs.lease import Lease
from job.runs.readers import being_read
from job.runs.records import Attempt, NamedObject, utc_now
from job.runs.retention import Retention, delete_checkpoint, sweep
from job.runs.samples import put_picture
from job.stop import GRACE_VARIABLE, MARGIN_SECONDS, Stop
from job.store import Store
from job.store.files import os_errors, scratch_folder

Tensors = dict[str, dict[str, Tensor]]
"""By group and name."""

PART_BYTES = 128 * 1024 * 1024
"""Parts of this size keep all connections busy, and a retry cheap."""
PARALLEL_UPLOADS = 4
WAIT_SECONDS = 0.1
PROBE_BYTES = 16 << 20
SAVES_PER_CADENCE = 10
"""Where a preemption costs the work since the last save, saving may take up to a tenth of the time."""
SHORTEST_CADENCE_MINUTES = 1.0


def plan_parts(tensors: Tensors) -> Tensors:
    """Cuts each group into files of about `PART_BYTES`: by file name, what it holds. A large tensor has its own."""
    parts: Tensors = {}
    for group, named in tensors.items():
        number = size_bytes = 0
        for name, tensor in named.items():
            if size_bytes and size_bytes + tensor.nbytes > PART_BYTES:
                number, size_bytes = number + 1, 0
            parts.setdefault(f"{group}-{number:02d}.safetensors", {})[name] = tensor
            size_bytes += tensor.nbytes
    return parts


class HostCopy:
    """Host buffers for a set of live tensors: contiguous, allocated and touched once, pinned for CUDA."""

    def __init__(self, live: Tensors) -> None:
        self.live = live
        self.host: Tensors = {}
        self._cuda = any(tensor.is_cuda for named in live.values() for tensor in named.values())
        for group, named in live.items():
            sizes = [tensor.numel() for tensor in named.values()]
            flat = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=self._cuda)
            flat.fill_(0)  # touches every page: a first save into fresh pages takes ten times as long
            views = zip(named.items(), flat.split(sizes), strict=True)
            self.host[group] = {name: view.view(tensor.shape) for (name, tensor), view in views}

    def copy(self) -> None:
        """Copies the live values; when it returns, training may go on."""
        for group, named in self.live.items():
            torch._foreach_copy_(list(self.host[group].values()), list(named.values()), non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class HeldRun:
    """A run, and what makes an attempt its one writer."""

    store: Store
    """The run's folder."""
    retention: Retention
    attempt: Attempt
    lease: Lease


class CheckpointWriter:
    """Commits checkpoints in a thread of its own, in order. Training waits for a copy into host buffers, no longer.

    While the bucket is away the thread tries again, and training goes on: of the checkpoints that fall due meanwhile
    the newest is kept, with the small objects of those it stands in for, and every picture. An error that ends the
    thread, such as a bucket that stays away beyond the limit, is raised by the next call: a run that cannot be saved
    must not go on. Whoever waits asks `stop` how long there is time for it.

    Attributes:
        rows: of the metrics since the last checkpoint; whoever trains appends to them.
        saved_metrics: the objects that hold those until then, or are to; on their way.
        retention: which checkpoints stay.
    """

    def __init__(
        self,
        held: HeldRun,
        live: Tensors,
        before: Manifest | None,
        aside: set[CheckpointRef],
        stop: Stop,
        note: Callable[[str], None],
    ) -> None:
        """Allocates the host buffers and starts the thread.

        Args:
            held: the run.
            live: the tensors to save, by group.
            before: of the checkpoint that was restored, whose metrics and snapshots stay those of the run.
            aside: checkpoints that do not verify. They push no other out, and stay for somebody to look at.
            stop: asked while the main thread waits.
            note: told what a person should know.
        """
        self.rows, self.saved_metrics = list[metrics.Row](), list(before.metrics if before else ())
        self._snapshots = before.snapshots if before else ()
        self.retention = held.retention
        self._held, self._aside, self._stop, self._note = held, aside, stop, note
        # What is on its way when a stop is asked for is to arrive.
        self._closing = Stop(stop.grace_seconds)
        self._run = held.store.within(held.store.retry.limit_seconds, self._closing)
        self._copy = HostCopy(live)
        self._parts = plan_parts(self._copy.host)
        self._descriptions = pipeline.described(held.retention.config).objects
        self._drawn = held.retention.config.sample.weights if self._descriptions else ""
        self._names = self._named_for_diffusers()
        self._every_minutes, self._saved_at = held.retention.config.checkpoint.every_minutes, time.monotonic()
        self._changed = threading.Condition()
        self._queued: tuple[Manifest, dict[str, bytes]] | None = None
        self._later: list[Callable[[Store], None]] = []
        self._reading_host = self._committing = self._is_swept = False
        self._error: BaseException | None = None
        threading.Thread(target=self._measure, name="measure-save", daemon=True).start()
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is older than the cadence allows."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return minutes >= self._every_minutes and not self._busy

    @property
    def troubled(self) -> bool:
        """Whether this attempt cannot go on: another holds the run, or what was to be saved cannot be."""
        return bool(self._held.lease.lost) or self._error is not None

    def raise_trouble(self) -> None:
        """Raises why this attempt cannot go on, if it cannot.

        Raises:
            LostRunError: another attempt took the run.
            JobError: saving failed for good.
        """
        self._held.lease.check_lost()
        if self._error is not None:
            raise self._error

    def save(self, images_seen: int, loss_sums: list[list[float]]) -> None:
        """Queues a checkpoint of this moment, with the metric rows since the one before.

        Blocks for a copy of the live tensors; for a local write that is under way; and, with the bucket away, for a
        queued checkpoint of an epoch that is kept for good, or has a snapshot.

        Raises:
            BucketAwayError: a stop was asked for, and leaves no time for that.
        """
        self._saved_at = time.monotonic()
        attempt, objects = self._held.attempt, dict[str, bytes]()
        if self.rows:
            config = None if self.saved_metrics else self.retention.config
            objects = metrics.metric_objects(self.rows, CheckpointRef(attempt.fence, images_seen), config)
            self.saved_metrics += [NamedObject.of(key, data) for key, data in objects.items()]
            self.rows = []
        manifest = Manifest(
            fence=attempt.fence,
            attempt=attempt.id,
            images_seen=images_seen,
            created=utc_now(),
            world_size=attempt.world_size,
            loss_sums=loss_sums,
            files=(),
            drawn=self._drawn,
            metrics=tuple(self.saved_metrics),
        )
        with self._change():
            while self._reading_host or (self._queued and self.retention.needs(self._queued[0].images_seen)):
                self._wait_a_little()
            self.raise_trouble()
            if self._queued:
                objects = self._queued[1] | objects
            self._copy.copy()
            self._queued = manifest, objects

    def put(self, key: str, picture: bytes, *, images_seen: int) -> None:
        """Queues a picture of the weights at `images_seen`, which goes up when the bucket takes it."""
        ref = CheckpointRef(self._held.attempt.fence, images_seen)
        self.do_later(lambda run: put_picture(run, key, picture, ref))

    def do_later(self, work: Callable[[Store], None]) -> None:
        """Queues what is to be done in the run's folder after all that was queued before; it gets the run's store."""
        with self._change():
            self.raise_trouble()
            self._later.append(work)

    def wait(self) -> None:
        """Returns when everything that was queued is in the bucket.

        Raises:
            BucketAwayError: a stop was asked for, and there was not enough time for the last checkpoint.
            StoppedError: there was not enough time for the last pictures.
        """
        with self._changed:
            while self._busy or self._later:
                self._wait_a_little()
            self.raise_trouble()

    def close(self, wait: bool) -> None:
        """Ends the thread; with `wait`, after what is queued is committed, for as long as a preemption would allow."""
        over = time.monotonic() + (self._stop.grace_seconds if wait else 0.0)

        def is_time_left() -> bool:
            self._stop()
            return time.monotonic() < over and self._stop.seconds_left_to_save() > 0

        with self._change():
            while (self._busy or self._later) and self._error is None and is_time_left():
                self._changed.wait(WAIT_SECONDS)
            self._closing.request("the end of its process")
        # A thread that waits for a bucket that keeps silent dies with the process.
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
                # In order, for the next attempt draws only the picture of the very checkpoint that it begins with. But
                # whoever is to stop may have no time for both.
                if self._later and not (self._queued and self._stop.reason):
                    self._run.retry(self._held.lease.confirm)
                    self._later[0](self._run)
                    with self._change():
                        del self._later[0]
                else:
                    self._retire(self._commit())
        except BaseException as error:
            with self._change():
                self._error = error
                self._committing = self._reading_host = False

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._queued or self._later or self._closing.reason):
                self._changed.wait()
            return not self._closing.reason

    def _commit(self) -> CheckpointRef:
        """Commits what is queued: its files, its small objects, a last look at the lease, the manifest."""
        with self._change():
            assert self._queued is not None
            (manifest, objects), self._queued = self._queued, None
            self._committing = self._reading_host = True
        uploaded = self._upload_files(manifest.ref)
        files = [file for file in uploaded if located(file.key).kind in OF_CHECKPOINT]
        self._snapshots += tuple(file for file in uploaded if file not in files)
        described = {f"{manifest.ref.key}/{name}": data for name, data in self._descriptions.items()}
        files += [NamedObject.of(key, data) for key, data in described.items()]
        manifest = manifest.model_copy(update={"files": tuple(files), "snapshots": self._snapshots})
        for key, data in (objects | described).items():
            self._run.create(key, data)

        def commit() -> None:
            # Both again after an outage: the run may have been taken over meanwhile.
            self._held.lease.confirm()
            commit_manifest(self._run, manifest)

        self._run.retry(commit)
        with self._change():
            self._committing = False
        return manifest.ref

    def _named_for_diffusers(self) -> dict[str, str]:
        """What the files of the weights that draw are called below a checkpoint; describes several."""
        parts = [part for part in self._parts if self._drawn and part.rpartition("-")[0] == self._drawn]
        names = dict(zip(parts, pipeline.weights_names(len(parts)), strict=True))
        if len(parts) > 1:
            where = {tensor: name.rpartition("/")[2] for part, name in names.items() for tensor in self._parts[part]}
            size_bytes = sum(tensor.nbytes for tensor in self._copy.host[self._drawn].values())
            self._descriptions[pipeline.INDEX] = pipeline.weights_index(size_bytes, where)
        return names

    def _files_of(self, ref: CheckpointRef) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What belongs to a checkpoint, by key: the host copy, and a snapshot of its averages if one is due."""
        averages = self.retention.config.ema.names if self.retention.takes_snapshot(ref.images_seen) else ()
        for name, tensors in self._parts.items():
            yield f"{ref.key}/{self._names.get(name, name)}", tensors
            if name.rpartition("-")[0] in averages:
                yield f"{ObjectKind.SNAPSHOT.folder}/{ref}/{name}", {n: t.half() for n, t in tensors.items()}

    def _upload_files(self, ref: CheckpointRef) -> tuple[NamedObject, ...]:
        """Uploads the host copy, which may be overwritten as soon as all of it is in local files."""
        with scratch_folder("save") as folder, ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:

            def upload(path: Path, key: str) -> None:
                # Whoever slept may have lost the run, and would upload a whole checkpoint that nobody is to read.
                self._run.retry(self._held.lease.confirm)
                self._run.upload(path, key)
                path.unlink()

            records, uploads = [], []
            for number, (key, tensors) in enumerate(self._files_of(ref)):
                path = folder / f"{number}.safetensors"
                records.append(write_part(path, key, tensors))
                uploads.append(pool.submit(upload, path, key))
            with self._change():
                self._reading_host = False
            for one in uploads:
                one.result()
            return tuple(records)

    def _retire(self, newest: CheckpointRef) -> None:
        """Deletes what may go by now. An error costs space, not work: the next commit tries again."""
        run, lease = self._run, self._held.lease
        try:
            # One of a higher fence, which may be rotten for all anybody knows, pushes none out.
            refs = [ref for ref in list_checkpoints(run) if ref <= newest and ref not in self._aside]
            for ref in self.retention.retire(refs):
                lease.confirm()
                # Right before the deletion: a reader that comes later finds the manifest gone, and chooses again.
                if ref not in being_read(run):
                    delete_checkpoint(run, ref)
            if not self._is_swept:
                sweep(run, lease)
                self._is_swept = True
        except LostRunError:
            raise
        except JobError as error:
            self._note(f"old checkpoints of {run.uri} stay for now: {error}")

    def _measure(self) -> None:
        """Has saves made more often if one does not fit into the grace of a preemption."""
        size_bytes = sum(tensor.nbytes for named in self._copy.host.values() for tensor in named.values())
        data = os.urandom(min(PROBE_BYTES, size_bytes))
        key, began = ObjectKind.PROBE.key(unique=uuid.uuid4().hex), time.monotonic()
        try:
            self._run.create(key, data)
            seconds = (time.monotonic() - began) * size_bytes / len(data)
            self._run.delete(key)
        except JobError as error:
            self._note(f"could not measure how long a save takes: {error}")
            return
        grace_seconds, configured = self._stop.grace_seconds, self._every_minutes
        if seconds + MARGIN_SECONDS > grace_seconds:
            often = max(SHORTEST_CADENCE_MINUTES, seconds * SAVES_PER_CADENCE / 60)
            self._every_minutes = min(configured, often)
            self._note(
                f"a save takes about {seconds:.1f} s, which does not fit into the {grace_seconds:g} s between a "
                f"preemption notice and the end: saving every {self._every_minutes:.1f} instead of {configured:g} "
                "minutes"
            )


def write_part(path: Path, key: str, tensors: dict[str, Tensor]) -> NamedObject:
    """Writes tensors to a local file; what a record says of it once it is an object at `key`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with os_errors(path):
        try:
            save_file(tensors, path, {"format": "pt"})
        except SafetensorError as error:
            # It tells a full disk in words alone, which would end as a crash instead of with the disk's own code.
            if (match := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from None
    with path.open("rb") as file:
        return NamedObject(key=key, size_bytes=path.stat().st_size, sha256=sha256_of(file))

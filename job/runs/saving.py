"""Saving without stopping: training waits for a copy into host buffers, a thread does the rest.

copy to host → (training goes on) → safetensors files on the local disk → objects under a fresh prefix → manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.runs.checkpoints import FileRecord, Manifest, commit_manifest
from job.stop import NEVER, Stop
from job.store import Store
from job.store.files import os_errors
from job.store.scratch import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 128 * 1024 * 1024
"""Parts of this size keep all connections busy, and a retry cheap."""
UPLOADS = 4
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Part:
    """One file: which tensors of which group it holds."""

    name: str
    group: str
    tensors: tuple[str, ...]


def plan_parts(tensors: dict[str, dict[str, Tensor]], part_bytes: int = PART_BYTES) -> list[Part]:
    """Cuts each group into files of about `part_bytes`; a larger tensor has a file of its own."""
    parts: list[Part] = []
    for group, named in tensors.items():
        names: list[str] = []
        size = number = 0
        for name, tensor in named.items():
            if names and size + tensor.nbytes > part_bytes:
                parts.append(Part(f"{group}-{number:02d}.safetensors", group, tuple(names)))
                names, size, number = [], 0, number + 1
            names.append(name)
            size += tensor.nbytes
        parts.append(Part(f"{group}-{number:02d}.safetensors", group, tuple(names)))
    return parts


class HostCopy:
    """Host buffers for a set of live tensors: contiguous, allocated and touched once, pinned for CUDA."""

    def __init__(self, live: dict[str, dict[str, Tensor]]) -> None:
        self.live = live
        self.host: dict[str, dict[str, Tensor]] = {}
        for group, named in live.items():
            cuda = any(tensor.is_cuda for tensor in named.values())
            flat = torch.empty(sum(t.numel() for t in named.values()), dtype=torch.float32, pin_memory=cuda)
            flat.fill_(0)  # touches every page: a first save into fresh pages takes ten times as long
            views = flat.split([tensor.numel() for tensor in named.values()])
            self.host[group] = {
                name: view.view(tensor.shape) for (name, tensor), view in zip(named.items(), views, strict=True)
            }

    def copy(self) -> None:
        """Copies the live values; when it returns, training may go on."""
        cuda = False
        for group, named in self.live.items():
            torch._foreach_copy_(list(self.host[group].values()), list(named.values()), non_blocking=True)
            cuda |= any(tensor.is_cuda for tensor in named.values())
        if cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way: the manifest without its files, and small objects that go up before it."""

    manifest: Manifest
    objects: dict[str, bytes]
    irreplaceable: bool = False
    """Whether a newer checkpoint must not stand in for it: an epoch that is kept for good."""
    urgent: bool = False
    """Whether it goes before pictures that were queued earlier: there may be no time for both."""


class CheckpointWriter:
    """Commits checkpoints in a thread of its own, in order. Training waits for a copy into host buffers, no longer.

    While the bucket is away the thread tries again, and training goes on: of the checkpoints that fall due meanwhile
    the newest is kept, with the small objects of those it stands in for, and every picture. An error that ends the
    thread, such as a bucket that stays away beyond the limit, is raised by the next call: a run that cannot be saved
    must not go on.
    """

    def __init__(
        self,
        run: Store,
        live: dict[str, dict[str, Tensor]],
        *,
        confirm: Callable[[], None] = lambda: None,
        after_commit: Callable[[Manifest], None] = lambda _: None,
    ) -> None:
        """Allocates the host buffers and starts the thread.

        Args:
            run: the run's folder; its patience with a bucket that is away is the writer's.
            live: the tensors to save, by group.
            confirm: called before every commit; raises if another attempt holds the run.
            after_commit: retires older checkpoints; nobody waits for it but `close`.
        """
        self._closing = Stop()
        self._run = run.within(run.retry.limit_seconds, self._closing)
        self._confirm, self._after_commit = confirm, after_commit
        self._copy = HostCopy(live)
        self._parts = plan_parts(self._copy.host)
        self._changed = threading.Condition()
        self._queued: Save | None = None
        self._pictures: dict[str, bytes] = {}
        self._reading_host = False
        self._committing = False
        self._folder: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint, headers aside."""
        return sum(tensor.nbytes for named in self._copy.host.values() for tensor in named.values())

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still on its way to the bucket."""
        return self._committing or self._queued is not None

    def put(self, key: str, data: bytes) -> None:
        """Queues a picture, which is written over whatever is there; raises the thread's error if there was one."""
        with self._changed:
            self.raise_error()
            self._pictures[key] = data
            self._changed.notify_all()

    def save(self, save: Save, stop: Stop = NEVER) -> bool:
        """Takes a copy of the live tensors and queues it; whether it could.

        Blocks for the copy; for a local write that is under way; and, with the bucket away, for a queued checkpoint
        that is irreplaceable. `stop` says how long it may; asking it keeps waiting from being taken for hanging.
        """
        with self._changed:
            while self._reading_host or (self._queued is not None and self._queued.irreplaceable):
                self.raise_error()
                if _is_over(stop, float("inf")):
                    return False
                self._changed.wait(timeout=POLL_SECONDS)
            self.raise_error()
            if self._queued is not None:
                save = replace(save, objects=self._queued.objects | save.objects)
            self._copy.copy()
            self._queued = save
            self._changed.notify_all()
            return True

    def wait(self, stop: Stop = NEVER, at_most_seconds: float = float("inf")) -> bool:
        """Waits until everything queued is in the bucket, or no time is left; whether it is.

        Raises the thread's error if there was one.
        """
        over = time.monotonic() + at_most_seconds
        with self._changed:
            while (self.busy or self._pictures) and self._error is None and not _is_over(stop, over):
                self._changed.wait(timeout=POLL_SECONDS)
            self.raise_error()
            return not (self.busy or self._pictures)

    def close(self, stop: Stop = NEVER, at_most_seconds: float = float("inf")) -> None:
        """Ends the thread, with what is queued committed if there is time for that, and what is under way ended."""
        over = time.monotonic() + at_most_seconds
        try:
            self.wait(stop, at_most_seconds)
        finally:
            with self._changed:
                self._closing.request("the end of the run")
                self._changed.notify_all()
            while self._thread.is_alive() and not _is_over(stop, over):
                self._thread.join(POLL_SECONDS)
            if self._thread.is_alive() and (folder := self._folder) is not None:
                # The thread waits for a bucket that keeps silent, and will die with the process.
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def failed(self) -> bool:
        """Whether an error ended the thread; `raise_error` raises it."""
        return self._error is not None

    def raise_error(self) -> None:
        """Raises what ended the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while self._has_work():
                # In order, for the next attempt draws only the picture of the very checkpoint that it begins with.
                if (save := self._next()) is not None:
                    manifest = self._commit(save)
                    self._committed()
                    self._after_commit(manifest)
                else:
                    self._put_picture()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._committing = self._reading_host = False
                self._changed.notify_all()

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._queued or self._pictures or self._closing()):
                self._changed.wait()
            return not self._closing()

    def _next(self) -> Save | None:
        with self._changed:
            if self._pictures and not (self._queued and self._queued.urgent):
                return None
            save, self._queued = self._queued, None
            self._committing = self._reading_host = save is not None
            return save

    def _committed(self) -> None:
        with self._changed:
            self._committing = False
            self._changed.notify_all()

    def _put_picture(self) -> None:
        key, data = next(iter(self._pictures.items()))
        self._run.put(key, data)
        with self._changed:
            # Another of the same name may have come meanwhile.
            if self._pictures[key] is data:
                del self._pictures[key]
            self._changed.notify_all()

    def _commit(self, save: Save) -> Manifest:
        with scratch_folder("save") as folder:
            self._folder = folder
            try:
                return self._upload_all(save, folder)
            finally:
                self._folder = None

    def _upload_all(self, save: Save, folder: Path) -> Manifest:
        # Threads that no exit waits for: one may be waiting for a bucket that keeps silent.
        with ThreadPool(UPLOADS) as pool:
            records, uploads = [], []
            for part in self._parts:
                records.append(record := self._write(part, folder))
                key = f"{save.manifest.ref.key}/{record.name}"
                uploads.append(pool.apply_async(self._upload, (folder / record.name, key)))
            with self._changed:
                self._reading_host = False
                self._changed.notify_all()
            for upload in uploads:
                upload.get()
        for key, data in save.objects.items():
            self._run.create(key, data)
        manifest = save.manifest.model_copy(update={"files": tuple(records)})

        def commit() -> None:
            # Both again after an outage: the run may have been taken over meanwhile.
            self._confirm()
            commit_manifest(self._run, manifest)

        self._run.retry(commit)
        return manifest

    def _write(self, part: Part, folder: Path) -> FileRecord:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = folder / part.name
        tensors = {name: self._copy.host[part.group][name] for name in part.tensors}
        with os_errors(path):
            try:
                save_file(tensors, path)
            except SafetensorError as error:
                # It tells a full disk in words alone, which would end as a crash instead of with the disk's own code.
                if (match := re.search(r"os error (\d+)", str(error))) is None:
                    raise
                raise OSError(int(match[1]), os.strerror(int(match[1]))) from None
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(name=part.name, group=part.group, bytes=path.stat().st_size, sha256=sha256)

    def _upload(self, path: Path, key: str) -> None:
        self._run.upload(path, key)
        path.unlink()


def _is_over(stop: Stop, over: float) -> bool:
    return time.monotonic() >= over or (stop() and stop.seconds_left_to_save() <= 0)

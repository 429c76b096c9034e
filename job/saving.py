"""Saving without stopping: training waits for a copy into host buffers, a thread does the rest.

copy to host → (training goes on) → safetensors files on the local disk → objects under a fresh prefix → manifest.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.checkpoints import FileRecord, Manifest, commit_manifest
from job.store import Store
from job.store.files import os_errors

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 128 * 1024 * 1024
"""Parts of this size keep all connections busy, and a retry cheap."""
UPLOADS = 4


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


class CheckpointWriter:
    """Commits checkpoints in a thread of its own, in order, at most one ahead of the bucket.

    An error in the thread is raised by the next `save` or `close`: a run whose saves fail must not go on unnoticed.
    """

    def __init__(
        self, run: Store, live: dict[str, dict[str, Tensor]], after_commit: Callable[[Manifest], None]
    ) -> None:
        self._run = run
        self._copy = HostCopy(live)
        self._parts = plan_parts(self._copy.host)
        self._after_commit = after_commit
        self._host_free = threading.Event()
        self._host_free.set()
        self._queue: queue.Queue[Save | None] = queue.Queue(maxsize=1)
        self._pending = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still on its way to the bucket."""
        return self._pending > 0

    def save(self, save: Save) -> None:
        """Takes a copy of the live tensors and queues it; blocks for the copy, and for an unfinished local write."""
        while not self._host_free.wait(timeout=0.1):
            self._raise_error()
        self._raise_error()
        self._host_free.clear()
        self._copy.copy()
        self._pending += 1
        self._queue.put(save)

    def wait(self) -> None:
        """Returns when everything queued is committed; raises the thread's error if there was one."""
        self._queue.join()
        self._raise_error()

    def close(self) -> None:
        """Ends the thread; what is queued is committed first."""
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (save := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._commit(save)
            except BaseException as error:
                self._error = error
            finally:
                self._pending -= 1
                self._queue.task_done()
        self._queue.task_done()

    def _commit(self, save: Save) -> None:
        folder = Path(tempfile.mkdtemp(prefix="ddpm-save-"))
        try:
            with ThreadPoolExecutor(UPLOADS) as pool:
                records = []
                uploads = []
                for part in self._parts:
                    record = self._write(part, folder)
                    records.append(record)
                    uploads.append(
                        pool.submit(self._upload, folder / record.name, f"{save.manifest.ref.key}/{record.name}")
                    )
                self._host_free.set()
                for upload in uploads:
                    upload.result()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for key, data in save.objects.items():
            self._run.create(key, data)
        manifest = save.manifest.model_copy(update={"files": tuple(records)}).sealed()
        commit_manifest(self._run, manifest)
        self._after_commit(manifest)

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

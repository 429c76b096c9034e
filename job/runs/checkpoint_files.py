"""The files of a checkpoint: live tensors in host buffers, cut into parts, written to the local disk and uploaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from job.processes.lease import Lease
from job.runs import pipeline
from job.runs.checkpoints import sha256_of
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.retention import Retention
from job.sealed import NamedObject
from job.store import Store
from job.store.files import os_errors, scratch_folder

Tensors = dict[str, dict[str, Tensor]]
"""By group and name."""

PART_BYTES = 128 * 1024 * 1024
"""Parts of this size keep all connections busy, and a retry cheap."""
PARALLEL_UPLOADS = 4


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


class CheckpointFiles:
    """What the checkpoints of a run hold, by file: a host copy of the live tensors, and what describes it to diffusers.

    Attributes:
        drawn: the group whose weights lie where diffusers reads them.
        size_bytes: of a host copy.
    """

    def __init__(self, live: Tensors, retention: Retention) -> None:
        self._retention, self._copy = retention, HostCopy(live)
        self._parts = plan_parts(self._copy.host)
        self._pipeline = pipeline.files_for_diffusers(retention.config, self._parts)
        self.drawn = self._pipeline.drawn
        self.size_bytes = sum(tensor.nbytes for named in self._copy.host.values() for tensor in named.values())

    def copy(self) -> None:
        """See `HostCopy.copy`."""
        self._copy.copy()

    def descriptions(self, ref: CheckpointRef) -> dict[str, bytes]:
        """The small objects of a checkpoint that describe its weights to diffusers, by key."""
        return {f"{ref.key}/{name}": data for name, data in self._pipeline.descriptions.items()}

    def tensors_of(self, ref: CheckpointRef) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What belongs to a checkpoint, by key: the host copy, and a snapshot of its averages if one is due."""
        takes_snapshot = self._retention.takes_snapshot(ref.images_seen)
        averages = self._retention.config.ema.names if takes_snapshot else ()
        for name, tensors in self._parts.items():
            yield f"{ref.key}/{self._pipeline.names.get(name, name)}", tensors
            if name.rpartition("-")[0] in averages:
                yield f"{ObjectKind.SNAPSHOT.folder}/{ref}/{name}", {n: t.half() for n, t in tensors.items()}

    def upload(
        self, run: Store, lease: Lease, ref: CheckpointRef, when_written: Callable[[], None]
    ) -> tuple[NamedObject, ...]:
        """Uploads the host copy, which may be overwritten `when_written`: as soon as all of it is in local files."""
        with scratch_folder("save") as folder, ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:

            def upload(path: Path, key: str) -> None:
                # Whoever slept may have lost the run, and would upload a whole checkpoint that nobody is to read.
                run.retry(lease.confirm)
                run.upload(path, key)
                path.unlink()

            records, uploads = [], []
            for number, (key, tensors) in enumerate(self.tensors_of(ref)):
                path = folder / f"{number}.safetensors"
                records.append(write_part(path, key, tensors))
                uploads.append(pool.submit(upload, path, key))
            when_written()
            for one in uploads:
                one.result()
            return tuple(records)


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

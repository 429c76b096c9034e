"""The files of a checkpoint: live tensors in host buffers, cut into parts, written to the local disk and uploaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.processes.lease import Lease
from job.runs import pipeline
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.retention import Retention
from job.sealed import NamedObject
from job.store import Store
from job.store.files import os_errors, scratch_folder

Tensors = dict[str, dict[str, Tensor]]
"""By group and name."""

PART_BYTES = 320 * 1024 * 1024
"""Ho et al.'s network for CIFAR-10 needs one part for each group; larger ones still keep all connections busy."""
PARALLEL_UPLOADS = 4
_DTYPES = {torch.float32: "F32", torch.float16: "F16"}
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
        drawn: the group whose weights lie where diffusers reads them.
        descriptions: the objects beside them, by key below the checkpoint.
        size_bytes: of a host copy.
    """

    def __init__(self, live: Tensors, retention: Retention, classes: tuple[str, ...]) -> None:
        # In the order of the files, whose tensors then lie side by side.
        self._live = {group: dict(sorted(named.items())) for group, named in live.items()}
        self._retention = retention
        self._host: Tensors = {}
        device = next(tensor.device for named in live.values() for tensor in named.values())
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for group, named in self._live.items():
            sizes = [tensor.numel() for tensor in named.values()]
            flat = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=device.type == "cuda")
            flat.fill_(0)  # touches every page: a first save into fresh pages takes ten times as long
            views = zip(named.items(), flat.split(sizes), strict=True)
            self._host[group] = {name: view.view(tensor.shape) for (name, tensor), view in views}
        self.size_bytes = sum(tensor.nbytes for named in self._host.values() for tensor in named.values())
        self._parts = plan_parts(self._host)
        self._pipeline = pipeline.files_for_diffusers(retention.config, classes, self._parts)
        self.drawn, self.descriptions = self._pipeline.drawn, self._pipeline.descriptions

    def copy(self) -> None:
        """Copies the live values into the host buffers: on a GPU beside the next step, up to `before_change`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for group, named in self._live.items():
                torch._foreach_copy_(list(self._host[group].values()), list(named.values()), non_blocking=True)

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
            yield f"{ref.key}/{self._pipeline.names.get(name, name)}", tensors
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
    """Writes tensors of one type on the host to a file, byte for byte as safetensors does, and hashes it on the way.

    The library's own function takes several times as long for many small tensors, and keeps the interpreter from the
    threads that train meanwhile.

    Returns:
        The entry of a record that names the file as the object at `key`.
    """
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    in_order = dict(sorted(tensors.items()))
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

"""Breaks protocols on purpose inside a child process: a campaign that does not report each break proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any


def apply(name: str, module: ModuleType, trace: Any) -> None:
    """Breaks `module`, just imported, if the sabotage `name` concerns it; `trace` knows this attempt's fence."""
    if (broken := _BROKEN.get((name, module.__name__))) is not None:
        broken(module, trace)


def _manifest_first(module: Any, trace: Any) -> None:
    from job.runs.writer import write_part
    from job.store.files import scratch_folder

    upload, commit_manifest = module.CheckpointFiles.upload, module.commit_manifest
    late: list[Callable[[], Any]] = []

    def upload_later(files: Any, run: Any, lease: Any, ref: Any, when_written: Any) -> Any:
        late.append(lambda: upload(files, run, lease, ref, when_written))
        with scratch_folder("sabotage") as folder:
            return tuple(write_part(folder / "part", key, tensors) for key, tensors in files.tensors_of(ref))

    def commit_and_upload(run: Any, manifest: Any) -> None:
        commit_manifest(run, manifest)
        late.pop()()

    module.CheckpointFiles.upload, module.commit_manifest = upload_later, commit_and_upload


def _fence_ignored(lease: Any, trace: Any) -> None:
    lease.Lease.confirm = lambda this: None
    lease.Lease.check_lost = lambda this: None
    lease.Lease.lost = property(lambda this: "", lambda this, lost: None)


def _position_off_by_one(session: Any, trace: Any) -> None:
    stream_batches = session.stream_batches

    def shifted(*args: Any, first_image: int, **kwargs: Any) -> Any:
        return stream_batches(*args, first_image=first_image + (first_image > 0), **kwargs)

    session.stream_batches = shifted


def _order_drawn_anew(session: Any, trace: Any) -> None:
    order_of = session.order_of

    def drawn_anew(index: Any, config: Any) -> Any:
        order = order_of(index, config)
        return replace(order, seed=order.seed + trace.fence - 1)

    session.order_of = drawn_anew


def _image_hash_unchecked(cache: Any, trace: Any) -> None:
    def read_image(this: Any, shard: int, row: int, record: Any, file: Any) -> Any:
        file.seek(record[0])
        index = this.index
        return cache.decode(file.read(record[1]), index.channels, index.size)

    cache.ImageCache.read_image = read_image


_BROKEN: dict[tuple[str, str], Callable[[Any, Any], None]] = {
    ("manifest-first", "job.runs.writer"): _manifest_first,
    ("fence-ignored", "job.coordination.lease"): _fence_ignored,
    ("position-off-by-one", "job.training.session"): _position_off_by_one,
    ("order-drawn-anew", "job.training.session"): _order_drawn_anew,
    ("image-hash-unchecked", "job.data.reading.cache"): _image_hash_unchecked,
}

"""The metrics of a run that saves often: few objects, and every row, whatever is kept and whoever goes on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import BinaryIO

import pytest
import torch

from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest, newest_good
from job.runs.layout import CheckpointRef, ObjectKind, located
from job.runs.metric_rows import read_rows
from job.runs.writer import CheckpointWriter
from job.stop import NEVER, Stop
from job.store import Retry
from job.store.base import Entry, ObjectMissingError, Store
from tests.job.runs.leased import DATASET_IMAGES, leased
from tests.job.runs.test_writer import scalars

pytestmark = pytest.mark.usefixtures("notes")

BATCH_IMAGES = 24
MANIFEST_BYTES, RESUME_REQUESTS, OBJECTS = 30_000, 20, 80


class Memory(Store):
    """A bucket in memory, for more saves than a disk takes in the time of a test."""

    def __init__(self) -> None:
        super().__init__("memory://bucket", Retry(1.0))
        self.objects, self.requests = dict[str, bytes](), list[str]()

    def _of(self, key: str) -> bytes:
        self.requests.append(key)
        with suppress(KeyError):
            return self.objects[self._prefix + key]
        raise ObjectMissingError(f"no object at {key}")

    def _fetch(self, key: str, consume: Callable[[bytes], object]) -> str:
        consume(data := self._of(key))
        return hashlib.sha256(data).hexdigest()

    def _open(self, key: str) -> BinaryIO:
        return io.BytesIO(self._of(key))

    def _write(self, key: str, content: BinaryIO, over: str | None) -> str | None:
        data = content.read()
        before = self.objects.get(self._prefix + key)
        if over is not None and over != ("" if before is None else hashlib.sha256(before).hexdigest()):
            return None
        self.objects[self._prefix + key] = data
        return hashlib.sha256(data).hexdigest()

    def _list(self, prefix: str) -> Sequence[Entry]:
        self.requests.append(prefix)
        whole = self._prefix + prefix
        found = [(key, data) for key, data in self.objects.items() if key.startswith(whole)]
        return [Entry(key.removeprefix(self._prefix), len(data)) for key, data in found]

    def _folders(self, prefix: str) -> Sequence[str]:
        return [*{key.partition("/")[0] for key in self.objects}]

    def _delete(self, key: str) -> None:
        self._of(key)
        del self.objects[self._prefix + key]


def writer_from(run: Store, before: Manifest | None, fence: int, stop: Stop = NEVER, **rules: int) -> CheckpointWriter:
    rules = {"checkpoint__keep_last": 1} | rules
    tensors = {"model": {"weight": torch.zeros(4)}}
    return CheckpointWriter(leased(run, fence, **rules), tensors, before=before, stop=stop)


def save(writer: CheckpointWriter, numbers: range) -> None:
    """Saves after each of these batches, with a row of its number."""
    for number in numbers:
        images_seen = BATCH_IMAGES * number
        writer.rows.append({"images_seen": images_seen, "loss": number / 7, "time": float(number)})
        writer.save(images_seen, [])
        writer.wait()


def shown(run: Store, ref: CheckpointRef) -> list[tuple[int, str, float]]:
    """What TensorBoard shows of a checkpoint's metrics."""
    metrics = load_manifest(run, ref).metrics
    events = [named for named in metrics if located(named.key).kind is ObjectKind.EVENTS]
    return scalars(b"".join(named.read(run) for named in events))


def numbers_of(run: Store, ref: CheckpointRef) -> list[int]:
    """The batches of which a checkpoint has rows, which are the same in its events."""
    metrics = load_manifest(run, ref).metrics
    rows = [row["images_seen"] // BATCH_IMAGES for row in read_rows(run, metrics, pytest.fail)]
    assert [step // BATCH_IMAGES for step, _, _ in shown(run, ref)] == rows
    return rows


@pytest.mark.parametrize("saves", [130, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_saves_leave_few_objects_and_every_row(saves: int) -> None:
    run = Memory()
    most = {"objects": 0, "manifest": 0}
    create = run._write

    def measured(key: str, content: BinaryIO, over: str | None) -> str | None:
        version = create(key, content, over)
        if key.endswith("MANIFEST.json"):
            history = [key for key in run.objects if key.startswith(("metrics/", "tensorboard/"))]
            most.update(objects=max(most["objects"], len(history)), manifest=len(run.objects[key]))
        return version

    run._write = measured  # type: ignore[method-assign]
    every_epochs = saves // 6
    writer = writer_from(run, None, 1, checkpoint__keep_every_epochs=every_epochs)
    save(writer, range(1, saves + 1))
    writer.close(wait=True)
    kept = list_checkpoints(run)
    ends = [number for number in range(1, saves) if not number * BATCH_IMAGES % (DATASET_IMAGES * every_epochs)]
    assert {ref.images_seen // BATCH_IMAGES for ref in kept} == {*ends, saves - saves % 2, saves}
    for ref in kept:
        assert numbers_of(run, ref) == [*range(1, ref.images_seen // BATCH_IMAGES + 1)]
    assert most["objects"] <= OBJECTS
    assert most["manifest"] < MANIFEST_BYTES

    run.requests.clear()
    rows = read_rows(run, newest_good(run).metrics, pytest.fail)
    assert (len(rows), len(run.requests) <= RESUME_REQUESTS) == (saves, True)

    # The newest is lost, and an attempt goes on from the one before.
    run.delete(kept[-1].manifest_key)
    before = load_manifest(run, kept[-2])
    resumed_at = before.images_seen // BATCH_IMAGES
    writer = writer_from(run, before, 2, checkpoint__keep_every_epochs=every_epochs)
    save(writer, range(resumed_at + 1, resumed_at + 4))
    writer.close(wait=True)
    for ref in list_checkpoints(run):
        assert numbers_of(run, ref) == [*range(1, ref.images_seen // BATCH_IMAGES + 1)]
    named = {key for ref in list_checkpoints(run) for key in load_manifest(run, ref).objects}
    assert {key for key in run.objects if key.startswith(("metrics/", "tensorboard/"))} <= named


@pytest.mark.parametrize("is_hurried", [False, True], ids=["one segment", "two segments"])
def test_a_later_value_of_a_moment_hides_no_earlier_one(is_hurried: bool) -> None:
    run, notice, before = Memory(), Stop(), None
    for fence, name in enumerate(("loss", "val_loss"), 1):
        writer = writer_from(run, before, fence, notice)
        writer.rows.append({"images_seen": BATCH_IMAGES, name: 0.5, "time": 1.0})
        if is_hurried and before:
            notice.request("a notice")
        writer.save(BATCH_IMAGES, [])
        writer.close(wait=True)
        before = load_manifest(run, max(list_checkpoints(run)))
    assert before is not None
    assert len(before.segments) == 1 + is_hurried
    assert shown(run, before.ref) == [(BATCH_IMAGES, "loss", 0.5), (BATCH_IMAGES, "val_loss", 0.5)]

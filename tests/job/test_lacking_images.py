"""Training whose images do not come: what was learnt until then is saved, and nobody waits for the shard."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.coordination.lease import load_lease
from job.exits import BucketAwayError, StoppedError
from job.plan import Plan, plan_run
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints
from job.store import Store
from job.training import session
from job.training.session import run_training
from tests.job.command_line import NETWORK
from tests.job.leases import eventually
from tests.job.stops import StopWhen

EPOCH_IMAGES = 312


class Lacking:
    """The run's cache, whose shards stop coming after an epoch, until somebody lets them come or fail."""

    def __init__(self, cache) -> None:
        self._cache, self._batches = cache, 0
        self.index, self.prefetch, self.labels = cache.index, cache.prefetch, cache.labels

    def read(self, indices, out):
        self._batches += 1
        if self._batches > EPOCH_IMAGES // 24:
            lacking.set()
            going_on.wait(60)
            raise BucketAwayError("the shard's bucket is away")
        return self._cache.read(indices, out)


lacking, going_on = threading.Event(), threading.Event()


@pytest.fixture
def plan(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    opened = session.open_cache
    monkeypatch.setattr(session, "open_cache", lambda *words: Lacking(opened(*words)))
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    lacking.clear()
    going_on.clear()
    sets = [f"{key}={value}" for key, value in NETWORK.items()] + ["checkpoint.every_epochs=1", "sample.every_epochs=0"]
    yield plan_run(TrainRequest("tiles", bucket=str(bucket), run="walk", epochs=3, sets=tuple(sets)).check())
    going_on.set()


def saved(run: Store) -> list[int]:
    return [ref.images_seen for ref in list_checkpoints(run)]


def test_a_checkpoint_comes_before_the_wait(plan):
    seen = []

    def watch():
        lacking.wait(60)
        eventually(lambda: saved(plan.run))
        seen.extend(saved(plan.run))
        going_on.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(BucketAwayError, match="the shard's bucket is away"):
        run_training(plan.request)
    watcher.join()
    assert seen == [EPOCH_IMAGES]
    assert saved(plan.run) == [EPOCH_IMAGES]
    assert load_lease(plan.run).released


def test_a_stop_waits_for_no_images(plan):
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    with pytest.raises(StoppedError, match="everything is saved"):
        run_training(plan.request, StopWhen(lambda: lacking.is_set() and bool(saved(plan.run))))
    assert saved(plan.run) == [EPOCH_IMAGES]
    # The reader is waited for, but not for ever.
    assert readers()
    going_on.set()
    eventually(lambda: not readers())

"""Deleting a run: nobody's who trains or reads it, never half without saying so, and fences go on growing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from job.data.pack import PackRequest, pack
from job.exits import Exit, StoppedError
from job.runs import deletion
from job.runs.checkpoints import CheckpointRef, list_checkpoints
from job.runs.lease import LEASE, Lease, load_lease
from job.runs.retention import reading
from job.stop import NEVER
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.stops import stop_after

WORDS = ("--dataset", "landscape-sample", "--run", "walk", "--epochs", 1, *settings())


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    store = open_store(str(tmp_path / "bucket"))
    pack(
        store,
        PackRequest(str(resources.files("job") / "datasets" / "landscape-sample.zip"), "landscape-sample", size=16),
    )
    succeeded(ddpm_here("train", *WORDS, "--bucket", store.uri))
    return tmp_path / "bucket"


@pytest.fixture
def run(bucket: Path) -> Store:
    return open_store(str(bucket)).sub("runs/walk")


def delete(bucket: Path, *words: object):
    return ddpm_here("runs", "delete", "walk", "--bucket", bucket, *words)


def keys(run: Store) -> list[str]:
    return [entry.key for entry in run.list()]


def test_only_who_is_certain_deletes_and_the_same_name_begins_anew_with_a_higher_fence(bucket, run):
    before = keys(run)
    assert f"{len(before) - 1:,} objects" in refused(delete(bucket), Exit.BAD_REQUEST)
    assert keys(run) == before
    assert f"deleted {run.uri}: {len(before) - 1:,} objects" in succeeded(delete(bucket, "--yes"))
    assert keys(run) == [LEASE]
    assert "walk" not in succeeded(ddpm_here("runs", "list", "--bucket", bucket))
    for verb in ("show", "verify", "delete"):
        assert "there is no run 'walk'" in refused(
            ddpm_here("runs", verb, "walk", "--bucket", bucket), Exit.MISSING_INPUT
        )
    # The first run would have refused this.
    succeeded(ddpm_here("train", *WORDS, "--set", "train.seed=5", "--bucket", bucket))
    assert {ref.fence for ref in list_checkpoints(run)} == {3}
    succeeded(ddpm_here("runs", "verify", "walk", "--bucket", bucket))


def test_nothing_goes_while_somebody_trains_or_samples(bucket, run):
    before = [key for key in keys(run) if key != LEASE]
    lease = Lease.take(run, 1, 0.0, NEVER, pytest.fail)
    try:
        assert "which is alive" in refused(delete(bucket, "--yes"), Exit.LOST_RUN)
    finally:
        lease.close()
    with reading(run, CheckpointRef(1, 312)):
        assert "somebody samples from" in refused(delete(bucket, "--yes"), Exit.LOST_RUN)
    assert [key for key in keys(run) if key != LEASE] == before
    assert load_lease(run).released


@pytest.mark.parametrize("removals", [1, 2, 5, -1])
def test_a_stopped_deletion_leaves_nothing_that_is_taken_for_whole(bucket, run, monkeypatch, removals):
    total = len(keys(run)) - 1
    # The first question is the lease's.
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="the same command goes on"):
        patch.setattr(deletion, "Stop", lambda: stop_after(1 + removals % total))
        deletion.delete_run(str(bucket), "walk", certain=True)
    assert len(keys(run)) == 1 + total - removals % total
    for words in (("runs", "show", "walk"), ("train", *WORDS), ("sample", "--run", "walk")):
        said = refused(ddpm_here(*words, "--bucket", bucket), Exit.BAD_DATA)
        assert "config.yaml is missing" in said
        assert "ddpm runs delete walk --yes" in said
    succeeded(ddpm_here("runs", "list", "--bucket", bucket))
    succeeded(delete(bucket, "--yes"))
    assert keys(run) == [LEASE]

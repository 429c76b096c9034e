"""Averages that are made after training: against those that were kept meanwhile, and what faults leave of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from job.exits import Exit
from job.runs import records
from job.runs.checkpoints import list_checkpoints, load_average, load_manifest, restore
from job.runs.layout import ObjectKind, places_in
from job.store import open_store
from job.store.files import scratch_folder
from job.store.local import LocalStore
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged
from tests.job.runs.leased import small_config, train

pytestmark = pytest.mark.slow
EPOCHS = 4
LEARNT = {"checkpoint__keep_last": "1", "train__learning_rate": "0.003", "train__warmup_images": "0"}
KEPT = {"ema-0.07": 5e-4, "ema-0.15": 1e-3}
"""What one run keeps and the other makes, and how near they are, as a share of the weights."""


@pytest.fixture(scope="module")
def folder(tiles, tmp_path_factory):
    """A bucket with runs `made` and `kept`, which differ in nothing but the averages that they keep."""
    folder = shutil.copytree(tiles, tmp_path_factory.mktemp("averages") / "bucket")
    succeeded(train(folder, "made", EPOCHS, ema__stds="0.05,0.10", **LEARNT))
    succeeded(train(folder, "kept", EPOCHS, ema__stds="0.07,0.15", ema__snapshot_epochs="0", **LEARNT))
    return folder


class Killed(BaseException):
    """As by a signal that nothing can catch."""


def run_in(folder, name):
    return open_store(str(folder)).sub(f"runs/{name}")


def make(folder, std, run="made"):
    return ddpm_here("ema", "--run", run, "--std", std, "--bucket", folder)


def tensors_of(run, ref, group):
    with scratch_folder("restored") as folder:
        paths = restore(run, ref, groups=(group,), folder=folder).files[group]
        return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def weights_of(run, ref, group):
    """All of a group, one after the other, in double precision."""
    tensors = tensors_of(run, ref, group)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_made_averages_equal_kept_ones(folder):
    made, kept = run_in(folder, "made"), run_in(folder, "kept")
    (ref,) = list_checkpoints(made)
    assert len(load_manifest(made, ref).snapshots) == 2 * EPOCHS
    # Keeping averages changes nothing about what is learnt.
    weights = weights_of(made, ref, "model")
    assert torch.equal(weights, weights_of(kept, ref, "model"))
    others = [weights, *(weights_of(made, ref, group) for group in ("ema", "ema-0.05", "ema-0.1"))]
    for group, bound in KEPT.items():
        out = succeeded(make(folder, float(group.removeprefix("ema-"))))
        assert f"averages/{group}.json  ({group} of epoch-0004, of {2 * EPOCHS} averages, " in out
        found, expected = (weights_of(run, ref, group) for run in (made, kept))
        assert (found - expected).norm() < bound * expected.norm(), group
        assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-6, group
        # And much nearer than all that there was before.
        assert (found - expected).norm() < 0.1 * min((other - expected).norm() for other in others), group
        # Twice is once.
        before = [*made.list(f"{ref.key}/averages")]
        assert succeeded(make(folder, float(group.removeprefix("ema-")))) == out
        assert [*made.list(f"{ref.key}/averages")] == before
    assert "is in the checkpoint itself" in succeeded(make(folder, 0.1))
    # Half a unit in the last of ten bits.
    last = max(place.checkpoint for place in places_in(made, ObjectKind.SNAPSHOT.folder).values())
    full = tensors_of(made, last, "ema-0.1")
    (snapshot,) = (file for file in load_manifest(made, ref).snapshots if f"{last}/ema-0.1-" in file.key)
    half = load_file(Path(made.uri, snapshot.key))
    for name, tensor in full.items():
        torch.testing.assert_close(half[name].float(), tensor, rtol=2**-11, atol=2**-25)
    assert verify_run(open_store(str(folder)), "made").problems == []


def test_pictures_are_drawn_from_it(folder):
    succeeded(make(folder, 0.2))
    words = ("sample", "--run", "made", "--seeds", "0-3", "--bucket", folder)
    out = succeeded(ddpm_here(*words, "--weights", "ema-0.20"))
    assert "samples/epoch-0004-ddim-4-weights-ema-0.2-seeds-0-3.png" in out
    line = refused(ddpm_here(*words, "--weights", "ema-0.19"), Exit.MISSING_INPUT)
    assert "has no weights ema-0.19 (it has ema, ema-0.05, ema-0.1): `ddpm ema --run made --std 0.19` makes" in line


def test_a_run_without_averages_is_refused(new_run, tmp_path):
    records.create_config(new_run, small_config())
    line = refused(make(tmp_path, 0.1, run="r"), Exit.BAD_REQUEST)
    assert "run 'r' has no averages to combine: set ema.stds and ema.snapshot_epochs to train" in line


def test_damaged_snapshots_are_left_out(folder):
    made = run_in(folder, "made")
    (ref,) = list_checkpoints(made)
    (first, *_) = [file.key for file in load_manifest(made, ref).snapshots if "ema-0.05" in file.key]
    with damaged(made, first, DAMAGES["bit in the middle"]):
        done = make(folder, 0.11)
    assert f"of {2 * EPOCHS - 1} averages" in succeeded(done)
    assert f"going on without the averages of 312 images: {made.uri_of(first)} is corrupt" in done.stderr
    with damaged(made, f"{ref.key}/ema-0.1-00.safetensors", DAMAGES["gone"]):
        assert "ema-0.1-00.safetensors is missing" in refused(make(folder, 0.12), Exit.BAD_DATA)


def test_one_of_two_makers_wins(folder, monkeypatch):
    made = run_in(folder, "made")
    (ref,) = list_checkpoints(made)
    create = LocalStore.create
    record_key = ObjectKind.AVERAGE.key(checkpoint=ref, group="ema-0.08")

    def beaten(store, key, data):
        if key == record_key:
            monkeypatch.setattr(LocalStore, "create", create)
            succeeded(make(folder, 0.08))
        return create(store, key, data)

    monkeypatch.setattr(LocalStore, "create", beaten)
    succeeded(make(folder, 0.08))
    files = load_average(made, ref, "ema-0.08").files
    there = [key for key, place in places_in(made, ref.key).items() if place.group == "ema-0.08"]
    assert sorted(there) == sorted([record_key, *(file.key for file in files)])

    def killed(store, key, data):
        if key.endswith("ema-0.09.json"):
            raise Killed
        return create(store, key, data)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LocalStore, "create", killed)
        make(folder, 0.09)
    (left,) = [key for key, place in places_in(made, ref.key).items() if place.group == "ema-0.09"]
    assert [*verify_run(open_store(str(folder)), "made").leftovers] == [left]
    out = succeeded(ddpm_here("runs", "prune", "made", "--bucket", folder))
    assert f"{left}  " in out and "left behind by `ddpm ema` that was stopped" in out
    assert sorted(there) == [key for key, place in places_in(made, ref.key).items() if place.group == "ema-0.08"]


def test_averages_go_with_their_checkpoint(folder):
    made = run_in(folder, "made")
    (ref,) = list_checkpoints(made)
    succeeded(make(folder, 0.2))
    succeeded(train(folder, "made", EPOCHS + 1, ema__stds="0.05,0.1", **LEARNT))
    (newest,) = list_checkpoints(made)
    assert not [*made.list(ref.key)]
    snapshots = load_manifest(made, newest).snapshots
    assert len({place.checkpoint.fence for place in places_in(made, "snapshots").values()}) == 2
    assert {file.key for file in snapshots} == {entry.key for entry in made.list("snapshots")}
    assert len(snapshots) == 2 * (EPOCHS + 1)

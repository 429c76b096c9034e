"""What the next attempt, and whoever samples or prunes, makes of a run whose objects are damaged, lost or another's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest

from job.exits import BadDataError, Exit
from job.plan import plan_run
from job.requests import SampleRequest, TrainRequest
from job.runs.checkpoints import LATEST, list_checkpoints, load_manifest
from job.runs.metrics import read_rows
from job.runs.restoring import newest_good
from job.runs.verification import verify_run
from job.sampling.plan import plan_sampling
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged, pairs, swapped
from tests.job.runs.whole_runs import GROUPS, content_hash, copy_objects, resumed, train


@pytest.mark.parametrize("name", [*DAMAGES, "swapped"])
def test_the_next_attempt_uses_the_newest_checkpoint_that_is_whole(run, keys, contents, name):
    refs, wrong = sorted(contents, reverse=True), {}
    segments = {ref: {segment.key for segment in load_manifest(run, ref).metric_segments} for ref in refs}
    rows_of = {ref: len(read_rows(run, load_manifest(run, ref).metric_segments)) for ref in refs}
    for case in pairs(keys) if name == "swapped" else [(key,) for key in keys]:
        with swapped(run, *case) if name == "swapped" else damaged(run, case[0], DAMAGES[name]):
            ref, named, content, rows = resumed(run)
        whole = [ref for ref in refs if not any(key.startswith(f"{ref.key}/") for key in case)]
        expected, lost = whole[0], segments[whole[0]] & {*case}
        if lost == segments[expected] - segments[whole[1]]:
            # What the one before lacks is what is damaged: it is learnt again.
            expected, lost = whole[1], set()
        harmed = expected != refs[0] or bool(lost) or (LATEST in case and name != "gone")
        good = (ref, content) == (expected, [contents[expected]]) and (rows < rows_of[expected]) == bool(lost)
        if not good or (harmed != any(key in named for key in case)):
            wrong[case] = (ref, named, rows)
    assert wrong == {}


def test_a_run_that_has_lost_all_manifests_does_not_begin_anew(run, keys):
    refs = list_checkpoints(run)
    whole = {ref: run.read(f"{ref.key}/MANIFEST.json").data for ref in refs}
    for ref in refs:
        run.delete(f"{ref.key}/MANIFEST.json")
    try:
        missing = rf"{re.escape(run.uri_of(refs[-1].key))}/MANIFEST\.json is missing, though .*/LATEST names it"
        with pytest.raises(BadDataError, match=missing), newest_good(run, GROUPS, lambda _: None):
            pass
        request = SampleRequest("r", run.uri.removesuffix("/runs/r"))
        with pytest.raises(BadDataError, match=missing):
            plan_sampling(request.check())
    finally:
        for ref, data in whole.items():
            run.put(f"{ref.key}/MANIFEST.json", data)


def test_without_what_was_changed_last_nothing_is_retired(bucket, tmp_path):
    """The record of the last attempt says which checkpoints are to stay."""
    for folder in ("runs/r", "datasets"):
        shutil.copytree(bucket / folder, tmp_path / folder)
    run = open_store(str(tmp_path)).sub("runs/r")
    before = list_checkpoints(run)
    with damaged(run, "attempts/000002.json", DAMAGES["bit in the middle"]):
        for words in (("train", "--dataset", "tiles", "--run", "r", "--epochs", 5), ("runs", "prune", "r")):
            line = refused(ddpm_here(*words, "--bucket", tmp_path), Exit.BAD_DATA)
            assert f"{run.uri}/attempts/000002.json is rotten" in line
            assert "--set" in line
        assert list_checkpoints(run) == before
        done = ddpm_here("sample", "--run", "r", "--seeds", "0", "--no-nearest", "--bucket", tmp_path)
        assert "drawing as the run began" in done.stderr
        succeeded(done)


def test_a_checkpoint_of_another_run_is_named_and_not_used(bucket, tmp_path):
    for folder in ("runs/other", "datasets"):
        shutil.copytree(bucket / folder, tmp_path / folder)
    (ref,) = list_checkpoints(open_store(str(tmp_path)).sub("runs/other"))
    here = tmp_path / "runs/other" / ref.key
    shutil.rmtree(here)
    # Whole in itself, and in a place where its own lay.
    shutil.copytree(bucket / "runs/r" / ref.key, here)
    said = f"{here}/MANIFEST.json was not written by attempt 1 of this run"
    assert said in refused(train(tmp_path, "other", 2, train__seed="5"), Exit.BAD_DATA)
    words = ("sample", "--run", "other", "--seeds", "0", "--no-nearest", "--bucket", tmp_path)
    assert said in refused(ddpm_here(*words), Exit.BAD_DATA)


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_finished_run_that_has_lost_its_newest_checkpoint_learns_it_again(bucket, run, contents, damage, tmp_path):
    shutil.copytree(bucket / "runs" / "r", tmp_path / "runs" / "r")
    shutil.copytree(bucket / "datasets", tmp_path / "datasets")
    copy = open_store(str(tmp_path)).sub("runs/r")
    newest, before = list_checkpoints(copy)[::-1][:2]
    path = tmp_path / "runs/r" / newest.key / "model-00.safetensors"
    words = ("sample", "--run", "r", "--seeds", "0", "--no-nearest", "--bucket", tmp_path)
    if damage == "gone":
        # With the manifest: sampling takes the one before, and says so.
        (path.parent / "MANIFEST.json").unlink()
        done = ddpm_here(*words)
        assert f"{path.parent}/MANIFEST.json is missing" in done.stderr
        assert "epoch-0003-" in succeeded(done)
    else:
        path.write_bytes(path.read_bytes()[:-1])
        assert "`ddpm runs show r` lists the other checkpoints" in refused(ddpm_here(*words, "--raw"), Exit.BAD_DATA)
    done = train(tmp_path, "r", 4)
    assert "is finished: 4 epochs" in succeeded(done)
    assert f"set aside checkpoint {path.parent}" in done.stderr or "set aside a checkpoint" in done.stderr
    again = max(list_checkpoints(copy))
    assert (again.fence, again.images_seen) == (3, newest.images_seen)
    assert content_hash(copy, again) == contents[newest]
    assert before in list_checkpoints(copy)


def test_a_finished_run_whose_newest_checkpoint_is_another_run_s_learns_it_again(bucket, store, tmp_path):
    copy_objects(store, open_store(str(tmp_path)), "datasets/tiles-8", "runs/r")
    copy, theirs = open_store(str(tmp_path)).sub("runs/r"), store.sub("runs/undisturbed")
    newest = max(list_checkpoints(copy))
    contents = content_hash(copy, newest)
    # Of the same images, by the attempt of the same number, and whole.
    foreign = load_manifest(theirs, newest)
    for entry in theirs.list(newest.key):
        copy.put(entry.key, theirs.read(entry.key).data)
    copy.put(f"{newest.key}/MANIFEST.json", foreign.model_copy(update={"attempt": "0" * 32}).to_json())
    done = train(tmp_path, "r", 4)
    assert "is finished: 4 epochs" in succeeded(done)
    assert "was not written by attempt 2 of this run" in done.stderr
    again = max(list_checkpoints(copy))
    assert (again.fence, again.images_seen) == (3, newest.images_seen)
    assert content_hash(copy, again) == contents


def test_a_run_of_an_earlier_version_is_whole_and_goes_on(bucket, store, tmp_path):
    copy_objects(store, open_store(str(tmp_path)), "datasets/tiles-8", "runs/r")
    copy = open_store(str(tmp_path)).sub("runs/r")
    # What that version did not write.
    lacked = {"attempts/000001.json": "holder", "attempts/000002.json": "holder", "status.json": "attempt"}
    for key, field in lacked.items():
        document = json.loads(copy.read(key).data)
        del document[field], document["sha256"]
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        copy.put(key, (json.dumps(document | {"sha256": digest}, indent=1) + "\n").encode())
    assert verify_run(open_store(str(tmp_path)), "r").problems == []
    assert "is finished already: 4 epochs" in succeeded(train(tmp_path, "r", 4))
    assert "is finished: 5 epochs" in succeeded(train(tmp_path, "r", 5))


@pytest.mark.parametrize("name", [*DAMAGES, "another run's"])
def test_a_damaged_configuration_is_named_before_anything_begins(bucket, store, run, name):
    theirs = store.sub("runs/other").read("config.yaml").data
    named = pytest.raises(BadDataError, match=re.escape(run.uri_of("config.yaml")))
    with damaged(run, "config.yaml", DAMAGES.get(name, lambda _: theirs)), named:
        plan_run(TrainRequest("tiles", str(bucket), run="r", epochs=5).check())


@pytest.mark.parametrize("damage", ["newest weights", "newest manifest is gone", "newest metrics", "status"])
def test_a_run_that_goes_on_after_damage_learns_what_an_undisturbed_one_does(bucket, store, damage, tmp_path):
    copy, undisturbed = tmp_path / "bucket", store.sub("runs/undisturbed")
    copy_objects(store, open_store(str(copy)), "datasets/tiles-8", "runs/r")
    target = open_store(str(copy)).sub("runs/r")
    newest = max(list_checkpoints(target))
    keys = {
        "newest weights": [f"{newest.key}/ema-00.safetensors"],
        "newest manifest is gone": [f"{newest.key}/MANIFEST.json"],
        "newest metrics": [load_manifest(target, newest).metric_segments[-1].key],
        "status": ["status.json"],
    }[damage]
    for key in keys:
        if "gone" in damage:
            target.delete(key)
        else:
            target.put(key, DAMAGES["bit in the middle"](target.read(key).data))
    done = train(copy, "r", 5)
    succeeded(done)
    if damage != "status":
        assert "set aside" in done.stderr
        assert f"{target.uri}/{keys[0]}" in done.stderr
    last = [max(list_checkpoints(of)) for of in (target, undisturbed)]
    assert last[0].images_seen == last[1].images_seen > newest.images_seen
    assert content_hash(target, last[0]) == content_hash(undisturbed, last[1])
    rows = [
        read_rows(of, load_manifest(of, ref).metric_segments)
        for of, ref in zip((target, undisturbed), last, strict=True)
    ]
    for row in rows[0] + rows[1]:
        del row["time"], row["images_per_second"]
    assert rows[0] == rows[1]

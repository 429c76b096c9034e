"""What the next attempt, and whoever samples or prunes, makes of a run whose objects are damaged, lost or another's."""

from __future__ import annotations

import re

import pytest

from job.coordination.sealed import NamedObject
from job.exits import BadDataError, Exit
from job.requests import SampleRequest
from job.runs.checkpoints import LATEST_KEY, list_checkpoints, load_manifest, newest_good
from job.runs.layout import CheckpointRef
from job.runs.metric_rows import History, read_rows
from job.runs.records import load_config
from job.sampling.sampling_plan import plan_sampling
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged, pairs, swapped
from tests.job.runs.leased import DESCRIPTIONS, content_hash, copy_objects, resumed, train

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(store, tmp_path):
    """The run in a bucket of its own, to be gone on with."""
    copy_objects(store, open_store(str(tmp_path)), "datasets/tiles-8", "runs/r")
    return open_store(str(tmp_path)).sub("runs/r")


def test_the_newest_whole_checkpoint_is_used(run, keys, contents, capsys):
    refs, wrong = sorted(contents, reverse=True), {}
    differing = [key for key in keys if not key.endswith(DESCRIPTIONS)]
    cases = [(name, (key,)) for name in DAMAGES for key in keys] + [("swapped", pair) for pair in pairs(differing)]
    for name, case in cases:
        with swapped(run, *case) if name == "swapped" else damaged(run, case[0], DAMAGES[name]):
            ref, named, content = resumed(run, capsys)
        # Rows of the metrics that are lost cost no work, nor do averages that were made later, nor descriptions.
        needed = [key for key in case if "/averages/" not in key and not key.endswith(DESCRIPTIONS)]
        expected = next(ref for ref in refs if not any(key.startswith(f"{ref.key}/") for key in needed))
        harmed = expected != refs[0] or (LATEST_KEY in case and name != "gone")
        if (ref, content) != (expected, contents[expected]) or (harmed != any(key in named for key in case)):
            wrong[name, case] = (ref, named)
    assert wrong == {}


def test_lost_manifests_begin_no_new_run(copy):
    refs = list_checkpoints(copy)
    for ref in refs:
        copy.delete(f"{ref.key}/MANIFEST.json")
    missing = rf"{re.escape(copy.uri_of(refs[-1].key))}/MANIFEST\.json is missing, though .*/LATEST names it"
    with pytest.raises(BadDataError, match=missing):
        newest_good(copy)
    with pytest.raises(BadDataError, match=missing):
        plan_sampling(SampleRequest("r", bucket=copy.uri.removesuffix("/runs/r")).check())


def test_a_damaged_attempt_retires_nothing(copy, tmp_path):
    """The record of the last attempt says which checkpoints are to stay."""
    before = list_checkpoints(copy)
    with damaged(copy, "attempts/000002.json", DAMAGES["bit in the middle"]):
        for words in (("train", "--dataset", "tiles", "--run", "r", "--epochs", 5), ("runs", "prune", "r")):
            line = refused(ddpm_here(*words, "--bucket", tmp_path), Exit.BAD_DATA)
            assert f"{copy.uri}/attempts/000002.json is corrupt" in line
            assert "--set" in line
        assert list_checkpoints(copy) == before
        done = ddpm_here("sample", "--run", "r", "--seeds", "0", "--no-nearest", "--bucket", tmp_path)
        assert "taking the run as it began" in done.stderr
        succeeded(done)


def test_a_foreign_checkpoint_is_trained_again(copy, store, contents, tmp_path):
    theirs, newest = store.sub("runs/undisturbed"), max(list_checkpoints(copy))
    sample = ("sample", "--run", "r", "--seeds", "0", "--no-nearest", "--bucket", tmp_path)
    # Of the same images, by the attempt of the same number, and whole.
    for entry in theirs.list(newest.key):
        copy.put(entry.key, theirs.read(entry.key).data)
    foreign = load_manifest(theirs, newest).model_copy(update={"attempt": "0" * 32})
    copy.put(newest.manifest_key, foreign.to_json())
    said = f"{copy.uri}/{newest.manifest_key} was not written by attempt 2 of this run"
    assert said in refused(ddpm_here(*sample), Exit.BAD_DATA)
    for fence, said_then in ((3, said), (4, f"set aside checkpoint {copy.uri}/checkpoints/000003-")):
        done = train(tmp_path, "r", 4)
        assert "is finished: 4 epochs" in succeeded(done)
        assert said_then in done.stderr
        again = max(list_checkpoints(copy))
        assert (again.fence, again.images_seen) == (fence, newest.images_seen)
        assert content_hash(copy, again) == contents[newest]
        # The next time it is cut off.
        path = tmp_path / "runs/r" / again.key / "model-00.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert "`ddpm runs show r` lists the other checkpoints" in refused(
        ddpm_here(*sample, "--weights", "model"), Exit.BAD_DATA
    )
    # Without the manifest the one before is drawn from.
    copy.delete(again.manifest_key)
    done = ddpm_here(*sample)
    assert f"{copy.uri}/{again.manifest_key} is missing" in done.stderr
    assert "sampling from the newest checkpoint that is there" in done.stderr


def test_lost_metrics_change_no_weights(copy, store, tmp_path):
    undisturbed, newest = store.sub("runs/undisturbed"), max(list_checkpoints(copy))
    manifest = load_manifest(copy, newest)
    rows, history = read_rows(copy, manifest.metrics, pytest.fail), History(copy, (), load_config(copy))
    for number, part in enumerate((rows[:1], rows[1:2], rows[2:3], rows[3:]), 1):
        # As after stops, which leave no time to join them.
        history.add(part, CheckpointRef(1, number), is_hurried=True)
    rotten, gone, foreign = lost = [segment.rows for segment in history.segments[:3]]
    lost_rows = read_rows(copy, lost, pytest.fail)
    copy.put(rotten.key, DAMAGES["bit in the middle"](copy.read(rotten.key).data))
    copy.delete(gone.key)
    # What a checkpoint vouches for may be another program's.
    copy.put(foreign.key, b'{"loss": "low"}\n')
    vouched = {foreign.key: NamedObject.of(foreign.key, b'{"loss": "low"}\n')}
    segments = tuple(
        segment.model_copy(update={"rows": vouched.get(segment.rows.key, segment.rows)}) for segment in history.segments
    )
    copy.put(newest.manifest_key, manifest.model_copy(update={"segments": segments}).to_json())
    done = train(tmp_path, "r", 5)
    succeeded(done)
    assert [f"{copy.uri}/{named.key}" in done.stderr for named in lost] == [True] * 3
    last = [max(list_checkpoints(of)) for of in (copy, undisturbed)]
    assert last[0].images_seen == last[1].images_seen > newest.images_seen
    # What is lost stays named, for `ddpm runs verify`.
    assert {named.key for named in lost} <= load_manifest(copy, last[0]).objects.keys()
    assert content_hash(copy, last[0]) == content_hash(undisturbed, last[1])
    rows, expected = (
        read_rows(of, load_manifest(of, ref).metrics, [].append)
        for of, ref in zip((copy, undisturbed), last, strict=True)
    )
    for row in rows + expected:
        del row["time"], row["images_per_second"], row["memory_bytes"]
    assert rows == expected[len(lost_rows) :]

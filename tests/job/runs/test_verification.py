"""Every object of a run, and every kind of damage: told by `ddpm runs verify`, and survived by the next attempt."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from job.data.pack import pack
from job.exits import BadDataError, Exit
from job.plan import plan_run, plan_sampling
from job.requests import SampleRequest, TrainRequest
from job.runs.checkpoints import LATEST, CheckpointRef, list_checkpoints, load_manifest
from job.runs.metrics import read_rows
from job.runs.restoring import newest_good
from job.runs.retention import READING, Reader
from job.runs.verification import verify_run
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.damages import DAMAGES, damaged, pairs, swapped

GROUPS = ("model", "ema", "optimizer")
NEVER_MISSED = re.compile(r"samples/(epoch-0002-ddim-4\.png|denoising-epoch-0002\.gif|[^/]*/index\.json)|reading/.*")
"""Pictures of the past, the index of a batch that others may still draw, readers: nobody knows that they were there."""


def train(bucket: Path, run: str, epochs: int, **changes: str):
    words = ("train", "--dataset", "tiles", "--run", run, "--epochs", epochs, "--bucket", bucket)
    changes = {
        "checkpoint__keep_last": "9",
        "checkpoint__every_epochs": "1",
        "model__channels": "4",
        "log__every_images": "144",
        **changes,
    }
    return ddpm_here(*words, *settings(**changes), DDPM_CACHE=str(bucket / "cache"))


def copy_objects(source: Store, target: Store, *folders: str) -> None:
    """Copies folders between buckets."""
    for folder in folders:
        for entry in source.sub(folder).list():
            target.sub(folder).put(entry.key, source.sub(folder).read(entry.key).data)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run `r` of four checkpoints by two attempts, with a batch of images, and readers; how it goes on; a sister."""
    folder = tmp_path_factory.mktemp("rot")
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    # Threads that wait for each other's core make a small network a slow one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pack(open_store(str(folder)), str(source), "tiles", size=8)
    succeeded(train(folder, "other", 1, train__seed="5"))
    for epochs in (2, 4):
        succeeded(train(folder, "r", epochs))
    shutil.copytree(folder / "runs" / "r", folder / "runs" / "undisturbed")
    succeeded(train(folder, "undisturbed", 5))
    words = ("sample", "--run", "r", "--count", 20, "--bucket", folder)
    succeeded(ddpm_here(*words, DDPM_CACHE=str(folder / "cache")))
    run = open_store(str(folder)).sub("runs/r")
    for number, ref in enumerate(list_checkpoints(run)[:2]):
        reader = Reader(checkpoint=ref.key, until=time.time() + 3600)
        run.create(f"{READING}/{ref.key.removeprefix('checkpoints/')}-{number:032x}.json", reader.to_json())
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(bucket: Path) -> Store:
    return open_store(str(bucket))


@pytest.fixture(scope="module")
def run(store: Store) -> Store:
    return store.sub("runs/r")


@pytest.fixture(scope="module")
def keys(run: Store) -> list[str]:
    return [entry.key for entry in run.list()]


@pytest.fixture(scope="module")
def contents(run: Store) -> dict[CheckpointRef, str]:
    """What a resumed run gets of each checkpoint: a hash over weights, averages and moments."""
    return {ref: _hash(run, ref) for ref in list_checkpoints(run)}


def _hash(run: Store, ref: CheckpointRef) -> str:
    files = sorted(load_manifest(run, ref).files, key=lambda record: record.name)
    return hashlib.sha256(b"".join(run.read(f"{ref.key}/{record.name}").data for record in files)).hexdigest()


def blamed(store: Store) -> list[str]:
    """The keys that verifying the run names, which stand at the beginning of each line."""
    run = store.sub("runs/r")
    return [line.split()[0].removeprefix(f"{run.uri}/") for line in verify_run(store, "r").problems]


def test_a_whole_run_has_no_problems(bucket, store, keys):
    findings = verify_run(store, "r")
    assert (findings.problems, findings.leftovers, findings.objects) == ([], {}, len(keys))
    done: list[tuple[int, int]] = []
    verify_run(store, "r", lambda *progress: done.append(progress))
    assert done[-1][0] > 0.9 * done[-1][1] > 0
    out = succeeded(ddpm_here("runs", "verify", "r", "--bucket", bucket))
    assert f"{bucket}/runs/r: {len(keys)} objects, {findings.size_bytes:,} bytes: all as they were written" in out
    kinds = {re.sub(r"\d+", "0", key).replace("safetensors", "") for key in keys}
    assert {key.split("/")[0] for key in kinds} == {
        "LATEST",
        "attempts",
        "checkpoints",
        "config.yaml",
        "figures",
        "lease.json",
        "metrics",
        "reading",
        "samples",
        "status.json",
        "tensorboard",
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_whatever_is_damaged_is_named_and_nothing_else(store, run, keys, name):
    wrong = {}
    for key in keys:
        with damaged(run, key, DAMAGES[name]):
            expected = [] if name == "gone" and NEVER_MISSED.fullmatch(key) else [key]
            if (found := blamed(store)) != expected:
                wrong[key] = found
    assert wrong == {}


def test_whatever_is_swapped_is_named_and_nothing_else(store, run, keys):
    found = {}
    for one, other in pairs(keys):
        with swapped(run, one, other):
            found[one, other] = blamed(store)
    assert len(found) > 20
    # One name is enough to find the other; most say so themselves.
    assert {pair: names for pair, names in found.items() if names != list(pair)} == {}


def test_what_belongs_to_another_run_is_named(store, run, keys):
    other, wrong = store.sub("runs/other"), {}
    same = {entry.key for entry in other.list()} & {*keys}
    for key in same - {LATEST}:
        theirs = other.read(key).data
        with damaged(run, key, lambda data, theirs=theirs: theirs):
            if (found := blamed(store)) != [key]:
                wrong[key] = found
    assert {"config.yaml", "attempts/000001.json", "figures/loss.png", "lease.json", "status.json"} < same
    assert wrong == {}


def test_what_is_no_part_of_a_run_is_named(store, run):
    strangers = [
        "notes.txt",
        f"{list_checkpoints(run)[0].key}/extra-00.safetensors",
        "metrics/all.jsonl",
        "samples/photo.jpg",
        "attempts/one.json",
        "reading/somebody.json",
    ]
    for key in strangers:
        run.create(key, b"x")
    run.create("samples/photo.png", b"\x89PNG\r\n\x1a\n")
    found = verify_run(store, "r").problems
    for key in [*strangers, "samples/photo.png"]:
        run.delete(key)
    assert sorted(line for line in found if "no part of the run" in line) == sorted(
        f"{run.uri_of(key)} is no part of the run: move it elsewhere, or delete it" for key in strangers
    )
    assert [line for line in found if "no part of the run" not in line] == [
        f"{run.uri}/samples/photo.png holds no provenance: it is rotten, or was put there by something else"
    ]


def test_what_killed_attempts_leave_is_no_problem(store, run):
    left = {
        "checkpoints/000002-000000099999/model-00.safetensors",
        "metrics/000002-000000099999.jsonl",
        "tensorboard/events.out.tfevents.000002-000000099999",
        "probe/0123",
    }
    for key in left:
        run.create(key, b"half")
    findings = verify_run(store, "r")
    for key in left:
        run.delete(key)
    assert findings.problems == []
    assert findings.leftovers == dict.fromkeys(left, 4)


def test_the_command_ends_with_65_and_names_all(bucket, run):
    weights = f"{list_checkpoints(run)[0].key}/model-00.safetensors"
    with damaged(run, "config.yaml", DAMAGES["bit in the middle"]), damaged(run, weights, DAMAGES["gone"]):
        done = ddpm_here("runs", "verify", "r", "--bucket", bucket)
        # A run that is damaged is never begun anew, and never gone on with under other words.
        refusal = refused(train(bucket, "r", 6), Exit.BAD_DATA)
    assert "2 problems in" in refused(done, Exit.BAD_DATA)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [run.uri_of(weights), run.uri_of("config.yaml")]
    assert f"{run.uri}/config.yaml" in refusal
    assert "there is no run 'nobody'" in refused(ddpm_here("runs", "verify", "nobody", "--bucket", bucket), 66)


def resumed(run: Store) -> tuple[CheckpointRef, list[str], list[str], int]:
    """What an attempt would go on from: the checkpoint, the keys that warnings name, and the metrics' rows."""
    warnings: list[str] = []
    with newest_good(run, GROUPS, warnings.append) as restored:
        assert restored is not None
        manifest = restored.manifest
        files = sorted(path for paths in restored.files.values() for path in paths)
        content = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        rows = len(read_rows(run, manifest.metric_segments))
    named = [key for warning in warnings for key in re.findall(rf"{re.escape(run.uri)}/(\S+?)[:;)]? ", f"{warning} ")]
    return manifest.ref, named, [content], rows


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


def test_what_a_run_lacks_when_it_begins_is_no_problem(bucket, tmp_path):
    run = open_store(str(tmp_path)).sub("runs/r")
    run.create("probe/0123", b"1")
    source = open_store(str(bucket)).sub("runs/r")
    run.create("lease.json", source.read("lease.json").data)
    assert verify_run(open_store(str(tmp_path)), "r").problems == []
    shutil.copytree(bucket / "runs/other", tmp_path / "runs/other")
    other = open_store(str(tmp_path)).sub("runs/other")
    (only,) = list_checkpoints(other)
    # Killed between its first manifest and the hint.
    other.delete(LATEST)
    assert verify_run(open_store(str(tmp_path)), "other").problems == []
    other.delete(f"{only.key}/MANIFEST.json")
    assert [problem for problem in verify_run(open_store(str(tmp_path)), "other").problems if LATEST in problem] == []


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
    assert _hash(copy, again) == contents[newest]
    assert before in list_checkpoints(copy)


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
    assert _hash(target, last[0]) == _hash(undisturbed, last[1])
    rows = [
        read_rows(of, load_manifest(of, ref).metric_segments)
        for of, ref in zip((target, undisturbed), last, strict=True)
    ]
    for row in rows[0] + rows[1]:
        del row["time"], row["images_per_second"]
    assert rows[0] == rows[1]


def test_on_a_bucket(gcs_bucket, store, run, contents):
    far = open_store(gcs_bucket)
    copy_objects(store, far, "datasets/tiles-8", "runs/r")
    far_run, (before, newest) = far.sub("runs/r"), sorted(contents)[-2:]
    assert verify_run(far, "r").problems == []
    for name in ("bit in the middle", "all but a byte", "gone"):
        for key in (f"{newest.key}/model-00.safetensors", f"{newest.key}/MANIFEST.json"):
            with damaged(far_run, key, DAMAGES[name]):
                assert blamed(far) == [key]
                ref, named, content, _ = resumed(far_run)
                assert (ref, content) == (before, [contents[before]])
                assert key in named
    with swapped(far_run, "samples/denoising-epoch-0002.gif", "samples/denoising-epoch-0004.gif"):
        assert blamed(far) == ["samples/denoising-epoch-0002.gif", "samples/denoising-epoch-0004.gif"]
    assert verify_run(far, "r").problems == []

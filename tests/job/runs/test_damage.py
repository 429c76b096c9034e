"""Each damage to each object of a run: what verifying says, and what whoever goes on does; averages made later."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from job.coordination.sealed import NamedObject, code_version
from job.exits import BadDataError, Exit
from job.requests import SampleRequest
from job.runs import records
from job.runs.checkpoints import LATEST_KEY, list_checkpoints, load_average, load_manifest, newest_good, restore
from job.runs.layout import CheckpointRef, ObjectKind, located, places_in
from job.runs.metric_rows import History, read_rows
from job.runs.records import load_config
from job.sampling.sampling_plan import plan_sampling
from job.store import open_store
from job.store.files import scratch_folder
from job.store.local import LocalStore
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, raised, refused, succeeded
from tests.job.damages import DAMAGES, damaged, pairs, swapped
from tests.job.runs.leased import DESCRIPTIONS, content_hash, copy_objects, resumed, small_config, train

pytestmark = pytest.mark.slow

NEVER_MISSED = re.compile(
    r"LATEST|lease\.json|status\.json|tensorboard/samples/.*|reading/.*|grids/.*|evaluations/.*|figures/.*|"
    r".*/averages/ema-0\.2\.json|samples/([^/]*\.(png|gif)|[^/]*/index\.json)"
)
"""No record names them: hints, pictures, the index of a batch, and what is made anew. Nor older manifests."""
NOT_IN_A_RUN = {"IMAGE", "PROBE", "FITTING", "FEATURES", "FEATURE_RECORD", "FEATURE_CLAIM", "CLAIM", "NETWORK"}
"""What only --save png, a kill and a network of one's own leave."""


@pytest.fixture
def copy(store, tmp_path):
    """The run in a bucket of its own, to be gone on with."""
    copy_objects(store, open_store(str(tmp_path)), "datasets/tiles-8", "runs/r")
    return open_store(str(tmp_path)).sub("runs/r")


def test_a_whole_run_has_no_problems(bucket, store, run, keys):
    findings = verify_run(store, "r")
    assert (findings.problems, findings.leftovers, findings.objects) == ([], {}, len(keys))
    out = succeeded(ddpm_here("runs", "verify", "r", "--bucket", bucket))
    assert f"{bucket}/runs/r: {len(keys)} objects, {findings.size_bytes:,} bytes: all as they were written" in out
    # The table has a row for each of them.
    assert {kind.name for kind in ObjectKind} - {located(key).kind.name for key in keys} == NOT_IN_A_RUN
    # Pictures have their origin.
    for name in ("epoch-0002-ddim-4.png", "denoising-epoch-0002-ddim-4.gif"):
        with Image.open(io.BytesIO(run.read(f"samples/{name}").data)) as picture:
            picture.load()
            comment = picture.info.get("Comment") or picture.info["comment"].decode()
        origin, _, sha256 = comment.rpartition(" ")
        assert json.loads(origin) == {"run": "r", "fence": 1, "images_seen": 600, "code_version": code_version()}, name
        assert len(sha256) == 64


def test_each_damage_is_named_and_the_newest_whole_checkpoint_is_used(store, run, keys, capsys):
    contents = {ref: content_hash(run, ref) for ref in list_checkpoints(run)}
    refs, wrong, older = sorted(contents, reverse=True), {}, {ref.manifest_key for ref in [*contents][:-1]}
    one_of_each_kind = {located(key).kind: key for key in keys}.values()
    differing = [key for key in keys if not key.endswith(DESCRIPTIONS)]
    cases = [(name, (key,)) for name in DAMAGES for key in keys] + [("swapped", pair) for pair in pairs(differing)]
    for name, case in cases:
        key, expected_blame = case[0], None
        if name in ("gone", "bit in the middle") or (name != "swapped" and key in one_of_each_kind):
            missed = not NEVER_MISSED.fullmatch(key) and key not in older
            kinds_unseen = (ObjectKind.PAGE, ObjectKind.GRID_EVENTS)
            expected_blame = [] if located(key).kind in kinds_unseen or (name == "gone" and not missed) else [key]
        with swapped(run, *case) if name == "swapped" else damaged(run, key, DAMAGES[name]):
            ref, named, content = resumed(run, capsys)
            problems = [] if expected_blame is None else verify_run(store, "r").problems
        # The keys stand at the beginning of each line.
        if expected_blame not in (None, blamed := [line.split()[0].removeprefix(f"{run.uri}/") for line in problems]):
            wrong[name, case] = blamed
        # Rows of the metrics that are lost cost no work, nor do averages that were made later, nor descriptions.
        needed = [key for key in case if "/averages/" not in key and not key.endswith(DESCRIPTIONS)]
        expected = next(ref for ref in refs if not any(key.startswith(f"{ref.key}/") for key in needed))
        harmed = expected != refs[0] or (LATEST_KEY in case and name != "gone")
        if (ref, content) != (expected, contents[expected]) or (harmed != any(key in named for key in case)):
            wrong[name, case] = (ref, named)
    assert wrong == {}


def test_strangers_are_named_and_leftovers_counted(store, run):
    left = {
        "checkpoints/000002-000000099999/model-00.safetensors",
        "metrics/000002-000000099999.jsonl",
        "snapshots/000002-000000099999/ema-0.1-00.safetensors",
        f"{list_checkpoints(run)[2].key}/averages/{'0' * 32}/ema-0.2-00.safetensors",
        "tensorboard/events.out.tfevents.000002-000000099999",
        "probe/0123",
    }
    strangers = ["notes.txt", "metrics/all.jsonl", "samples/photo.jpg", "attempts/one.json", "reading/somebody.json"]
    strangers += ["config.yaml.bak"]
    created = [*strangers, *left, "samples/photo.png"]
    for key in created:
        run.create(key, b"half")
    findings = verify_run(store, "r")
    for key in created:
        run.delete(key)
    assert findings.leftovers == dict.fromkeys(left, 4)
    expected = [f"{run.uri_of(key)} is not part of the run: move it elsewhere, or delete it" for key in strangers]
    photo = f"{run.uri}/samples/photo.png is corrupt, or another program wrote it: its SHA-256 is not the one in itself"
    assert findings.problems == sorted([*expected, photo])


def test_the_command_names_all_problems(bucket, run):
    weights = f"{list_checkpoints(run)[0].key}/model-00.safetensors"
    with damaged(run, "config.yaml", DAMAGES["bit in the middle"]), damaged(run, weights, DAMAGES["gone"]):
        done = ddpm_here("runs", "verify", "r", "--bucket", bucket)
        # A run that is damaged is never begun anew, and never gone on with under other words.
        refusal = refused(train(bucket, "r", 6), Exit.BAD_DATA)
    assert "2 problems in" in refused(done, Exit.BAD_DATA)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [run.uri_of(weights), run.uri_of("config.yaml")]
    assert f"{run.uri}/config.yaml" in refusal
    assert "there is no run 'nobody'" in refused(ddpm_here("runs", "verify", "nobody", "--bucket", bucket), 66)


def test_a_beginning_run_has_no_problems(store, tmp_path):
    here = open_store(str(tmp_path))
    here.sub("runs/r").create("probe/0123", b"1")
    here.sub("runs/r").create("lease.json", store.read("runs/r/lease.json").data)
    assert verify_run(here, "r").problems == []
    copy_objects(store, here, "runs/other")
    other = here.sub("runs/other")
    (only,) = list_checkpoints(other)
    # Killed between its first manifest and the hint.
    other.delete(LATEST_KEY)
    assert verify_run(here, "other").problems == []
    other.delete(only.manifest_key)
    assert [problem for problem in verify_run(here, "other").problems if LATEST_KEY in problem] == []


def test_lost_manifests_begin_no_new_run(copy):
    refs = list_checkpoints(copy)
    for ref in refs:
        copy.delete(ref.manifest_key)
    missing = rf"{re.escape(copy.uri_of(refs[-1].key))}/MANIFEST\.json is missing, though .*/LATEST names it"
    raised(BadDataError, missing, newest_good, copy)
    raised(BadDataError, missing, plan_sampling, SampleRequest("r", bucket=copy.uri.removesuffix("/runs/r")).check())


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


def test_a_foreign_checkpoint_is_trained_again(copy, store, tmp_path):
    theirs, newest = store.sub("runs/undisturbed"), max(list_checkpoints(copy))
    content = content_hash(copy, newest)
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
        assert content_hash(copy, again) == content
        # The next time it is cut off.
        path = tmp_path / "runs/r" / again.key / "model-00.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    remedy = refused(ddpm_here(*sample, "--weights", "model"), Exit.BAD_DATA)
    assert "`ddpm runs show r` lists the other checkpoints" in remedy
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
    rows = read_rows(copy, load_manifest(copy, last[0]).metrics, [].append)
    expected = read_rows(undisturbed, load_manifest(undisturbed, last[1]).metrics, [].append)
    for row in rows + expected:
        del row["time"], row["images_per_second"], row["memory_bytes"]
    assert rows == expected[len(lost_rows) :]


# --- averages that are made after training: against those that were kept meanwhile, and what faults leave of them

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

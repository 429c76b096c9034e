"""`ddpm runs verify`: every object of a run, and every kind of damage."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from job.exits import Exit
from job.runs.checkpoints import LATEST_KEY, list_checkpoints
from job.runs.drawings import put_picture
from job.runs.layout import ObjectKind, located
from job.runs.verification import verify_run
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged
from tests.job.runs.whole_runs import copy_objects, train

pytestmark = pytest.mark.slow

NEVER_MISSED = re.compile(
    r"tensorboard/samples/.*|reading/.*|grids/.*|evaluations/.*|.*/averages/ema-0\.2\.json|"
    r"samples/((denoising-)?epoch-0002-ddim-4\.(png|gif)|[^/]*/index\.json)"
)
"""Pictures of the past, the index of a batch that others may still draw, readers, averages, grids and scores, which are
made anew: nobody knows that they were there."""


def blamed(store: Store) -> list[str]:
    """The keys that verifying the run names, which stand at the beginning of each line."""
    run = store.sub("runs/r")
    return [line.split()[0].removeprefix(f"{run.uri}/") for line in verify_run(store, "r").problems]


def test_a_whole_run_has_no_problems(bucket, store, keys):
    findings = verify_run(store, "r")
    assert (findings.problems, findings.leftovers, findings.objects) == ([], {}, len(keys))
    out = succeeded(ddpm_here("runs", "verify", "r", "--bucket", bucket))
    assert f"{bucket}/runs/r: {len(keys)} objects, {findings.size_bytes:,} bytes: all as they were written" in out
    # The table has a row for each of them, and this run has each kind but what only --save png and a kill leave.
    assert {located(key).kind for key in keys} == {*ObjectKind} - {
        ObjectKind.IMAGE,
        ObjectKind.PROBE,
        ObjectKind.FEATURES,
        ObjectKind.FEATURE_RECORD,
        ObjectKind.FEATURE_CLAIM,
        ObjectKind.CLAIM,
    }


def test_each_damage_is_named(store, run, keys):
    wrong = {}
    one_of_each_kind = {located(key).kind: key for key in keys}.values()
    for name, damage in DAMAGES.items():
        for key in keys if name in ("gone", "bit in the middle") else one_of_each_kind:
            unseen = located(key).kind is ObjectKind.PAGE or (name == "gone" and NEVER_MISSED.fullmatch(key))
            expected = [] if unseen else [key]
            if name == "gone" and (place := located(key)).kind is ObjectKind.PROVENANCE:
                # Nobody misses the record of what was drawn over, or can tell a picture without one from a stranger's.
                drawn_over = hashlib.sha256(run.read(place.of).data).hexdigest() != place.sha256
                expected = [] if drawn_over else [place.of]
            with damaged(run, key, damage):
                if (found := blamed(store)) != expected:
                    wrong[name, key] = found
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
    strangers = [
        "notes.txt",
        f"{list_checkpoints(run)[0].key}/extra-00.safetensors",
        f"{list_checkpoints(run)[0].key}/averages/{'0' * 32}/ema-0.2-00.safetensors",
        "metrics/all.jsonl",
        "samples/photo.jpg",
        "attempts/one.json",
        "reading/somebody.json",
        "config.yaml.bak",
        f"provenance/config.yaml/{'a' * 64}.json",
    ]
    created = [*strangers, *left, "samples/photo.png"]
    for key in created:
        run.create(key, b"half")
    findings = verify_run(store, "r")
    for key in created:
        run.delete(key)
    assert findings.leftovers == dict.fromkeys(left, 4)
    expected = [f"{run.uri_of(key)} is not part of the run: move it elsewhere, or delete it" for key in strangers]
    unknown = f"{run.uri}/samples/photo.png is corrupt, or another program wrote it: nothing in "
    assert findings.problems == sorted([*expected, f"{unknown}provenance/samples/photo.png has its SHA-256"])


def test_a_new_picture_has_its_record(store, run):
    """Whoever is killed while a picture is written leaves the record of the new bytes beside the old ones."""
    key, ref = "samples/denoising-epoch-0002-ddim-4.gif", list_checkpoints(run)[0]
    before, written = run.read(key).data, []

    class Killed(type(run)):
        def put(self, key, data):
            assert blamed(store) == []
            super().put(key, data)
            written.append(key)

    put_picture(Killed(Path(run.uri)), key, b"GIF89a", ref)
    put_picture(Killed(Path(run.uri)), key, before, ref)
    assert blamed(store) == []
    record, picture = written[:2]
    assert (located(record).of, picture) == (key, key)
    run.delete(record)


def test_the_command_names_all_problems(bucket, run):
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


def test_a_beginning_run_has_no_problems(store, tmp_path):
    here = open_store(str(tmp_path))
    begun = here.sub("runs/r")
    begun.create("probe/0123", b"1")
    begun.create("lease.json", store.read("runs/r/lease.json").data)
    assert verify_run(here, "r").problems == []
    copy_objects(store, here, "runs/other")
    other = here.sub("runs/other")
    (only,) = list_checkpoints(other)
    # Killed between its first manifest and the hint.
    other.delete(LATEST_KEY)
    assert verify_run(here, "other").problems == []
    other.delete(f"{only.key}/MANIFEST.json")
    assert [problem for problem in verify_run(here, "other").problems if LATEST_KEY in problem] == []

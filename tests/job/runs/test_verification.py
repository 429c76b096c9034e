"""`ddpm runs verify`: every object of a run, and every kind of damage."""

from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image

from job.coordination.sealed import code_version
from job.exits import Exit
from job.runs.checkpoints import LATEST_KEY, list_checkpoints
from job.runs.layout import ObjectKind, located
from job.store import Store, open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged
from tests.job.runs.leased import copy_objects, train

pytestmark = pytest.mark.slow

NEVER_MISSED = re.compile(
    r"LATEST|lease\.json|status\.json|tensorboard/samples/.*|reading/.*|grids/.*|evaluations/.*|figures/.*|"
    r".*/averages/ema-0\.2\.json|samples/([^/]*\.(png|gif)|[^/]*/index\.json)"
)
"""No record names them: hints, pictures, the index of a batch, and what is made anew. Nor older manifests."""


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
    wrong, older = {}, {ref.manifest_key for ref in list_checkpoints(run)[:-1]}
    one_of_each_kind = {located(key).kind: key for key in keys}.values()
    for name, damage in DAMAGES.items():
        for key in keys if name in ("gone", "bit in the middle") else one_of_each_kind:
            missed = not NEVER_MISSED.fullmatch(key) and key not in older
            unseen = located(key).kind in (ObjectKind.PAGE, ObjectKind.GRID_EVENTS) or (name == "gone" and not missed)
            expected = [] if unseen else [key]
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
        "metrics/all.jsonl",
        "samples/photo.jpg",
        "attempts/one.json",
        "reading/somebody.json",
        "config.yaml.bak",
    ]
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


def test_pictures_have_their_origin(run):
    for name in ("epoch-0002-ddim-4.png", "denoising-epoch-0002-ddim-4.gif"):
        with Image.open(io.BytesIO(run.read(f"samples/{name}").data)) as picture:
            picture.load()
            comment = picture.info.get("Comment") or picture.info["comment"].decode()
        origin, _, sha256 = comment.rpartition(" ")
        assert json.loads(origin) == {"run": "r", "fence": 1, "images_seen": 600, "code_version": code_version()}, name
        assert len(sha256) == 64


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

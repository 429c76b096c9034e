"""What `ddpm runs prune` and training itself delete, and what neither ever does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.config import RunConfig, validated
from job.exits import Exit
from job.processes.process_identity import ProcessIdentity
from job.runs import pruning, records
from job.runs.checkpoints import LATEST, CheckpointRef, Latest, Manifest, list_checkpoints
from job.runs.lease import Lease
from job.runs.retention import Reader, Retention, being_read, reading
from job.runs.saving import CheckpointWriter, Save
from job.stop import NEVER
from job.store import Entry, Store, open_store
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.damages import DAMAGES, damaged
from tests.job.small_dataset import write_dataset

FENCE = 2


def config(**changes: object) -> RunConfig:
    return validated({"data.dataset": "random", "data.size": 8, "train.batch_size": 16, **changes}, "here")


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def run(bucket: Path) -> Store:
    """A run of two attempts, the last of which ended in order: five checkpoints, two of them of the first attempt."""
    run = open_store(str(bucket)).sub("runs/r")
    records.create_config(run, config(**{"checkpoint.keep_last": 2}))
    for fence in range(1, FENCE + 1):
        lease = Lease.take(run, 0, 0.0, NEVER, pytest.fail)
        assert lease.fence == fence
        attempt = records.record_attempt(run, fence, {}, 1, "cpu")
        write(run, attempt, *(range(16, 48, 16) if fence == 1 else range(48, 96, 16)))
        lease.close()
    say(run, seconds_ago=0)
    return run


def write(run: Store, attempt: records.Attempt, *places: int) -> None:
    import torch

    writer = CheckpointWriter(run, {"model": {"w": torch.ones(4)}})
    for images_seen in places:
        manifest = Manifest(
            fence=attempt.fence,
            attempt=attempt.id,
            images_seen=images_seen,
            epoch=None,
            created=records.utc_now(),
            code_version="0",
            config_sha256="0" * 64,
            world_size=1,
            loss_sums=[],
            files=(),
        )
        writer.save(Save(manifest, {}))
        writer.wait()
    writer.close()


def say(run: Store, seconds_ago: float) -> None:
    """Writes the last attempt's last word."""
    updated = time.strftime(records.UTC, time.gmtime(time.time() - seconds_ago))
    status = records.Status(
        state="stopped",
        fence=FENCE,
        attempt=records.attempt_id(run, FENCE),
        images_seen=80,
        target_images=160,
        epoch=1.0,
        loss=None,
        images_per_second=None,
        updated=updated,
    )
    records.write_status(run, status)


def prune(bucket: Path, *words: object):
    return ddpm_here("runs", "prune", "r", "--bucket", bucket, *words)


def left(run: Store) -> list[int]:
    return [ref.images_seen for ref in list_checkpoints(run)]


def everything(run: Store) -> dict[str, bytes]:
    return {entry.key: run.read(entry.key).data for entry in run.list()}


def test_a_dry_run_says_what_would_go_and_why_and_touches_nothing(bucket, run):
    before = everything(run)
    lines = succeeded(prune(bucket, "--dry-run")).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [
        "checkpoints/000001-000000000016",
        "checkpoints/000001-000000000032",
        "checkpoints/000002-000000000048",
    ]
    sizes = [
        sum(len(data) for key, data in before.items() if key.startswith(line.split("  ")[0])) for line in lines[:-1]
    ]
    assert [line.split("  ")[1:] for line in lines[:-1]] == [
        [f"{size:,} bytes", "not among the last 2"] for size in sizes
    ]
    assert lines[-1] == f"{run.uri}: {sum(sizes):,} bytes would go"
    assert everything(run) == before


def test_what_the_rules_do_not_keep_goes(bucket, run):
    assert "bytes deleted" in succeeded(prune(bucket))
    assert left(run) == [64, 80]
    assert {entry.key.split("/")[1] for entry in run.list("checkpoints")} == {
        "000002-000000000064",
        "000002-000000000080",
    }
    assert "there is nothing to prune" in succeeded(prune(bucket))
    succeeded(prune(bucket, "--keep-last", 1))
    assert left(run) == [80]
    assert records.highest_fence(run) == FENCE


def test_epochs_that_the_run_keeps_stay(bucket, run, tmp_path):
    attempt = records.record_attempt(run, 3, {"checkpoint.keep_epochs": [2], "checkpoint.keep_last": 1}, 1, "cpu")
    assert attempt.previous == FENCE
    assert "no dataset at" in refused(prune(bucket), Exit.MISSING_INPUT)
    write_dataset(str(bucket), tmp_path, (5, 3, 7, 1, 6))
    # 22 images an epoch, 16 a batch: the second ends with image 48.
    succeeded(prune(bucket))
    assert left(run) == [48, 80]


@pytest.mark.parametrize("rotten", [1, 2, 4])
def test_the_newest_one_that_verifies_stays_whatever_the_rules_say(bucket, run, rotten):
    refs = list_checkpoints(run)[::-1]
    for ref in refs[:rotten]:
        key = f"{ref.key}/model-00.safetensors"
        run.put(key, DAMAGES["bit near the end"](run.read(key).data))
    done = prune(bucket, "--keep-last", 1)
    succeeded(done)
    assert left(run) == sorted([80, refs[rotten].images_seen])
    assert done.stderr.count("does not verify, so that an older one stays") == rotten


def test_nothing_goes_when_nothing_verifies(bucket, run):
    for ref in list_checkpoints(run):
        run.put(f"{ref.key}/MANIFEST.json", b"{}")
    before = {key: data for key, data in everything(run).items() if key != "lease.json"}
    assert "nothing is deleted" in refused(prune(bucket), Exit.BAD_DATA)
    assert {key: data for key, data in everything(run).items() if key != "lease.json"} == before


def test_what_is_being_read_stays(bucket, run):
    with reading(run, CheckpointRef(1, 32)):
        succeeded(prune(bucket))
        assert left(run) == [32, 64, 80]
    succeeded(prune(bucket))
    assert left(run) == [64, 80]


def test_a_reader_that_was_killed_holds_nothing_for_ever(run):
    run.create(f"reading/000001-000000000016-{'0' * 32}.json", Reader(checkpoint="x", until=1.0).to_json())
    run.create("reading/000001-000000000016-stranger.json", b"{}")
    assert being_read(run) == (set(), sorted(entry.key for entry in run.list("reading")))


def test_what_killed_readers_samplers_and_savers_left_goes(bucket, run):
    succeeded(prune(bucket))
    there = everything(run).keys()
    batch = "samples/epoch-0001-ddim-4-0-8"
    left = {
        f"reading/000002-000000000064-{'0' * 32}.json": Reader(checkpoint="x", until=1.0).to_json(),
        f"{batch}/piece-00000.tar": b"1",
        f"{batch}/piece-00001/000000004.png": b"1",
    }
    kept = {f"{batch}/piece-00002.tar": b"1", f"{batch}/records/piece-00002.json": b"{}"}
    for key, data in (left | kept).items():
        run.create(key, data)
    unlocked = Path(run.uri) / "checkpoints/000001-000000000099/.tmp-0123456789abcdef"
    unlocked.parent.mkdir()
    unlocked.write_bytes(b"half a checkpoint")
    # Whoever reads may be making these very pieces.
    with reading(run, CheckpointRef(2, 80)):
        lines = succeeded(prune(bucket, "--dry-run"))
        assert "left behind by a reader that was killed" in lines
        assert "piece" not in lines
    assert unlocked.exists()
    lines = succeeded(prune(bucket))
    assert lines.count("left behind by sampling that was stopped") == 2
    assert everything(run).keys() == there | kept.keys()
    assert not unlocked.parent.exists()


def test_a_piece_that_is_taken_up_in_the_middle_of_pruning_stays(bucket, run, capsys):
    succeeded(prune(bucket))
    batch = "samples/epoch-0001-ddim-4-0-8"
    for piece in ("piece-00000.tar", "piece-00001.tar", "piece-00002.tar"):
        run.create(f"{batch}/{piece}", b"1")
    retention = Retention.of(config())
    found = pruning.removals(open_store(str(bucket)), run, config(), retention, 1, pytest.fail)
    assert len(found) == 3
    lease = Lease.take(run, FENCE, 0.0, NEVER, pytest.fail)
    try:
        # A sampler has committed one of them since, and gone.
        run.create(f"{batch}/records/piece-00001.json", b"{}")
        pruning._remove(run, lease, found[:2], NEVER)
        # Another one has begun.
        with reading(run, CheckpointRef(2, 80)):
            pruning._remove(run, lease, found[2:], NEVER)
    finally:
        lease.close()
    assert [entry.key.rpartition("/")[2] for entry in run.list(batch)] == [
        "piece-00001.tar",
        "piece-00002.tar",
        "piece-00001.json",
    ]


def test_looking_again_costs_the_same_however_many_images_there_are(bucket, run, monkeypatch):
    succeeded(prune(bucket))
    batch = "samples/epoch-0001-ddim-4-0-8-png"
    for image in range(20):
        run.create(f"{batch}/piece-00001/{image:09d}.png", b"1")
    listed: list[str] = []
    real = type(run).list

    def counted(store: Store, prefix: str = "") -> Iterator[Entry]:
        if prefix.startswith("samples/"):
            listed.append(prefix)
        return real(store, prefix)

    monkeypatch.setattr(type(run), "list", counted)
    assert succeeded(prune(bucket)).count("left behind by sampling that was stopped") == 20
    assert listed == []
    assert not list(run.list(batch))


def test_it_is_refused_while_somebody_trains(bucket, run):
    lease = Lease.take(run, FENCE, 0.0, NEVER, pytest.fail)
    try:
        before = left(run)
        assert f"process {ProcessIdentity.of_this_process().pid} on" in refused(prune(bucket), Exit.LOST_RUN)
        assert left(run) == before
        succeeded(prune(bucket, "--dry-run"))
    finally:
        lease.close()


def orphans_of(fence: int) -> list[str]:
    place = f"{fence:06d}-000000000099"
    return [f"checkpoints/{place}/model-00.safetensors", f"metrics/{place}.jsonl"]


@pytest.mark.parametrize(
    ("released", "seconds_ago", "goes"), [(True, 7200, True), (True, 60, False), (False, 7200, False)]
)
def test_orphans_go_when_their_attempt_is_over_for_long(bucket, run, released, seconds_ago, goes):
    for key in [*orphans_of(1), *orphans_of(FENCE), "probe/0123"]:
        run.create(key, b"half")
    say(run, seconds_ago)
    if not released:
        with damaged(run, "lease.json", lambda data: data + b" "):
            out = succeeded(prune(bucket, "--dry-run"))
    else:
        out = succeeded(prune(bucket))
    named = {line.split()[0] for line in out.splitlines() if "left behind" in line}
    assert named == {*orphans_of(1), "probe/0123", *(orphans_of(FENCE) if goes else [])}
    if released:
        assert {*orphans_of(1), *orphans_of(FENCE)} & {entry.key for entry in run.list()} == set(
            [] if goes else orphans_of(FENCE)
        )


def test_the_hint_never_names_what_went(bucket, run):
    run.put(LATEST, Latest(checkpoint="checkpoints/000001-000000000032").to_json())
    succeeded(prune(bucket))
    assert Latest.load(run, LATEST).checkpoint == "checkpoints/000002-000000000080"


def test_training_does_not_measure_its_own_by_what_nobody_verified():
    rule, own = Retention(1, 0, ()), CheckpointRef(2, 160)
    older, foreign = CheckpointRef(1, 240), CheckpointRef(9, 16)
    assert rule.retire([older, own, foreign], 40, 16) == [older, own]
    assert rule.retire([older, own, foreign], 40, 16, verified=own) == [older]
    assert Retention(2, 0, ()).retire([older, own, foreign], 40, 16, verified=own) == []

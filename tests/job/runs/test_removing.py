"""What `ddpm runs prune` and `delete` take away, and what neither ever does."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from job.coordination.lease import LEASE_KEY, ProcessIdentity, load_lease
from job.exits import Exit, StoppedError
from job.runs import records
from job.runs.checkpoints import list_checkpoints
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef
from job.runs.retention import Reader, Retention, being_read, kept_while_read
from job.store import Store, open_store
from job.store.local import LocalStore
from job.verbs import upkeep
from tests.conftest import only_linux
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.damages import DAMAGES, damaged
from tests.job.launching import StopWhen, taken
from tests.job.runs.leased import DATASET_IMAGES, committed_images, small_config, write
from tests.job.small_dataset import write_dataset

FENCE = 2
BATCH = "samples/epoch-0001-ddim-4-0-8"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def run(bucket: Path) -> Store:
    """A run of two attempts, the last of which ended in order: five checkpoints, two of them of the first attempt."""
    run = open_store(str(bucket)).sub("runs/r")
    records.create_config(run, small_config(checkpoint__keep_last=2, train__batch_size=16))
    for fence, images in ((1, (16, 32)), (FENCE, (48, 64, 80))):
        taken(run).close()
        records.record_attempt(run, fence, f"{fence:032x}", changes={}, world_size=1, device="cpu")
        write(run, *((fence, images_seen) for images_seen in images))
    return run


prune = partial(ddpm_here, "runs", "prune", "r", "--bucket")
delete = partial(ddpm_here, "runs", "delete", "r", "--bucket")


def everything(run: Store) -> dict[str, bytes]:
    """But for the lease, which pruning takes and gives back."""
    return {entry.key: run.read(entry.key).data for entry in run.list() if entry.key != LEASE_KEY}


def said_to_read(run: Store, ref: CheckpointRef, until: float) -> str:
    """The key under which a reader says so."""
    run.put(key := f"reading/{ref}-{'0' * 32}.json", Reader(checkpoint=ref.key, until=until).to_json())
    return key


def test_a_dry_run_lists_the_removals(bucket, run):
    before, lease = everything(run), run.read(LEASE_KEY)
    lines = [line.split("  ") for line in succeeded(prune(bucket, "--dry-run")).splitlines()]
    keys = [f"checkpoints/{place}" for place in ("000001-000000000016", "000001-000000000032", "000002-000000000048")]
    sizes = [sum(len(data) for key, data in before.items() if key.startswith(folder)) for folder in keys]
    expected = [[key, f"{size:,} bytes", "not among the last 2"] for key, size in zip(keys, sizes, strict=True)]
    assert lines == [*expected, [f"{run.uri}: {sum(sizes):,} bytes would go"]]
    assert (everything(run), run.read(LEASE_KEY)) == (before, lease)
    assert "bytes deleted" in succeeded(prune(bucket))
    assert everything(run).keys() == {key for key in before if not key.startswith(tuple(keys))}
    assert "there is nothing to prune" in succeeded(prune(bucket))
    succeeded(prune(bucket, "--keep-last", 1))
    assert committed_images(run) == [80]
    assert records.highest_fence(run) == FENCE


def test_epochs_that_the_run_keeps_stay(bucket, run, tmp_path):
    changes = {"checkpoint.keep_epochs": [2], "checkpoint.keep_last": 1}
    attempt = records.record_attempt(run, 3, "", changes=changes, world_size=1, device="cpu")
    assert attempt.previous == FENCE
    assert "no dataset at" in refused(prune(bucket), Exit.MISSING_INPUT)
    write_dataset(str(bucket), tmp_path, (5, 3, 7, 1, 6))
    # 22 images an epoch, 16 a batch: the second ends with image 48.
    succeeded(prune(bucket))
    assert committed_images(run) == [48, 80]


def test_the_newest_sound_checkpoint_stays(bucket, run):
    refs = list_checkpoints(run)
    for ref in refs[1:]:
        key = f"{ref.key}/model-00.safetensors"
        run.put(key, DAMAGES["bit in the middle"](run.read(key).data))
    done = prune(bucket, "--keep-last", 1)
    succeeded(done)
    assert committed_images(run) == [refs[0].images_seen, 80]
    assert done.stderr.count("set aside checkpoint") == len(refs) - 1
    run.put(refs[0].manifest_key, b"{}")
    before = everything(run)
    assert "no checkpoint of" in refused(prune(bucket, "--keep-last", 1), Exit.BAD_DATA)
    assert everything(run) == before


def test_what_is_being_read_stays(bucket, run):
    with kept_while_read(run, CheckpointRef(1, 32)):
        succeeded(prune(bucket))
        assert committed_images(run) == [32, 64, 80]
    # One that was killed, and one that nobody can read, hold nothing for ever.
    said_to_read(run, CheckpointRef(1, 32), until=1.0)
    run.create("reading/000001-000000000032-0.json", b"{}")
    assert being_read(run) == set()
    succeeded(prune(bucket))
    assert committed_images(run) == [64, 80]


def test_leftovers_of_ended_attempts_go(bucket, run):
    def orphans_of(fence: int) -> set[str]:
        place = f"{fence:06d}-000000000099"
        tensors = f"checkpoints/{place}/model-00.safetensors", f"snapshots/{place}/ema-0.1-00.safetensors"
        return {*tensors, f"metrics/{place}.jsonl"}

    def named(*words: object) -> set[str]:
        return {line.split()[0] for line in succeeded(prune(bucket, *words)).splitlines() if "left behind" in line}

    of_the_last_attempt = run.read(LEASE_KEY).data
    succeeded(prune(bucket))
    there, killed = everything(run).keys(), said_to_read(run, CheckpointRef(2, 64), until=1.0)
    anyway = orphans_of(1) | {"probe/0123"}
    pieces = {f"{BATCH}/piece-00000.tar", f"{BATCH}/piece-00001/000000000.png"}
    kept = {f"{BATCH}/piece-00002.tar", f"{BATCH}/pieces/00002.json"}
    for key in anyway | orphans_of(FENCE) | pieces | kept:
        run.create(key, b"half")
    unlocked = Path(run.uri) / "checkpoints/000001-000000000099/.tmp-0123456789abcdef"
    unlocked.write_bytes(b"half a checkpoint")
    # A prune may have taken the lease of an attempt that is only suspended, and gave it back.
    assert named("--dry-run") == anyway | {killed} | pieces
    run.put(LEASE_KEY, of_the_last_attempt)
    # Who knows whether its holder lives? And whoever reads may be making these very pieces.
    unreleased = damaged(run, LEASE_KEY, lambda data: data.replace(b"true", b"false"))
    with unreleased, kept_while_read(run, CheckpointRef(2, 80)):
        assert named("--dry-run") == anyway | {killed}
    assert unlocked.exists()
    assert named("--dry-run") == named() == anyway | {killed} | orphans_of(FENCE) | pieces
    assert everything(run).keys() == there | kept
    assert not unlocked.parent.exists()


def test_a_piece_in_use_stays(bucket, run, monkeypatch):
    succeeded(prune(bucket))
    for number in range(4):
        run.create(f"{BATCH}/piece-{number:05d}.tar", b"1")
    delete_one = LocalStore.delete

    def deleted_while_sampled(store: Store, key: str) -> None:
        if key.endswith("piece-00000.tar"):
            # A sampler has committed the next one since it was found, and another has begun.
            run.create(f"{BATCH}/pieces/00001.json", b"{}")
        if key.endswith("piece-00002.tar"):
            said_to_read(run, CheckpointRef(2, 80), until=time.time() + 99)
        delete_one(store, key)

    monkeypatch.setattr(LocalStore, "delete", deleted_while_sampled)
    succeeded(prune(bucket))
    names = [entry.key.rpartition("/")[2] for entry in run.list(BATCH)]
    assert names == ["piece-00001.tar", "piece-00003.tar", "00001.json"]


def test_a_run_in_use_stays(bucket, run, quick):
    before = everything(run)
    lease = taken(run, FENCE)
    try:
        assert f"process {ProcessIdentity.of_this_process().pid} on" in refused(prune(bucket), Exit.LOST_RUN)
        assert "which is alive" in refused(delete(bucket, "--yes"), Exit.LOST_RUN)
        succeeded(prune(bucket, "--dry-run"))
    finally:
        lease.close()
    with kept_while_read(run, CheckpointRef(1, 16)):
        assert "a process samples from" in refused(delete(bucket, "--yes"), Exit.LOST_RUN)
    assert everything(run) == before
    assert load_lease(run).released


@only_linux
def test_a_killed_sampler_holds_nothing(bucket, run):
    """On its own machine."""
    with subprocess.Popen(["sleep", "60"]) as child:
        here = ProcessIdentity.of_this_process()
        ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        process, until = here.model_copy(update={"pid": child.pid, "start_ticks": ticks}), time.time() + 3000
        said = Reader(checkpoint=CheckpointRef(2, 80).key, until=until, process=process)
        run.put(f"reading/{CheckpointRef(2, 80)}-{'1' * 32}.json", said.to_json())
        assert being_read(run) == {CheckpointRef(2, 80)}
        assert "or until" in refused(delete(bucket, "--yes"), Exit.LOST_RUN)
        child.kill()
    assert being_read(run) == set()
    run.create("checkpoints/999999-000000000000/MANIFEST.json", b"garbage")
    assert "999999" in refused(prune(bucket), Exit.BAD_DATA)
    succeeded(delete(bucket, "--yes"))


def test_a_deleted_run_begins_anew(bucket, run, tmp_path):
    before = everything(run)
    assert f"{len(before):,} objects" in refused(delete(bucket), Exit.BAD_REQUEST)
    assert everything(run) == before
    assert f"deleted {run.uri}: {len(before):,} objects" in succeeded(delete(bucket, "--yes"))
    assert [entry.key for entry in run.list()] == [LEASE_KEY]
    assert "r  " not in succeeded(ddpm_here("runs", "list", "--bucket", bucket))
    for verb in ("show", "verify", "delete"):
        line = refused(ddpm_here("runs", verb, "r", "--bucket", bucket), Exit.MISSING_INPUT)
        assert "there is no run 'r'" in line
    write_dataset(str(bucket), tmp_path)
    words = ("--dataset", "random", "--run", "r", "--bucket", bucket, "--epochs", 1)
    succeeded(ddpm_here("train", *words, *settings(), DDPM_CACHE=str(tmp_path)))
    assert {ref.fence for ref in list_checkpoints(run)} == {FENCE + 2}
    succeeded(ddpm_here("runs", "verify", "r", "--bucket", bucket))


def test_a_stopped_deletion_leaves_no_run(bucket, run, tmp_path, monkeypatch):
    write_dataset(str(bucket), tmp_path)
    total = len(everything(run))
    for leaves in (total - 1, total - 5, 1):
        stop = StopWhen(lambda leaves=leaves: len(everything(run)) == leaves)
        monkeypatch.setattr(stop, "install", lambda stop=stop: stop)
        with monkeypatch.context() as patch, pytest.raises(StoppedError, match="the same command goes on"):
            patch.setattr(upkeep, "Stop", lambda stop=stop: stop)
            upkeep.delete_run(str(bucket), "r", certain=True)
        assert len(everything(run)) == leaves
        train = ("train", "--dataset", "random", "--run", "r")
        for words in (("runs", "show", "r"), train, ("sample", "--run", "r")):
            said = refused(ddpm_here(*words, "--bucket", bucket), Exit.BAD_DATA)
            assert "config.yaml is missing" in said
            assert "ddpm runs delete r --yes" in said
        succeeded(ddpm_here("runs", "list", "--bucket", bucket))
    succeeded(delete(bucket, "--yes"))
    assert [entry.key for entry in run.list()] == [LEASE_KEY]


# --- the rules

EPOCHS = [48, 96, 144, 192]
BY_RULES = [
    ({"keep_last": 3}, [24, 48, 72, 96, 120, 144, 168], [48, 96, 144, 168]),
    ({"keep_last": 3}, [24, 48, 54, 60, 66, 72, 78, 84, 90], [48, 84, 90]),
    ({"keep_last": 3}, [6, 12, 18, 24], [18, 24]),
    ({"keep_last": 3}, [30, *EPOCHS], [96, 144, 192]),
    ({"keep_last": 2, "keep_epochs": (1,)}, [*EPOCHS, 198, 204, 210], [48, 144, 192, 204, 210]),
    ({"keep_last": 2, "every_epochs": 2}, [*EPOCHS, 240], [96, 192, 240]),
    ({"keep_last": 1}, [48, 54, 60], [48, 60]),
    ({"keep_last": 1}, [48, 54, 60, 96], [96]),
]
"""Settings, checkpoints by images seen, and those that stay."""


@pytest.mark.parametrize(("rules", "there", "stay"), BY_RULES)
def test_saves_in_between_displace_no_end_of_an_epoch(rules, there, stay):
    changes = {f"checkpoint__{key}": value for key, value in rules.items()}
    retention = Retention(small_config(train__batch_size=6, **changes), DATASET_IMAGES)
    refs = [CheckpointRef(1, images_seen) for images_seen in there]
    assert [ref.images_seen for ref in refs if ref not in retention.retire(refs)] == stay
    # One after another, too.
    kept = []
    for ref in refs:
        kept = [one for one in (*kept, ref) if one not in retention.retire([*kept, ref])]
    assert [ref.images_seen for ref in kept] == stay


def test_without_known_epochs_each_save_counts():
    refs = [CheckpointRef(1, images_seen) for images_seen in (6, 48, 54, 96)]
    retention = Retention(small_config(checkpoint__keep_last=3), MAX_IMAGES_SEEN + 1)
    assert retention.retire(refs) == refs[:1]

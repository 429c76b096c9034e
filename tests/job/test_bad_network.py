"""A whole day's work through a network where every tenth request goes wrong, and with a bucket that goes away."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ddpm.state import TrainState
from job.coordination import lease
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.exits import Exit
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.runs.writer import CheckpointWriter
from job.store import ConflictError, ObjectExistsError, Retry, Store, open_store, retry
from job.training.session import TrainingSession
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.command_line import ddpm_here, refused, settings, started, succeeded
from tests.job.launching import children
from tests.job.leases import eventually

SHARD_IMAGES = 24
EPOCHS = 4
MANY_EPOCHS = 100_000
KEPT_EPOCHS = 20
STEPS_WHILE_AWAY = 12
"""Four epochs, at the end of each of which a checkpoint is due."""
SETTINGS = settings(
    checkpoint__every_epochs="1",
    checkpoint__keep_last="2",
    checkpoint__keep_every_epochs="2",
    sample__every_epochs="2",
    train__batch_size="100",
    log__every_images="100",
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new one, so that everything is downloaded."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))


def patient(bucket: str) -> Store:
    """The bucket for the test's own eyes: a machine that is busy elsewhere takes longer than the short deadline."""
    return open_store(bucket, Retry(retry.AWAY_SECONDS))


def pack_tiles(bucket: Store, shard_images: int = SHARD_IMAGES) -> str:
    """Packs the embedded images as `tiles-16` in many shards, and returns the dataset's id."""
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    return pack(bucket, PackRequest(str(source), "tiles", size=16), shard_images=shard_images).dataset_id


def train_words(bucket: str, epochs: int) -> list[object]:
    return ["train", "--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs", epochs, *SETTINGS]


def train(bucket: str, epochs: int, **variables: str) -> str:
    return succeeded(ddpm_here(*train_words(bucket, epochs), **variables))


def learnt(run: Store) -> tuple[dict[str, str], list[dict[str, object]]]:
    """The hashes of the newest checkpoint's files, and its metrics without the clock."""
    manifest = load_manifest(run, max(list_checkpoints(run)))
    rows = read_rows(run, manifest.metrics, pytest.fail)
    measured = {"time", "images_per_second", "memory_bytes"}
    timeless = [{name: row[name] for name in row if name not in measured} for row in rows]
    return {file.name: file.sha256 for file in manifest.files}, timeless


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Store]:
    """The dataset's id and the run, as they are when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dataset_id = pack_tiles(open_store(str(folder)))
    train(str(folder), EPOCHS, DDPM_CACHE=str(folder / "cache"))
    return dataset_id, open_store(str(folder)).sub("runs/walk")


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs", "s3"], indirect=True)
def test_failing_requests_change_no_result(
    undisturbed: tuple[str, Store], proxy: FaultyProxy, remote_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointWriter.save

    def save_in_time(writer: CheckpointWriter, *words: Any) -> None:
        # A checkpoint that falls due while the one before waits for retries would take its place.
        writer.wait()
        save(writer, *words)

    monkeypatch.setattr(CheckpointWriter, "save", save_in_time)
    dataset_id, quiet = undisturbed
    proxy.rate = 0.1
    assert pack_tiles(patient(remote_bucket)) == dataset_id
    assert "every shard" in succeeded(ddpm_here("data", "verify", "tiles", "--bucket", remote_bucket))
    train(remote_bucket, EPOCHS // 2)
    train(remote_bucket, EPOCHS)
    words = ("--run", "walk", "--bucket", remote_bucket, "--checkpoints", "2,4", "--seeds", "0-3", "--no-nearest")
    pictures = succeeded(ddpm_here("sample", *words)).splitlines()
    proxy.rate = 0.0
    run = patient(remote_bucket).sub("runs/walk")
    assert learnt(run) == learnt(quiet)
    assert [ref.images_seen for ref in list_checkpoints(run)] == [ref.images_seen for ref in list_checkpoints(quiet)]
    assert len(pictures) == 3
    assert {entry.key for entry in quiet.list("samples")} <= {entry.key for entry in run.list("samples")}
    assert set(proxy.injected) == set(Fault)
    assert proxy.injected.total() > 0.05 * proxy.requests.total()


def newest(run: Store) -> int:
    return max((ref.images_seen for ref in list_checkpoints(run)), default=0)


def meanwhile(work: Callable[[], None]) -> threading.Thread:
    """Does `work` beside a command in this process, and then stops that as a preemption would, whatever came of it."""

    def stop_at_last() -> None:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_at_last, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_training_goes_on_without_the_bucket(
    proxy: FaultyProxy, remote_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_tiles(patient(remote_bucket))
    run = patient(remote_bucket).sub("runs/walk")
    away, steps = [0.0, 0.0], list[int]()
    after_step = TrainingSession.after_step

    def noted(session: TrainingSession, state: TrainState) -> bool:
        steps.append(state.images_seen)
        return after_step(session, state)

    monkeypatch.setattr(TrainingSession, "after_step", noted)

    def go_away() -> None:
        eventually(lambda: newest(run) > 0, 60)
        with proxy.away():
            away[0], before = time.time(), len(steps)
            time.sleep(60)
            # A machine that is busy elsewhere gets more time; training that stands still gets it in vain.
            eventually(lambda: len(steps) >= before + STEPS_WHILE_AWAY, 60)
            away[1] = time.time()
        before = newest(run)
        eventually(lambda: newest(run) > before, 60)

    beside = meanwhile(go_away)
    more = ("--set", f"checkpoint.keep_every_epochs={KEPT_EPOCHS}", "--set", "sample.every_epochs=10")
    done = ddpm_here(*train_words(remote_bucket, MANY_EPOCHS), *more)
    beside.join()
    assert done.returncode == Exit.STOPPED, done.stderr
    assert done.stderr.count("trying again for up to") == done.stderr.count("the bucket is back after") >= 1

    rows = read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
    while_away = [row["images_seen"] for row in rows if away[0] < row["time"] < away[1]]
    assert len(while_away) >= STEPS_WHILE_AWAY - 1
    # Nothing is missing: no row of the metrics, no checkpoint that is kept for good, no picture, not the last step.
    assert [row["images_seen"] for row in rows] == [*range(100, newest(run) + 1, 100)]
    epochs = newest(run) // 299
    kept = {ref.images_seen for ref in list_checkpoints(run)}
    assert {-(-299 * epoch // 100) * 100 for epoch in range(KEPT_EPOCHS, epochs + 1, KEPT_EPOCHS)} <= kept
    pictures = {entry.key for entry in run.list("samples")}
    assert {f"epoch-{epoch:04d}" for epoch in range(10, epochs, 10)} <= {key[8:18] for key in pictures}


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_a_long_outage_ends_training(proxy: FaultyProxy, remote_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_tiles(patient(remote_bucket))
    run = patient(remote_bucket).sub("runs/walk")

    def go_away() -> None:
        eventually(lambda: newest(run) > 0, 60)
        proxy.refuse()

    beside = threading.Thread(target=go_away)
    beside.start()
    done = ddpm_here(*train_words(remote_bucket, MANY_EPOCHS), DDPM_AWAY_SECONDS="3")
    beside.join()
    assert "trying again for up to 3 s" in done.stderr
    line = refused(done, Exit.BUCKET_AWAY)
    assert f"ddpm: {remote_bucket}/runs/walk" in line
    assert "Connection refused" in line
    assert "s in all)" in line

    proxy.come_back()
    # That process is this one, and lives: its lease has to expire.
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 2.0)
    saved = newest(run)
    beside = meanwhile(lambda: eventually(lambda: newest(run) > saved, 60))
    done = ddpm_here(*train_words(remote_bucket, MANY_EPOCHS))
    beside.join()
    assert done.returncode == Exit.STOPPED, done.stderr
    assert max(list_checkpoints(run)).fence == 2


@pytest.mark.slow
@pytest.mark.parametrize(("remote_bucket", "processes"), [("gs", 1), ("s3", 2)], indirect=["remote_bucket"])
def test_a_preemption_in_an_outage_ends(proxy: FaultyProxy, remote_bucket: str, processes: int) -> None:
    pack_tiles(patient(remote_bucket))
    run = patient(remote_bucket).sub("runs/walk")
    child = started(*train_words(remote_bucket, MANY_EPOCHS), "--processes", processes, DDPM_GRACE_SECONDS="6")
    eventually(lambda: newest(run) > 0, 120)
    proxy.hang()
    time.sleep(1)
    child.terminate()
    said, _ = child.communicate(timeout=60)
    assert child.returncode == Exit.BUCKET_AWAY, said
    assert "Traceback" not in said
    assert f"{remote_bucket}/runs/walk did not take the last checkpoint in the 6 s (DDPM_GRACE_SECONDS)" in said
    proxy.come_back()
    assert "is finished" in train(remote_bucket, 1)


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)
def test_waiting_for_a_checkpoint_is_alive(proxy: FaultyProxy, remote_bucket: str) -> None:
    pack_tiles(patient(remote_bucket))
    train(remote_bucket, 1)
    proxy.inject(Fault.UNAVAILABLE, r"^GET [^\n]*safetensors", times=10_000)
    child = started(*train_words(remote_bucket, 2), "--hang-after", "12")
    eventually(lambda: proxy.injected[Fault.UNAVAILABLE] > 0, 60)
    time.sleep(26)
    assert child.poll() is None
    proxy.forget()
    said, _ = child.communicate(timeout=120)
    assert child.returncode == Exit.FINISHED, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remote_bucket", "processes", "told"),
    [("gs", 2, "a rank"), ("s3", 1, "launcher")],
    indirect=["remote_bucket"],
)
def test_a_preemption_without_images_saves(proxy: FaultyProxy, remote_bucket: str, processes: int, told: str) -> None:
    """One process may have the images of the next step and the other not: none begins it, and all save."""
    pack_tiles(patient(remote_bucket), shard_images=SHARD_IMAGES // 3)
    run = patient(remote_bucket).sub("runs/walk")
    cache = settings(data__cache_gigabytes=str(3 * 60_000 / 1e9), data__shuffle_block_images="32")
    more = settings(train__batch_size="8", sample__every_epochs="0")
    child = started(*train_words(remote_bucket, MANY_EPOCHS), *cache, *more, "--processes", processes)
    eventually(lambda: newest(run) > 0, 120)
    proxy.inject(Fault.SILENCE, r"^GET [^\n]*shard-", times=1000)
    eventually(lambda: proxy.injected[Fault.SILENCE] > 0, 60)
    # The steps whose images are here are done meanwhile, and their checkpoints have arrived.
    time.sleep(5)
    before = newest(run)
    os.kill(child.pid if told == "launcher" else max(children(child.pid)), signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == Exit.STOPPED, said
    assert newest(run) > before
    assert f"after {newest(run):,} images; everything is saved" in said


def test_a_lost_answer_is_no_conflict(proxy: FaultyProxy, remote_bucket: str, tmp_path: Path) -> None:
    store = open_store(remote_bucket)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(secrets.token_bytes(1000))
    large.write_bytes(secrets.token_bytes(9 << 20))

    def losing(pattern: str, work: Callable[[], object]) -> object:
        proxy.injected.clear()
        proxy.inject(Fault.LOST_ANSWER, pattern)
        result = work()
        assert proxy.injected.total() == 1
        return result

    write = "^(POST /upload|PUT)"
    version = losing(write, lambda: store.create("key", b"mine"))
    assert store.read("key").version == version
    with pytest.raises(ObjectExistsError):
        losing(write, lambda: store.create("key", b"theirs"))
    newer = losing(write, lambda: store.replace("key", b"newer", str(version)))
    assert (store.read("key").data, store.read("key").version) == (b"newer", newer)
    with pytest.raises(ConflictError):
        losing(write, lambda: store.replace("key", b"newest", str(version)))
    losing(write, lambda: store.put("put", b"1"))
    losing(write, lambda: store.upload(small, "small"))
    losing(write, lambda: store.upload(large, "large"))
    store.download("large", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == large.read_bytes()
    large.write_bytes(small.read_bytes()[::-1])
    with pytest.raises(ObjectExistsError):
        losing(write, lambda: store.upload(large, "small"))
    # The client of az:// sends a deletion as a batch of one.
    deletion = "^(DELETE|POST .*comp=batch)"
    losing(deletion, lambda: store.delete("key"))
    assert not store.exists("key")
    losing(deletion, lambda: store.delete("key"))

"""Training through a bad network: every tenth request goes wrong, the bucket goes away, images do not come."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from job.coordination import lease
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.exits import BucketAwayError, Exit, StoppedError
from job.plan import plan_run
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.runs.writer import CheckpointWriter
from job.store import ConflictError, ObjectExistsError, Retry, open_store, retry
from job.training import session
from job.training.session import TrainingSession, run_training
from tests.faulty_proxy import Fault
from tests.job.command_line import NETWORK, ddpm_here, ran, refused, settings, started, succeeded
from tests.job.launching import StopWhen, children, eventually
from tests.job.packing import FILES
from tests.job.some_images import zip_of

EPOCHS, MANY_EPOCHS = 4, 100_000
KEPT = {"checkpoint__every_epochs": "1", "checkpoint__keep_last": "2", "checkpoint__keep_every_epochs": "2"}
# Every hour as well: a slow machine would otherwise save more often.
SETTINGS = settings(
    **KEPT, checkpoint__every_minutes="60", sample__every_epochs="2", train__batch_size="20", log__every_images="20"
)
"""An epoch of 60 images has three steps; a checkpoint is due at its end."""
on_gs = pytest.mark.parametrize("remote_bucket", ["gs"], indirect=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A new one, so that everything is downloaded."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))


def patient(bucket):
    """The bucket for the test's own eyes: a machine that is busy elsewhere takes longer than the short deadline."""
    return open_store(bucket, Retry(retry.AWAY_SECONDS))


def pack_few(bucket, images=None, shard_images=12):
    """Packs 60 images, or an archive, in small shards; the dataset's id, and the folder of the run to come."""
    with TemporaryDirectory() as folder:
        source, store = images or zip_of(Path(folder, "pets.zip"), FILES), patient(bucket)
        packed = pack(store, PackRequest(str(source), "few", size=16), shard_images=shard_images)
    return packed.dataset_id, store.sub("runs/walk")


def train_words(bucket, epochs, *more):
    place = ("--dataset", "few", "--run", "walk", "--bucket", bucket)
    return ["train", *place, "--epochs", epochs, *SETTINGS, *(word for key in more for word in ("--set", key))]


def train(bucket, epochs, *more, **variables):
    done = ddpm_here(*train_words(bucket, epochs, *more), **variables)
    assert "is finished" in succeeded(done)
    return done.stderr


def saved(run):
    return [ref.images_seen for ref in list_checkpoints(run)]


def learnt(run):
    """The hashes of the newest checkpoint's files, and its metrics without the clock."""
    manifest = load_manifest(run, max(list_checkpoints(run)))
    rows = read_rows(run, manifest.metrics, pytest.fail)
    measured = {"time", "images_per_second", "memory_bytes"}
    timeless = [{name: row[name] for name in row if name not in measured} for row in rows]
    return {file.name: file.sha256 for file in manifest.files}, timeless


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The dataset's id and the run, as they are when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    packed = pack_few(str(folder))
    train(str(folder), EPOCHS, DDPM_CACHE=str(folder / "cache"))
    return packed


@pytest.mark.slow
@pytest.mark.parametrize("remote_bucket", ["gs", "s3"], indirect=True)
def test_failing_requests_change_no_result(undisturbed, proxy, remote_bucket, monkeypatch):
    save = CheckpointWriter.save

    def save_in_time(writer, *words):
        # A checkpoint that falls due while the one before waits for retries would take its place.
        writer.wait()
        save(writer, *words)

    monkeypatch.setattr(CheckpointWriter, "save", save_in_time)
    dataset_id, quiet = undisturbed
    proxy.rate = 0.1
    packed, run = pack_few(remote_bucket)
    assert packed == dataset_id
    assert "every shard" in ran("data", "verify", "few", "--bucket", remote_bucket)
    train(remote_bucket, EPOCHS // 2)
    train(remote_bucket, EPOCHS)
    words = ("--run", "walk", "--bucket", remote_bucket, "--checkpoints", "2,4", "--seeds", "0-3", "--no-nearest")
    pictures = ran("sample", *words).splitlines()
    proxy.rate = 0.0
    assert learnt(run) == learnt(quiet)
    assert saved(run) == saved(quiet)
    assert len(pictures) == 3
    assert {entry.key for entry in quiet.list("samples")} <= {entry.key for entry in run.list("samples")}
    assert set(proxy.injected) == set(Fault)
    assert proxy.injected.total() > 0.05 * proxy.requests.total()


Steps = dict[int, Callable[[], object]]


@pytest.fixture
def at_step(monkeypatch):
    """By step: what happens after it in this process, before the program asks what falls due.

    So an outage begins and ends between the same steps, however busy the machine is.
    """
    steps, after_step = Steps(), TrainingSession.after_step

    def noted(session, state):
        steps.pop(state.images_seen // 20, bool)()
        return after_step(session, state)

    monkeypatch.setattr(TrainingSession, "after_step", noted)
    return steps


@pytest.mark.slow
@on_gs
def test_training_goes_on_without_the_bucket(proxy, remote_bucket, monkeypatch, at_step):
    """From epoch 2 on; the checkpoint of epoch 4 is kept for good, so that the next one waits for the bucket."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "RETRY_SECONDS", 0.5)
    _, run = pack_few(remote_bucket)

    def come_back():
        notes = ("trying again for up to", "could not renew")
        eventually(lambda: all(note in sys.stderr.getvalue() for note in notes))
        threading.Timer(1, proxy.come_back).start()

    at_step[4] = lambda: eventually(lambda: saved(run)) and proxy.refuse()
    at_step[15] = come_back
    # Training that stands still in the outage ends with it, as a failure.
    said = train(remote_bucket, 6, "checkpoint.keep_every_epochs=4", DDPM_AWAY_SECONDS="200")
    assert not at_step
    assert said.count("trying again for up to") == said.count("the bucket is back after") >= 1
    # Nothing is missing: no row of the metrics, no checkpoint that is kept for good, no picture, not the last step.
    rows = read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
    assert [row["images_seen"] for row in rows] == [*range(20, 361, 20)]
    assert {240, 360} <= set(saved(run))
    pictures = {entry.key[8:18] for entry in run.list("samples")}
    assert {"epoch-0002", "epoch-0004", "epoch-0006"} <= pictures


@pytest.mark.slow
@on_gs
def test_a_long_outage_ends_training(proxy, remote_bucket, monkeypatch, at_step):
    monkeypatch.setattr(lease, "RETRY_SECONDS", 0.5)
    _, run = pack_few(remote_bucket)
    at_step[4] = lambda: eventually(lambda: saved(run)) and proxy.refuse()
    done = ddpm_here(*train_words(remote_bucket, MANY_EPOCHS), DDPM_AWAY_SECONDS="6")
    assert "trying again for up to 6 s" in done.stderr
    line = refused(done, Exit.BUCKET_AWAY)
    assert all(part in line for part in (f"ddpm: {remote_bucket}/runs/walk", "Connection refused", "s in all)"))

    proxy.come_back()
    # That process is this one, and lives: its lease has to expire.
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 2.0)
    train(remote_bucket, EPOCHS)
    assert (max(list_checkpoints(run)).fence, max(saved(run))) == (2, 240)


@pytest.mark.slow
@pytest.mark.parametrize(("remote_bucket", "processes"), [("gs", 1), ("s3", 2)], indirect=["remote_bucket"])
def test_a_preemption_in_an_outage_ends(proxy, remote_bucket, processes):
    _, run = pack_few(remote_bucket)
    # Without pictures: a stop during one comes when all is saved, if its step's checkpoint arrived before the outage.
    words = train_words(remote_bucket, MANY_EPOCHS, "sample.every_epochs=0")
    child = started(*words, "--processes", processes, DDPM_GRACE_SECONDS="6")
    eventually(lambda: saved(run), 120)
    proxy.inject(Fault.SILENCE, r"^(POST|PUT) [\s\S]*safetensors", times=1000)
    eventually(lambda: proxy.injected[Fault.SILENCE])
    proxy.hang()
    child.terminate()
    said, _ = child.communicate(timeout=60)
    assert child.returncode == Exit.BUCKET_AWAY, said
    assert "Traceback" not in said
    assert f"{remote_bucket}/runs/walk did not take the last checkpoint in the 6 s (DDPM_GRACE_SECONDS)" in said
    proxy.forget()
    proxy.come_back()
    train(remote_bucket, 1)


@pytest.mark.slow
@on_gs
def test_waiting_for_a_checkpoint_is_alive(proxy, remote_bucket, monkeypatch):
    """The launcher, which ends a silent process, hears of this one."""
    pack_few(remote_bucket)
    train(remote_bucket, 1)
    proxy.inject(Fault.UNAVAILABLE, r"^GET [^\n]*safetensors", times=10_000)
    heard, place = set[float](), memoryview(bytearray(8)).cast("d")
    monkeypatch.setattr("job.stop._own_beat", place)

    def listen():
        eventually(lambda: proxy.injected[Fault.UNAVAILABLE] > 2)
        heard.clear()
        eventually(lambda: heard.add(place[0]) or len(heard) > 9, 30)
        proxy.forget()

    beside = threading.Thread(target=listen)
    beside.start()
    train(remote_bucket, 2)
    beside.join()
    assert len(heard) > 9


@pytest.mark.slow
@pytest.mark.parametrize(("remote_bucket", "processes"), [("gs", 2), ("s3", 1)], indirect=["remote_bucket"])
def test_a_preemption_without_images_saves(proxy, remote_bucket, processes):
    """One process may have the images of the next step and the other not: none begins it, and all save."""
    _, run = pack_few(remote_bucket, resources.files("job") / "datasets/landscape-sample.zip", shard_images=8)
    # Not all shards fit into the cache, and only the first epoch ends with a checkpoint.
    keys = "data.cache_gigabytes=0.00018 data.shuffle_block_images=32 train.batch_size=8 sample.every_epochs=0"
    keys += " checkpoint.every_epochs=100000 checkpoint.keep_every_epochs=0 checkpoint.keep_epochs=1"
    child = started(*train_words(remote_bucket, MANY_EPOCHS, *keys.split()), "--processes", processes)
    eventually(lambda: saved(run) or child.poll() is not None, 120)
    (before,) = saved(run)
    proxy.inject(Fault.SILENCE, r"^GET [^\n]*shard-", times=1000)
    eventually(lambda: proxy.injected[Fault.SILENCE])
    # The steps whose images are here are done meanwhile.
    time.sleep(3)
    # One is told to its launcher, the other to the second rank alone.
    os.kill(child.pid if processes == 1 else max(children(child.pid)), signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == Exit.STOPPED, said
    assert (newest := max(saved(run))) > before
    assert f"after {newest:,} images; everything is saved" in said


@pytest.mark.slow
def test_images_that_do_not_come(tiles, tmp_path, monkeypatch):
    """Checkpoints come before the wait for a shard, and a stop does not wait for it."""
    opened, lacking, going_on = session.open_cache, threading.Event(), threading.Event()
    batches = iter([13, 12])

    class Lacking:
        """The run's cache, whose shards stop coming after an epoch, and fail when `going_on` is set."""

        def __init__(self, cache):
            self._cache, self._batches = cache, next(batches)
            self.index, self.prefetch, self.labels = cache.index, cache.prefetch, cache.labels

        def read(self, indices, out):
            self._batches -= 1
            if self._batches < 0:
                lacking.set()
                going_on.wait(60)
                raise BucketAwayError("the shard's bucket is away")
            return self._cache.read(indices, out)

    monkeypatch.setattr(session, "open_cache", lambda *words: Lacking(opened(*words)))
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    sets = [f"{key}={value}" for key, value in NETWORK.items()]
    sets += ["checkpoint.every_epochs=1", "checkpoint.every_minutes=60", "sample.every_epochs=0"]
    plan = plan_run(TrainRequest("tiles", bucket=str(bucket), run="walk", epochs=3, sets=tuple(sets)).check())
    arrived = list[int]()

    def watch():
        lacking.wait(60)
        arrived.extend(eventually(lambda: saved(plan.run)))
        going_on.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(BucketAwayError, match="the shard's bucket is away"):
        run_training(plan.request)
    watcher.join()
    assert arrived == saved(plan.run) == [312]
    assert lease.load_lease(plan.run).released

    lacking.clear()
    going_on.clear()
    with pytest.raises(StoppedError, match="everything is saved"):
        run_training(plan.request, StopWhen(lambda: lacking.is_set() and len(saved(plan.run)) == 2))
    assert saved(plan.run) == [312, 600]

    # The reader is waited for, but not for ever.
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    assert readers()
    going_on.set()
    eventually(lambda: not readers())


def test_a_lost_answer_is_no_conflict(proxy, remote_bucket, tmp_path):
    store = open_store(remote_bucket)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(secrets.token_bytes(1000))
    large.write_bytes(secrets.token_bytes(9 << 20))

    def losing(work: Callable[..., Any], *words: object, pattern: str = "^(POST /upload|PUT)"):
        proxy.injected.clear()
        proxy.inject(Fault.LOST_ANSWER, pattern)
        result = work(*words)
        assert proxy.injected.total() == 1
        return result

    version = losing(store.create, "key", b"mine")
    assert store.read("key").version == version
    with pytest.raises(ObjectExistsError):
        losing(store.create, "key", b"theirs")
    newer = losing(store.replace, "key", b"newer", version)
    assert (store.read("key").data, store.read("key").version) == (b"newer", newer)
    with pytest.raises(ConflictError):
        losing(store.replace, "key", b"newest", version)
    losing(store.put, "put", b"1")
    losing(store.upload, small, "small")
    losing(store.upload, large, "large")
    store.download("large", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == large.read_bytes()
    large.write_bytes(small.read_bytes()[::-1])
    with pytest.raises(ObjectExistsError):
        losing(store.upload, large, "small")
    # The client of az:// sends a deletion as a batch of one.
    losing(store.delete, "key", pattern="^(DELETE|POST .*comp=batch)")
    assert not store.exists("key")
    losing(store.delete, "key", pattern="^(DELETE|POST .*comp=batch)")

"""The thread that commits checkpoints, before a real bucket server that goes away, keeps silent and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from job.exits import BucketAwayError, LostRunError
from job.runs.checkpoints import CheckpointRef, Manifest, list_checkpoints, opened
from job.runs.saving import CheckpointWriter, Save
from job.store import Retry, Store, open_store, retry
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.leases import eventually
from tests.job.runs.test_checkpoints import manifest
from tests.job.stops import StopWhen


@pytest.fixture
def proxy(gcs_server: str, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(retry, "SILENCE_SECONDS", 0.5)
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def run(proxy: FaultyProxy, gcs_bucket: str) -> Store:
    return open_store(gcs_bucket, Retry(60)).sub("runs/r")


Writers = Callable[..., CheckpointWriter]


@pytest.fixture
def tensor() -> torch.Tensor:
    """What is trained here: counts the steps."""
    return torch.zeros(1000)


@pytest.fixture
def started(run: Store, tensor: torch.Tensor) -> Iterator[Writers]:
    """Starts a writer of `tensor`, which tries again for `limit_seconds`."""
    writers: list[CheckpointWriter] = []

    def started(limit_seconds: float = 60, **options) -> CheckpointWriter:
        patient_run = run.within(limit_seconds)
        writers.append(CheckpointWriter(patient_run, {"model": {"w": tensor}}, **options))
        return writers[-1]

    yield started
    for writer in writers:
        if not writer.failed:
            writer.close(at_most_seconds=0)


def save_of(images_seen: int, **options) -> Save:
    objects = {f"metrics/{images_seen}.jsonl": str(images_seen).encode()}
    return Save(manifest(1, images_seen), objects, **options)


def train_and_save(writer: CheckpointWriter, tensor: torch.Tensor, images_seen: int, **options) -> None:
    tensor.fill_(images_seen)
    assert writer.save(save_of(images_seen, **options))


def wait_until_it_commits(writer: CheckpointWriter) -> None:
    """Until the checkpoint that was queued is on its way, so that its values are in files and the place is free."""
    eventually(lambda: writer._committing and writer._queued is None and not writer._reading_host)


def committed(run: Store) -> dict[int, float]:
    """The checkpoints, and the value that each holds."""
    found = {}
    for ref in list_checkpoints(run):
        target = torch.zeros(1000)
        with opened(run, ref, ("model",)) as restored:
            restored.copy_into({"model": {"w": target}})
        assert target.unique().numel() == 1
        found[ref.images_seen] = float(target[0])
    return found


def test_the_newest_stands_in_for_others_and_carries_their_small_objects(
    proxy: FaultyProxy, run: Store, tensor: torch.Tensor, started: Writers
) -> None:
    writer = started()
    with proxy.away():
        train_and_save(writer, tensor, 10)
        wait_until_it_commits(writer)
        for images_seen in (20, 30, 40):
            train_and_save(writer, tensor, images_seen)
        assert writer.busy
    tensor.fill_(-1)
    assert writer.wait()
    assert committed(run) == {10: 10, 40: 40}
    for images_seen in (10, 20, 30, 40):
        assert run.read(f"metrics/{images_seen}.jsonl").data == str(images_seen).encode()


def test_nothing_stands_in_for_what_is_kept_for_good(
    proxy: FaultyProxy, run: Store, tensor: torch.Tensor, started: Writers
) -> None:
    writer = started()
    stop = StopWhen(grace_seconds=1.0)
    with proxy.away():
        train_and_save(writer, tensor, 10)
        wait_until_it_commits(writer)
        train_and_save(writer, tensor, 20, irreplaceable=True)
        stop.request("a test")
        assert not writer.save(save_of(30), stop)
        assert stop.asked > 2, "waiting must not be taken for hanging"
    train_and_save(writer, tensor, 40)
    assert writer.wait()
    assert committed(run) == {10: 10, 20: 20, 40: 40}


def test_closing_does_not_wait_for_a_bucket_that_keeps_silent(
    proxy: FaultyProxy, gcs_bucket: str, tensor: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    patient_run = open_store(gcs_bucket, Retry(60)).sub("runs/r")
    writer = CheckpointWriter(patient_run, {"model": {"w": tensor}})
    proxy.hang()
    assert writer.save(save_of(10))
    wait_until_it_commits(writer)
    assert list(tmp_path.iterdir())
    began, stop = time.monotonic(), StopWhen()
    writer.close(stop, 1.0)
    assert time.monotonic() - began < 5
    assert stop.asked > 2
    assert list(tmp_path.iterdir()) == [], "the files of a checkpoint are left behind"
    # Its thread ends soon, though the request that is under way does not.
    writer._thread.join(20)
    assert not writer._thread.is_alive()
    proxy.come_back()
    assert list_checkpoints(patient_run) == []


def test_a_bucket_that_stays_away_is_told_by_every_call(
    proxy: FaultyProxy, tensor: torch.Tensor, started: Writers
) -> None:
    writer = started(limit_seconds=1)
    calls: list[Callable[[], object]] = [
        writer.wait,
        lambda: writer.save(save_of(20)),
        lambda: writer.put("samples/a.png", b"1"),
        writer.raise_error,
        writer.close,
    ]
    with proxy.away():
        train_and_save(writer, tensor, 10)
        eventually(lambda: writer.failed)
        for call in calls:
            with pytest.raises(BucketAwayError, match="in all"):
                call()
    assert not writer.busy or writer._queued is None


def test_the_lease_is_confirmed_again_after_an_outage(
    proxy: FaultyProxy, run: Store, tensor: torch.Tensor, started: Writers
) -> None:
    confirmed: list[bool] = []

    def confirm() -> None:
        # What the lease of another attempt would be: it came while the bucket was away.
        confirmed.append(True)
        if len(confirmed) == 3:
            raise LostRunError("another attempt holds the run")

    proxy.inject(Fault.UNAVAILABLE, "MANIFEST", times=100)
    writer = started(confirm=confirm)
    train_and_save(writer, tensor, 10)
    with pytest.raises(LostRunError):
        writer.wait()
    assert len(confirmed) == 3
    assert list_checkpoints(run) == []


def test_a_commit_whose_answer_is_lost_is_one_commit(
    proxy: FaultyProxy, run: Store, tensor: torch.Tensor, started: Writers
) -> None:
    after: list[Manifest] = []
    writer = started(after_commit=after.append)
    for fault in (Fault.LOST_ANSWER, Fault.SILENCE_MIDWAY, Fault.SHORT):
        proxy.inject(fault, "MANIFEST", times=2)
    train_and_save(writer, tensor, 10)
    writer.close()
    assert proxy.injected.total() == 6
    assert committed(run) == {10: 10}
    assert [manifest.ref for manifest in after] == [CheckpointRef(1, 10)]
    assert b"000001-000000000010" in run.read("LATEST").data


def test_pictures_wait_for_the_bucket_and_hold_up_nothing(
    proxy: FaultyProxy, run: Store, tensor: torch.Tensor, started: Writers
) -> None:
    writer = started()
    proxy.hang()
    writer.put("samples/a.png", b"old")
    eventually(lambda: proxy.requests["POST"])
    # The one before is on its way already.
    writer.put("samples/a.png", b"new")
    with proxy.away():
        writer.put("samples/b.png", b"b")
        train_and_save(writer, tensor, 10)
        assert not writer.wait(at_most_seconds=0)
        assert writer.busy
    assert writer.wait()
    assert (run.read("samples/a.png").data, run.read("samples/b.png").data) == (b"new", b"b")
    assert committed(run) == {10: 10}


def test_nobody_waits_for_retirement_but_the_end(run: Store, tensor: torch.Tensor, started: Writers) -> None:
    go_on, retired = threading.Event(), threading.Event()

    def retire(_: Manifest) -> None:
        assert go_on.wait(30)
        retired.set()

    writer = started(after_commit=retire)
    train_and_save(writer, tensor, 10)
    assert writer.wait()
    assert not retired.is_set()
    threading.Timer(0.3, go_on.set).start()
    writer.close()
    assert retired.is_set()

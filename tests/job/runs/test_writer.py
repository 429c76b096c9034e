"""The thread that commits checkpoints: in order, held up by nothing, and before a bucket that goes away."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from job.exits import BadDataError, BucketAwayError, LostRunError
from job.runs import writer as writer_module
from job.runs.checkpoints import list_checkpoints, load_manifest, opened
from job.runs.layout import CheckpointRef
from job.runs.metrics import read_rows
from job.runs.retention import reading
from job.runs.writer import CheckpointWriter, HostCopy, cadence_minutes, fits, measure_save_seconds, plan_parts
from job.stop import GRACE_VARIABLE, MARGIN_SECONDS, NEVER, Stop
from job.store import Retry, Store, open_store, retry
from job.store.local import LocalStore
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.command_line import ddpm, refused, settings, succeeded
from tests.job.hooked import hooked
from tests.job.leases import eventually
from tests.job.runs.held import held, live_tensors, write, writer_of
from tests.job.stops import StopWhen


class Watched(LocalStore):
    """A folder that keeps what happens to it in order; `hooks` are called before uploads and deletes, after creates."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        super().__init__(root)
        # Shared by the copies that `within` makes.
        self.events: list[str] = []
        self.hooks: dict[str, Callable[[str], object]] = {}

    def create(self, key: str, data: bytes) -> str:
        self.events.append(f"create {key}")
        version = super().create(key, data)
        self.hooks.get("create", str)(key)
        return version

    def upload(self, path: Path, key: str) -> None:
        self.hooks.get("upload", str)(key)
        super().upload(path, key)

    def delete(self, key: str) -> None:
        self.hooks.get("delete", str)(key)
        self.events.append(f"delete {key}")
        super().delete(key)

    def decisive(self) -> list[str]:
        return [event for event in self.events if event == "confirm" or event.endswith("MANIFEST.json")]


@pytest.fixture
def run(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "run")


def refusing(error: Exception) -> Callable[[str], None]:
    def refuse(key: str) -> None:
        raise error

    return refuse


def committed_images(run: Store) -> list[int]:
    return [ref.images_seen for ref in list_checkpoints(run)]


def save(writer: CheckpointWriter, *images_seen: int) -> None:
    """Saves with a row of the metrics each."""
    for images in images_seen:
        writer.rows.append({"images_seen": images, "loss": 0.5, "time": 0.0})
        writer.save(images, [[1.0, 2.0]])
        writer.wait()


def test_values_at_the_moment_of_save_are_written_though_training_goes_on(run):
    tensors = live_tensors()
    before = tensors["model"]["conv.bias"].clone()
    writer = writer_of(held(run), tensors)
    writer.save(80, [])
    tensors["model"]["conv.bias"].fill_(-1)
    writer.close(wait=True)
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors["model"].items()}}
    with opened(run, CheckpointRef(1, 80), ("model",)) as restored:
        restored.copy_into(target)
    assert torch.equal(target["model"]["conv.bias"], before)


def test_host_buffers_are_contiguous_and_filled_without_new_memory():
    tensors = live_tensors()
    copy = HostCopy(tensors)
    addresses = [t.data_ptr() for t in copy.host["model"].values()]
    copy.copy()
    assert [t.data_ptr() for t in copy.host["model"].values()] == addresses
    assert copy.host["model"]["conv.weight"].is_contiguous()
    assert torch.equal(copy.host["model"]["conv.weight"], tensors["model"]["conv.weight"])


def test_large_groups_are_cut_into_parts_and_come_back(run, monkeypatch):
    tensors = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(10)}, "ema": {"w": torch.ones(5)}}
    parts = plan_parts(tensors, part_bytes=12_000)
    assert [*parts] == [f"model-{i:02d}.safetensors" for i in range(4)] + ["ema-00.safetensors"]
    assert [name for held in parts.values() for name in held] == [*tensors["model"], "w"]
    monkeypatch.setattr(writer_module, "plan_parts", lambda host: plan_parts(host, 12_000))
    write(run, (1, 8), tensors=tensors)
    target = {"model": {n: torch.zeros_like(t) for n, t in tensors["model"].items()}}
    with opened(run, CheckpointRef(1, 8), ("model",)) as restored:
        assert len(restored.files["model"]) == 4
        restored.copy_into(target)
    assert all(torch.equal(target["model"][n], t) for n, t in tensors["model"].items())


def test_a_failed_save_is_raised_by_every_later_call_and_leaves_no_checkpoint(run):
    run.hooks["upload"] = refusing(BadDataError("the disk ate it"))
    writer = writer_of(held(run), live_tensors(), notes=[])
    writer.save(80, [])
    eventually(lambda: writer.troubled)
    for call in (
        writer.wait,
        writer.raise_trouble,
        lambda: writer.save(160, []),
        lambda: writer.put("samples/a.png", b"1", images_seen=80),
        lambda: writer.close(wait=True),
    ):
        with pytest.raises(BadDataError, match="ate it"):
            call()
    assert not list(run.list("checkpoints"))


def test_old_checkpoints_go_and_those_of_chosen_epochs_stay(run):
    holder = held(run, checkpoint__keep_last=1, checkpoint__keep_every_epochs=2)
    holder.lease.confirm = lambda: run.events.append("confirm")
    writer = writer_of(holder, live_tensors())
    save(writer, 24, 48, 72, 96, 120, 144)
    writer.close(wait=True)
    # Epoch 2 ends with image 96.
    assert committed_images(run) == [96, 144]
    newest = load_manifest(run, CheckpointRef(1, 144))
    assert [row["images_seen"] for row in read_rows(run, newest.metric_segments)] == [24, 48, 72, 96, 120, 144]
    # Nobody takes for whole what is being deleted, and no holder who is one no more commits or deletes.
    deleted = [event.split("/")[-1] for event in run.events if event.startswith("delete checkpoints/")]
    assert deleted == ["MANIFEST.json", *(f"{g}-00.safetensors" for g in ("ema", "model", "optimizer"))] * 4
    decisive = run.decisive()
    manifests = [number for number, event in enumerate(decisive) if event != "confirm"]
    assert len(manifests) == 6 + 4
    assert all(decisive[number - 1] == "confirm" for number in manifests)


def test_whoever_lost_the_run_deletes_nothing(run):
    holder = held(run, checkpoint__keep_last=1)
    writer = writer_of(holder, live_tensors())
    save(writer, 24)
    run.hooks["create"] = lambda key: setattr(holder.lease, "lost", key.endswith("48/MANIFEST.json"))
    writer.save(48, [])
    eventually(lambda: writer.troubled)
    with pytest.raises(LostRunError):
        writer.raise_trouble()
    assert committed_images(run) == [24, 48]


def test_a_checkpoint_that_is_being_read_stays_until_it_has_been_read(run):
    writer = writer_of(held(run, checkpoint__keep_last=1), live_tensors())
    save(writer, 24)
    with reading(run, CheckpointRef(1, 24)):
        save(writer, 48, 72)
        eventually(lambda: committed_images(run) == [24, 72])
    save(writer, 96)
    eventually(lambda: committed_images(run) == [96])
    writer.close(wait=True)


def test_what_dead_attempts_left_is_swept_and_nothing_else(run):
    write(run, (1, 24))
    kept = {
        # One of a later attempt, which may be alive for all this one knows.
        "checkpoints/000007-000000000048/model-00.safetensors",
        "checkpoints/of-a-person/notes.txt",
        "samples/epoch-0001.png",
        "samples/one/piece-00000.tar",
    }
    gone = {"checkpoints/000001-000000000048/model-00.safetensors", "metrics/000001-000000000048.jsonl"}
    for key in kept | gone:
        run.put(key, b"1")
    write(run, (2, 24))
    keys = {entry.key for entry in run.list()}
    assert committed_images(run) == [24, 24]
    assert kept <= keys
    assert not gone & keys


def test_a_bucket_that_cannot_delete_costs_space_and_no_work(run):
    notes = []
    writer = writer_of(held(run, checkpoint__keep_last=1), live_tensors(), notes=notes)
    save(writer, 24)
    run.hooks["delete"] = refusing(BucketAwayError("the bucket is away"))
    save(writer, 48)
    eventually(lambda: [note for note in notes if "stay for now: the bucket is away" in note])
    del run.hooks["delete"]
    assert committed_images(run) == [24, 48]
    save(writer, 72)
    writer.close(wait=True)
    assert committed_images(run) == [72]


def test_nobody_waits_for_retirement_but_the_end(run, monkeypatch):
    go_on, retired = threading.Event(), threading.Event()
    monkeypatch.setattr(CheckpointWriter, "_retire", lambda *_: go_on.wait(30) and retired.set())
    writer = writer_of(held(run), live_tensors())
    save(writer, 24)
    assert not retired.is_set()
    threading.Timer(0.3, go_on.set).start()
    writer.close(wait=True)
    assert retired.is_set()


# Before a real bucket server that goes away, keeps silent and comes back.


@pytest.fixture
def proxy(gcs_server: str, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(retry, "SILENCE_SECONDS", 0.5)
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def far(proxy: FaultyProxy, gcs_bucket: str) -> Store:
    return open_store(gcs_bucket, Retry(60)).sub("runs/r")


@pytest.fixture
def tensor() -> torch.Tensor:
    """What is trained here: counts the steps."""
    return torch.zeros(1000)


@pytest.fixture
def started(far: Store, tensor: torch.Tensor) -> Iterator[Callable[..., CheckpointWriter]]:
    """Starts a writer of `tensor`, which tries again for `limit_seconds`."""
    writers: list[CheckpointWriter] = []

    def started(limit_seconds: float = 60, stop: Stop = NEVER, **changes: object) -> CheckpointWriter:
        holder = held(far.within(limit_seconds), **changes)
        writers.append(writer_of(holder, {"model": {"w": tensor}}, stop, notes=[]))
        return writers[-1]

    yield started
    for writer in writers:
        if not writer.troubled:
            writer.close(wait=False)


def train_and_save(writer: CheckpointWriter, tensor: torch.Tensor, images_seen: int) -> None:
    tensor.fill_(images_seen)
    writer.rows.append({"images_seen": images_seen, "loss": 0.5, "time": 0.0})
    writer.save(images_seen, [])


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


def test_the_newest_stands_in_for_others_and_carries_their_metrics(proxy, far, tensor, started):
    writer = started()
    with proxy.away():
        train_and_save(writer, tensor, 24)
        wait_until_it_commits(writer)
        for images_seen in (48, 72, 96):
            train_and_save(writer, tensor, images_seen)
        assert not writer.overdue
    tensor.fill_(-1)
    writer.wait()
    assert committed(far) == {24: 24, 96: 96}
    rows = read_rows(far, load_manifest(far, max(list_checkpoints(far))).metric_segments)
    assert [row["images_seen"] for row in rows] == [24, 48, 72, 96]


def test_nothing_stands_in_for_what_is_kept_for_good(proxy, far, tensor, started):
    stop = StopWhen(grace_seconds=1.0)
    writer = started(stop=stop, checkpoint__keep_epochs=(1,))
    with proxy.away():
        train_and_save(writer, tensor, 24)
        wait_until_it_commits(writer)
        train_and_save(writer, tensor, 48)
        stop.request("a test")
        with pytest.raises(BucketAwayError, match="did not take the last checkpoint in the 1 s"):
            writer.save(72, [])
        assert stop.asked > 2, "waiting must not be taken for hanging"
    eventually(lambda: committed(far) == {24: 24, 48: 48})


def test_closing_does_not_wait_for_a_bucket_that_keeps_silent(proxy, far, tensor, started):
    stop = StopWhen(grace_seconds=1.0)
    writer = started(stop=stop)
    proxy.hang()
    train_and_save(writer, tensor, 24)
    wait_until_it_commits(writer)
    stop.request("a test")
    began = time.monotonic()
    writer.close(wait=True)
    assert time.monotonic() - began < 5
    # Its thread ends soon, though the request that is under way does not.
    writer._thread.join(20)
    assert not writer._thread.is_alive()
    proxy.come_back()
    assert list_checkpoints(far) == []


def test_a_bucket_that_stays_away_ends_it(proxy, tensor, started):
    writer = started(limit_seconds=1)
    with proxy.away():
        train_and_save(writer, tensor, 24)
        eventually(lambda: writer.troubled)
        with pytest.raises(BucketAwayError, match="in all"):
            writer.wait()


def test_the_lease_is_confirmed_again_after_an_outage(proxy, far, tensor, started):
    proxy.inject(Fault.UNAVAILABLE, "MANIFEST", times=100)
    writer = started()
    lease = writer._held.lease
    train_and_save(writer, tensor, 24)
    eventually(lambda: lease.confirmations >= 2)
    # Another attempt came while the bucket was away.
    lease.lost = True
    with pytest.raises(LostRunError):
        writer.wait()
    assert list_checkpoints(far) == []


def test_a_commit_whose_answer_is_lost_is_one_commit(proxy, far, tensor, started):
    writer = started()
    for fault in (Fault.LOST_ANSWER, Fault.SILENCE_MIDWAY, Fault.SHORT):
        proxy.inject(fault, "MANIFEST", times=2)
    train_and_save(writer, tensor, 24)
    writer.close(wait=True)
    assert proxy.injected.total() == 6
    assert committed(far) == {24: 24}
    assert b"000001-000000000024" in far.read("LATEST").data


def test_pictures_wait_for_the_bucket_and_hold_up_nothing(proxy, far, tensor, started):
    stop = StopWhen(grace_seconds=1.0)
    writer = started(stop=stop)
    proxy.hang()
    writer.put("samples/a.png", b"old", images_seen=24)
    eventually(lambda: proxy.connections)
    # The one before is on its way already.
    writer.put("samples/a.png", b"new", images_seen=24)
    with proxy.away():
        writer.put("samples/b.png", b"b", images_seen=24)
        train_and_save(writer, tensor, 24)
        assert writer._pictures
    writer.wait()
    assert (far.read("samples/a.png").data, far.read("samples/b.png").data) == (b"new", b"b")
    assert committed(far) == {24: 24}


# Whether a save fits between a preemption notice and the end, and what follows if not.


def test_the_time_of_a_save_follows_from_the_bucket_and_the_size(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writer_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(writer_module, "PROBE_BYTES", 100_000)

    def take(seconds: float) -> None:
        now[0] += seconds

    run.hooks = {"upload": lambda key: take(0.1 + 100_000 * 2e-6), "delete": lambda key: take(0.1)}
    # Three round trips, and 2 µs a byte.
    assert measure_save_seconds(run, 100_000) == pytest.approx(0.3 + 0.2)
    assert measure_save_seconds(run, 1_000_000) == pytest.approx(0.3 + 2.0)
    assert list(run.list()) == []


def test_what_fits_changes_nothing_and_what_does_not_is_saved_more_often(run, monkeypatch):
    assert fits(30 - MARGIN_SECONDS, 30)
    assert not fits(30 - MARGIN_SECONDS + 0.1, 30)
    assert cadence_minutes(10, save_seconds=5, grace_seconds=30) == 10
    # A tenth of the time may go into saving.
    assert cadence_minutes(10, save_seconds=40, grace_seconds=30) == pytest.approx(400 / 60)
    assert cadence_minutes(10, save_seconds=80, grace_seconds=30) == 10
    assert cadence_minutes(10, save_seconds=1, grace_seconds=2) == 1
    assert cadence_minutes(0.5, save_seconds=1, grace_seconds=2) == 0.5
    monkeypatch.setattr(writer_module, "SHORTEST_CADENCE_MINUTES", 0.0)
    monkeypatch.setattr(writer_module, "measure_save_seconds", lambda *_: 0.01)
    for grace_seconds in (30, 2):
        notes = []
        writer = writer_of(held(run, checkpoint__every_minutes=10), live_tensors(), Stop(grace_seconds), notes)
        save(writer, 24 if grace_seconds == 30 else 48)
        if grace_seconds == 2:
            eventually(lambda writer=writer: writer.overdue)
            assert "does not fit into the 2 s between a preemption notice and the end" in notes[0]
        else:
            assert (notes, writer.overdue) == ([], False)
        writer.close(wait=True)


@pytest.mark.slow
def test_a_person_is_warned_and_saving_follows(tmp_path):
    bucket = tmp_path / "bucket"
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", "16", "--bucket", bucket))
    # A minute is the shortest cadence that follows; a test has less time.
    hooks = hooked(tmp_path / "hooks", job__runs__writer="SHORTEST_CADENCE_MINUTES = 0.002")
    keep = {"checkpoint.every_minutes": 7, "checkpoint.every_epochs": 999}
    keep |= {"checkpoint.keep_last": 99, "checkpoint.keep_every_epochs": 0}
    rarely = [word for key, value in keep.items() for word in ("--set", f"{key}={value}")]
    found = {}
    for name, seconds in (("enough", 30), ("short", 2)):
        words = ("--dataset", "tiles", "--run", name, "--bucket", bucket, "--epochs", 5, *settings(), *rarely)
        variables = {"DDPM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": hooks, GRACE_VARIABLE: str(seconds)}
        done = ddpm("train", *words, **variables)
        succeeded(done)
        warnings = re.findall(r"a save takes about .*", done.stderr)
        found[name] = warnings, len(list_checkpoints(open_store(str(bucket)).sub(f"runs/{name}")))
    assert found["enough"] == ([], 1)
    (warning,), checkpoints = found["short"]
    assert re.fullmatch(
        r"a save takes about \d+\.\d s, which does not fit into the 2 s between a preemption notice and the end: "
        r"saving every 0\.\d instead of 7 minutes",
        warning,
    )
    assert checkpoints > 2
    line = refused(ddpm("train", *words, "--epochs", 9, **variables | {GRACE_VARIABLE: "soon"}), 64)
    assert f"{GRACE_VARIABLE}='soon': give the seconds between a preemption notice and the end, such as 30" in line

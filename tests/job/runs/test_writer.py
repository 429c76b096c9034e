"""The thread that commits checkpoints: in order, held up by nothing, and how often; and the metrics."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from job.coordination.sealed import MOMENT_FORMAT
from job.exits import BadDataError, BucketAwayError, LostRunError
from job.runs.checkpoints import list_checkpoints, load_manifest, newest_good, restore
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.metric_rows import read_rows
from job.runs.outlook import Cadence, best_interval_seconds, interval_seconds
from job.runs.records import LastStatus
from job.runs.retention import kept_while_read
from job.runs.writer import write_part
from job.stop import GRACE_VARIABLE, Stop
from job.store import Retry, open_store, retry
from job.store.local import LocalStore
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.command_line import ddpm_here, raised, settings, succeeded
from tests.job.launching import eventually, lasting
from tests.job.runs.leased import DATASET_IMAGES, committed_images, leased, save, writer_of

pytestmark = pytest.mark.usefixtures("notes")


class Watched(LocalStore):
    """A folder that keeps what happens to it in order; `hooks` are called before that, and after a creation."""

    def __init__(self, root):
        root.mkdir()
        super().__init__(root)
        # Shared by the copies that `within` makes.
        self.events, self.hooks, self.requests = [], {}, []

    def _attempt(self, work, key, *args):
        self.requests.append(key)
        return super()._attempt(work, key, *args)

    def create(self, key, data):
        self.events.append(f"create {key}")
        version = super().create(key, data)
        self.hooks.get("created", str)(key)
        return version

    def move(self, path, key, *, fresh=False):
        self.hooks.get("move", str)(key)
        super().move(path, key, fresh=fresh)

    def delete(self, key):
        self.hooks.get("delete", str)(key)
        self.events.append(f"delete {key}")
        super().delete(key)


@pytest.fixture
def run(tmp_path):
    return Watched(tmp_path / "run")


def test_checkpoints_hold_the_values_then(run, monkeypatch):
    tensors = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(10)}, "ema": {"w": torch.ones(5)}}
    monkeypatch.setattr("job.runs.writer.PART_BYTES", 12_000)
    writer = writer_of(leased(run), tensors)
    for images_seen in (8, 16):
        writer.save(images_seen, [])
        for tensor in tensors["model"].values():
            tensor.add_(-100)
    writer.close(wait=True)
    names = [file.name for file in load_manifest(run, CheckpointRef(1, 16)).files]
    assert names == [*(f"model-{i:02d}.safetensors" for i in range(4)), "ema-00.safetensors"]
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors["model"].items()}}
    restore(run, CheckpointRef(1, 16), target)
    assert [tensor.unique().tolist() for tensor in target["model"].values()] == [[i - 100.0] for i in range(10)]


def test_files_are_those_of_safetensors(tmp_path):
    tensors = {"b": torch.rand(7), "a": torch.arange(9).to(torch.uint8), "c": torch.rand(2, 3)}
    write_part(tmp_path / "file", "key", tensors)
    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_a_failed_save_is_raised_later(run):
    run.hooks["move"] = Mock(side_effect=BadDataError("the disk ate it"))
    writer = writer_of(leased(run))
    writer.save(80, [])
    eventually(lambda: writer.troubled)
    puts = partial(writer.put, "samples/a.png", b"1", images_seen=80)
    for call in (
        writer.wait,
        writer.raise_trouble,
        partial(writer.save, 160, []),
        puts,
        partial(writer.close, wait=True),
    ):
        raised(BadDataError, "ate it", call)
    assert not list(run.list("checkpoints"))


def test_old_checkpoints_and_leftovers_go(run):
    orphans = {"checkpoints/000001-000000000048/model-00.safetensors", "metrics/000001-000000000048.jsonl"}
    orphans.add("snapshots/000001-000000000048/ema-0.1-00.safetensors")
    # One of a later attempt, which may be alive for all this one knows.
    kept = {"checkpoints/000007-000000000048/model-00.safetensors", "checkpoints/of-a-person/notes.txt"}
    for key in orphans | kept:
        run.put(key, b"1")
    holder = leased(run, 2, checkpoint__keep_last=1, checkpoint__keep_every_epochs=2)
    holder.lease.confirm = lambda: run.events.append("confirm")
    writer = writer_of(holder)
    save(writer, 24, 48, 72)
    # One that somebody copied here is neither measured by nor touched.
    run.put(CheckpointRef(9, 16).manifest_key, b"{}")
    save(writer, 96, 120, 144)
    writer.close(wait=True)
    # Epoch 2 ends with image 96.
    assert list_checkpoints(run) == [CheckpointRef(2, 96), CheckpointRef(2, 144), CheckpointRef(9, 16)]
    newest = load_manifest(run, CheckpointRef(2, 144))
    assert [row["images_seen"] for row in read_rows(run, newest.metrics, pytest.fail)] == [24, 48, 72, 96, 120, 144]
    keys = {entry.key for entry in run.list()}
    assert (kept <= keys, orphans & keys) == (True, set())
    # Nobody takes for whole what is being deleted, and no holder who is one no more commits or deletes.
    deleted = [event.split("/")[-1] for event in run.events if event.startswith("delete checkpoints/000002")]
    assert deleted == ["MANIFEST.json", *(f"{g}-00.safetensors" for g in ("ema", "model", "optimizer"))] * 4
    decisive = [event for event in run.events if event == "confirm" or event.endswith("MANIFEST.json")]
    manifests = [number for number, event in enumerate(decisive) if event != "confirm"]
    assert len(manifests) == 6 + 4
    assert all(decisive[number - 1] == "confirm" for number in manifests)


@pytest.mark.slow
def test_a_checkpoint_in_use_stays(run, notes):
    # Each ends an epoch.
    writer = writer_of(leased(run, checkpoint__keep_last=1))
    save(writer, 48)
    with kept_while_read(run, CheckpointRef(1, 48)):
        save(writer, 96, 144)
        eventually(lambda: committed_images(run) == [48, 144] and not list(run.list(CheckpointRef(1, 96).key)))
    run.hooks["delete"] = Mock(side_effect=BucketAwayError("the bucket is away"))
    save(writer, 192)
    eventually(lambda: notes)
    assert ["stay for now: the bucket is away" in note for note in notes] == [True]
    notes.clear()
    del run.hooks["delete"]
    assert committed_images(run) == [48, 144, 192]
    save(writer, 240)
    writer.close(wait=True)
    assert committed_images(run) == [240]


def scalars(data):
    """Step, name and value of each that TensorBoard shows of its file: length, checksum, event, checksum, and so on."""
    shown = []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        if event.session_log.status == SessionLog.START:
            # It forgets what an attempt before has logged from here on (EventAccumulator, purge_orphaned_data).
            shown = [one for one in shown if one[0] < event.step]
        told = (value for value in event.summary.value if not value.tag.startswith("_hparams_"))
        shown += ((event.step, value.tag, value.simple_value) for value in told)
    return shown


def shown(run, metrics):
    """What TensorBoard shows of a checkpoint's metrics."""
    return scalars(b"".join(named.read(run) for named in metrics if "events" in named.key))


@pytest.mark.parametrize("changes", [{"checkpoint__keep_epochs": (1,)}, {"ema__stds": 0.1, "ema__snapshot_epochs": 1}])
def test_the_newest_replaces_queued_checkpoints(run, changes):
    go_on = threading.Event()
    run.hooks["move"] = lambda key: go_on.wait(30)
    writer = writer_of(leased(run, **changes))
    writer.save(24, [])
    eventually(lambda: writer._committing and not writer._reading_host)
    rows = [{"images_seen": images_seen, "time": 1.0, "loss": images_seen / 7} for images_seen in (30, 36, 48, 72)]
    for row in rows[:3]:
        writer.rows.append(row)
        writer.save(row["images_seen"], [])
    threading.Timer(0.3, go_on.set).start()
    writer.rows.append(rows[3])
    writer.save(72, [])
    writer.close(wait=True)
    created = [key for event, _, key in (event.partition(" ") for event in run.events) if event == "create"]
    committed = [CheckpointRef(1, images_seen).manifest_key for images_seen in (24, 48, 72)]
    assert [key for key in created if key.endswith("MANIFEST.json")] == committed
    # What they say of metrics is there, for people's tools as well.
    metrics = load_manifest(run, max(list_checkpoints(run))).metrics
    assert read_rows(run, metrics, pytest.fail) == rows
    assert shown(run, metrics) == [(row["images_seen"], "loss", pytest.approx(row["loss"])) for row in rows]


def test_only_the_end_waits_for_retirement(run):
    go_on = threading.Event()
    writer = writer_of(leased(run, checkpoint__keep_last=1))
    save(writer, 24)
    run.hooks["delete"] = lambda key: go_on.wait(30)
    save(writer, 48)
    assert committed_images(run) == [24, 48]
    threading.Timer(0.3, go_on.set).start()
    writer.close(wait=True)
    assert committed_images(run) == [48]


def test_an_outage_confirms_the_lease_again(gcs_server, gcs_bucket, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        run = open_store(gcs_bucket, Retry(60)).sub("runs/r")
        holder = leased(run)
        writer = writer_of(holder)
        proxy.inject(Fault.UNAVAILABLE, "MANIFEST", times=2)
        save(writer, 8)
        # A wait for the bucket would pass for the duration of a save.
        assert writer.cadence.save_seconds is None
        save(writer, 16)
        assert writer.cadence.save_seconds is not None
        proxy.inject(Fault.UNAVAILABLE, "MANIFEST", times=100)
        before = holder.lease.confirmations
        writer.save(24, [])
        eventually(lambda: holder.lease.confirmations >= before + 2)
        # Another attempt came while the bucket was away.
        holder.lease.lost = True
        raised(LostRunError, ".", writer.wait)
        assert committed_images(run) == [8, 16]


@pytest.mark.parametrize("queue", [lambda w: w.put("samples/a.png", b"1", images_seen=8), lambda w: w.save(8, [])])
def test_a_lost_run_gets_no_writes(run, queue):
    holder, is_queued = leased(run), threading.Event()
    writer = writer_of(holder)

    def lose(_: object) -> None:
        is_queued.wait(30)
        holder.lease.lost = True

    writer.do_later(lose)
    queue(writer)
    is_queued.set()
    writer._thread.join(10)
    raised(LostRunError, ".", writer.wait)
    assert list(run.list()) == []


@pytest.mark.slow
def test_a_short_grace_shortens_the_cadence(tiles, tmp_path, notes, monkeypatch):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    # A minute is the interval that follows; a test has less time.
    monkeypatch.setattr("job.runs.outlook.LONGEST_WITHOUT_NOTICE_SECONDS", 0.12)
    monkeypatch.setattr("job.runs.retention.LAST_SAVES", 99)
    rarely = {"checkpoint__every_minutes": "7", "checkpoint__every_epochs": "999", "checkpoint__keep_last": "99"}
    words = ("train", "--dataset", "tiles", "--bucket", bucket, "--epochs", 3, *settings(**rarely))
    # The first save shows that there is enough time, and the last one ends the run.
    succeeded(ddpm_here(*words, "--run", "enough", **{GRACE_VARIABLE: "30"}))
    assert (notes, len(list_checkpoints(open_store(str(bucket)).sub("runs/enough")))) == ([], 2)
    succeeded(ddpm_here(*words, "--run", "short", **{GRACE_VARIABLE: "2"}))
    assert len(list_checkpoints(open_store(str(bucket)).sub("runs/short"))) > 2
    said = r"a save takes about \d+\.\d s, which does not fit into the 2 s between a preemption notice and the end: "
    assert re.fullmatch(said + r"saving every 0\.\d instead of 7 minutes", notes.pop())


# --- the metrics of a run that saves often: few objects, and every row, whatever is kept and whoever goes on


def numbers_of(run, ref):
    """The batches of 24 images of which a checkpoint has rows, which are the same in its events."""
    metrics = load_manifest(run, ref).metrics
    rows = [row["images_seen"] for row in read_rows(run, metrics, pytest.fail)]
    assert [step for step, _, _ in shown(run, metrics)] == rows
    return [images_seen // 24 for images_seen in rows]


@pytest.mark.parametrize("saves", [130, pytest.param(400, marks=pytest.mark.slow)])
def test_many_saves_leave_few_objects_and_every_row(run, saves):
    """As few of 130 as of 20,000: the limits lie closely above what either takes."""
    of_metrics, manifest_bytes = [], []

    def measure(key):
        if key.endswith("MANIFEST.json"):
            of_metrics.append(len([*run.list("metrics"), *run.list("tensorboard")]))
            manifest_bytes.append(len(run.read(key).data))

    run.hooks["created"] = measure
    every_epochs, tensors = saves // 6, {"model": {"weight": torch.zeros(4)}}
    rules = {"checkpoint__keep_last": 1, "checkpoint__keep_every_epochs": every_epochs}
    writer = writer_of(leased(run, **rules), tensors)
    save(writer, *range(24, 24 * saves + 1, 24))
    writer.close(wait=True)
    kept = list_checkpoints(run)
    ends = [number for number in range(1, saves) if not number * 24 % (DATASET_IMAGES * every_epochs)]
    assert {ref.images_seen // 24 for ref in kept} == {*ends, saves - saves % 2, saves}
    for ref in kept:
        assert numbers_of(run, ref) == [*range(1, ref.images_seen // 24 + 1)]
    assert max(of_metrics) <= 30
    assert max(manifest_bytes) < 5_000

    run.requests.clear()
    rows = read_rows(run, newest_good(run).metrics, pytest.fail)
    assert (len(rows), len(run.requests) <= 12) == (saves, True)

    # The newest is lost, and an attempt goes on from the one before.
    run.delete(kept[-1].manifest_key)
    before = load_manifest(run, kept[-2])
    writer = writer_of(leased(run, 2, **rules), tensors, before)
    save(writer, *(before.images_seen + images for images in (24, 48, 72)))
    writer.close(wait=True)
    for ref in list_checkpoints(run):
        assert numbers_of(run, ref) == [*range(1, ref.images_seen // 24 + 1)]
    named = {key for ref in list_checkpoints(run) for key in load_manifest(run, ref).objects}
    assert {entry.key for folder in ("metrics", "tensorboard") for entry in run.list(folder)} <= named


@pytest.mark.parametrize("is_hurried", [False, True], ids=["one segment", "two segments"])
def test_a_later_value_of_a_moment_hides_no_earlier_one(run, is_hurried):
    notice, before = Stop(), None
    for fence, name in enumerate(("loss", "val_loss"), 1):
        writer = writer_of(leased(run, fence), None, before, notice)
        writer.rows.append({"images_seen": 24, name: 0.5, "time": 1.0})
        if is_hurried and before:
            notice.request("a notice")
        writer.save(24, [])
        writer.close(wait=True)
        before = load_manifest(run, max(list_checkpoints(run)))
    assert len(before.segments) == 1 + is_hurried
    assert shown(run, before.metrics) == [(24, "loss", 0.5), (24, "val_loss", 0.5)]


# --- how often a run saves: as configured, else as its own history and its last save make it worth while

INTERVALS = [
    # In a run that was not killed it takes a hundredth.
    (None, 30, (1.0, 0.05), None, 100),
    (None, 30, (0.01, 0.0), None, 10),
    (None, 30, (7.0, 0.05), None, 600),
    # Young's square root, of 2 × 0.5 s × an hour.
    (None, 30, (1.0, 0.5), 3600.0, 60),
    (None, 30, (1.0, 5.0), 10**7, 600),
    # Saving takes a tenth of the time at most.
    (None, 30, (3.0, 0.05), 60.0, 30),
    (None, 900, (100.0, 0.05), None, 1000),
    (None, 900, (100.0, 0.05), 3600.0, 1000),
    (None, 30, (100.0, 0.05), None, 1000),
    (7.0, 30, (3.0, 0.05), 60.0, 420),
    # A notice that is too short loses the work since the last save.
    (None, 30, (40.0, 0.05), None, 400),
    (7.0, 30, (40.0, 0.05), None, 400),
    (2.0, 30, (40.0, 0.05), None, 120),
]


@pytest.mark.parametrize(("configured", "grace", "save", "killed_every", "seconds"), INTERVALS)
def test_intervals(configured, grace, save, killed_every, seconds):
    assert interval_seconds(configured, grace, save, killed_every) == pytest.approx(seconds, rel=0.02)


def test_no_other_interval_takes_less_time():
    for every, stall in itertools.product((60.0, 3600.0, 24 * 3600.0), (0.05, 1.0, 20.0)):
        best = best_interval_seconds(stall, every)
        intervals = np.array([best, *np.geomspace(best / 20, best * 20, 400)])
        # Daly (2006), eq. 20, of which e^{R/M} does not depend on the interval: M (e^{(τ + δ)/M} - 1) / τ.
        took = every * np.expm1((intervals + stall) / every) / intervals
        assert took[0] <= 1.001 * took.min()
        # Young's square root (1974), where a save takes little of the time.
        assert best == pytest.approx(np.sqrt(2 * stall * every), rel=2 * np.sqrt(stall / every))
    # Daly, eq. 37, for half a save in an interruption: √(2δM) (1 + √(δ/2M)/3 + δ/2M/9) - δ, and M from 2M on.
    assert best_interval_seconds(2.0, 4.0) == pytest.approx(4 * (1 + 0.5 / 3 + 0.25 / 9) - 2)
    assert best_interval_seconds(8.0, 4.0) == 4.0


def test_a_run_that_is_killed_saves_often(tmp_path):
    def moment(seconds: float) -> str:
        return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime(MOMENT_FORMAT)

    for name, state in (("killed", "running"), ("stopped", "stopped")):
        run = open_store(str(tmp_path / name))
        for fence in range(1, 4):
            seen = LastStatus(state=state, images_seen=0, updated=moment(100 * (4 - fence) + 95))
            previous = {"previous": fence - 1, "previous_seen": seen} if fence > 1 else {}
            update = {"started": moment(100 * (4 - fence)), **previous}
            record = leased(run, fence).record.model_copy(update=update)
            run.create(ObjectKind.ATTEMPT.key(fence=fence), record.to_json())
    # Killed after five seconds, twice: it saves before the next five are over.
    cadences = {name: Cadence(open_store(str(tmp_path / name)), None, 30.0) for name in ("killed", "stopped")}
    with lasting(at_most=2.5):
        eventually(lambda: cadences["killed"].is_over)
    assert not cadences["stopped"].is_over

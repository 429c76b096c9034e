"""The thread that commits checkpoints: in order, held up by nothing, and before a bucket that goes away."""

from __future__ import annotations

import re
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from job.exits import BadDataError, BucketAwayError, LostRunError
from job.runs.checkpoints import list_checkpoints, load_manifest, restore
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef
from job.runs.metric_rows import read_rows
from job.runs.retention import Retention, kept_while_read
from job.stop import GRACE_VARIABLE
from job.store import Retry, open_store, retry
from job.store.local import LocalStore
from tests.faulty_proxy import Fault, FaultyProxy
from tests.job.command_line import ddpm, settings
from tests.job.hooked import hooked
from tests.job.launching import eventually
from tests.job.runs.leased import DATASET_IMAGES, committed_images, leased, live_tensors, save, small_config, writer_of

pytestmark = pytest.mark.usefixtures("notes")


class Watched(LocalStore):
    """A folder that keeps what happens to it in order; `hooks` are called before files are moved in and deleted."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        super().__init__(root)
        # Shared by the copies that `within` makes.
        self.events: list[str] = []
        self.hooks: dict[str, Callable[[str], object]] = {}

    def create(self, key: str, data: bytes) -> str:
        self.events.append(f"create {key}")
        return super().create(key, data)

    def move(self, path: Path, key: str, *, fresh: bool = False) -> None:
        self.hooks.get("move", str)(key)
        super().move(path, key, fresh=fresh)

    def delete(self, key: str) -> None:
        self.hooks.get("delete", str)(key)
        self.events.append(f"delete {key}")
        super().delete(key)


@pytest.fixture
def run(tmp_path: Path) -> Watched:
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


def test_a_failed_save_is_raised_later(run):
    run.hooks["move"] = Mock(side_effect=BadDataError("the disk ate it"))
    writer = writer_of(leased(run), live_tensors())
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


def test_old_checkpoints_and_leftovers_go(run):
    orphans = {"checkpoints/000001-000000000048/model-00.safetensors", "metrics/000001-000000000048.jsonl"}
    orphans.add("snapshots/000001-000000000048/ema-0.1-00.safetensors")
    # One of a later attempt, which may be alive for all this one knows.
    kept = {"checkpoints/000007-000000000048/model-00.safetensors", "checkpoints/of-a-person/notes.txt"}
    for key in orphans | kept:
        run.put(key, b"1")
    holder = leased(run, 2, checkpoint__keep_last=1, checkpoint__keep_every_epochs=2)
    holder.lease.confirm = lambda: run.events.append("confirm")
    writer = writer_of(holder, live_tensors())
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


def test_a_checkpoint_in_use_stays(run, notes):
    # Each ends an epoch.
    writer = writer_of(leased(run, checkpoint__keep_last=1), live_tensors())
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


def scalars(data: bytes) -> list[tuple[int, str, float]]:
    """Step, name and value of each that TensorBoard shows of its file: length, checksum, event, checksum, and so on."""
    shown = list[tuple[int, str, float]]()
    while data:
        (size,) = struct.unpack_from("<Q", data)
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        if event.session_log.status == SessionLog.START:
            # It forgets what an attempt before has logged from here on (EventAccumulator, purge_orphaned_data).
            shown = [one for one in shown if one[0] < event.step]
        told = (value for value in event.summary.value if not value.tag.startswith("_hparams_"))
        shown += ((event.step, value.tag, value.simple_value) for value in told)
    return shown


@pytest.mark.parametrize("changes", [{"checkpoint__keep_epochs": (1,)}, {"ema__stds": 0.1, "ema__snapshot_epochs": 1}])
def test_the_newest_replaces_queued_checkpoints(run, changes):
    go_on = threading.Event()
    run.hooks["move"] = lambda key: go_on.wait(30)
    writer = writer_of(leased(run, **changes), live_tensors())
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
    assert [key for key in created if key.endswith("MANIFEST.json")] == [
        CheckpointRef(1, images_seen).manifest_key for images_seen in (24, 48, 72)
    ]
    # What they say of metrics is there, for people's tools as well.
    metrics = load_manifest(run, max(list_checkpoints(run))).metrics
    assert read_rows(run, metrics, pytest.fail) == rows
    events = [event for named in metrics if "events" in named.key for event in scalars(named.read(run))]
    assert events == [(row["images_seen"], "loss", pytest.approx(row["loss"])) for row in rows]


def test_only_the_end_waits_for_retirement(run):
    go_on = threading.Event()
    writer = writer_of(leased(run, checkpoint__keep_last=1), live_tensors())
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
        writer = writer_of(holder, live_tensors())
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
        with pytest.raises(LostRunError):
            writer.wait()
        assert committed_images(run) == [8, 16]


@pytest.mark.parametrize("queue", [lambda w: w.put("samples/a.png", b"1", images_seen=8), lambda w: w.save(8, [])])
def test_a_lost_run_gets_no_writes(run, queue):
    holder, is_queued = leased(run), threading.Event()
    writer = writer_of(holder, live_tensors())

    def lose(_: object) -> None:
        is_queued.wait(30)
        holder.lease.lost = True

    writer.do_later(lose)
    queue(writer)
    is_queued.set()
    writer._thread.join(10)
    with pytest.raises(LostRunError):
        writer.wait()
    assert list(run.list()) == []


@pytest.mark.slow
def test_a_short_grace_shortens_the_cadence(tiles, tmp_path):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    # A minute is the interval that follows; a test has less time.
    patched = {"job__runs__outlook": "LONGEST_WITHOUT_NOTICE_SECONDS = 0.12", "job__runs__retention": "LAST_SAVES = 99"}
    hooks = hooked(tmp_path / "hooks", **patched)
    keep = {"checkpoint.every_minutes": 7, "checkpoint.every_epochs": 999}
    keep |= {"checkpoint.keep_last": 99, "checkpoint.keep_every_epochs": 0}
    rarely = [word for key, value in keep.items() for word in ("--set", f"{key}={value}")]
    found = {}
    for name, seconds in (("enough", 30), ("short", 2)):
        words = ("--dataset", "tiles", "--run", name, "--bucket", bucket, "--epochs", 3, *settings(), *rarely)
        done = ddpm("train", *words, **{"PYTHONPATH": hooks, GRACE_VARIABLE: str(seconds)})
        assert done.returncode == 0, done.stderr
        warnings = re.findall(r"a save takes about .*", done.stderr)
        found[name] = warnings, len(list_checkpoints(open_store(str(bucket)).sub(f"runs/{name}")))
    # The first save shows that there is enough time, and the last one ends the run.
    assert found["enough"] == ([], 2)
    (warning,), checkpoints = found["short"]
    assert re.fullmatch(
        r"a save takes about \d+\.\d s, which does not fit into the 2 s between a preemption notice and the end: "
        r"saving every 0\.\d instead of 7 minutes",
        warning,
    )
    assert checkpoints > 2

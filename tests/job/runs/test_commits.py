"""What a commit brings with it: the retiring of older checkpoints, the sweeping of leftovers, a cadence that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from job.config_input import draft
from job.exits import BucketAwayError, LostRunError
from job.runs import commits as commits_module
from job.runs import grace
from job.runs.checkpoints import CheckpointRef, list_checkpoints, load_manifest
from job.runs.commits import Commits
from job.runs.lease import Lease
from job.runs.metrics import read_rows
from job.runs.records import create_config, record_attempt
from job.runs.retention import READING, reading
from job.stop import NEVER, Stop
from job.store import Store
from job.store.local import LocalStore
from tests.job.command_line import NETWORK
from tests.job.leases import eventually, taken
from tests.job.runs.test_checkpoints import write

DATASET_IMAGES = 48
"""Two steps of 24 images to an epoch."""


class Watched(LocalStore):
    """A folder that keeps what happens to it in order, and whose deletions can fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.events: list[str] = []
        self.away = False

    def within(self, seconds: float, stop: Stop = NEVER) -> Watched:
        return self

    def create(self, key: str, data: bytes) -> str:
        self.events.append(f"create {key}")
        return super().create(key, data)

    def delete(self, key: str) -> None:
        if self.away:
            raise BucketAwayError("the bucket is away")
        if not key.startswith("probe/"):
            self.events.append(f"delete {key}")
        super().delete(key)


@pytest.fixture
def run(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "run")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def begun(
    run: Watched, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Commits, Lease]]]:
    """Begins attempts at the run; a confirmation is an event like those of the folder."""
    confirm = Lease.confirm

    def confirmed(lease: Lease) -> None:
        run.events.append("confirm")
        confirm(lease)

    monkeypatch.setattr(Lease, "confirm", confirmed)
    open_ones: list[tuple[Commits, Lease]] = []

    def begin(grace_seconds: float = 30, floor: int = 0, **settings: str) -> tuple[Commits, Lease]:
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        config = draft("landscape-sample", {**NETWORK, "checkpoint.keep_last": "1", **changes})
        create_config(run, config)
        lease = taken(run, floor=floor)
        commits = Commits(
            run,
            config,
            record_attempt(run, lease.fence, {}, 1, "cpu"),
            lease,
            {"model": {"w": torch.zeros(100)}},
            dataset_images=DATASET_IMAGES,
            segments=[],
            aside=set(),
            stop=Stop(grace_seconds),
            note=notes.append,
        )
        open_ones.append((commits, lease))
        return commits, lease

    yield begin
    for commits, lease in open_ones:
        if not commits.troubled:
            commits.close(wait=False)
        lease.close()


def committed_images(run: Store) -> list[int]:
    return [ref.images_seen for ref in list_checkpoints(run)]


def save(commits: Commits, *images_seen: int) -> None:
    for images in images_seen:
        commits.rows.append({"images_seen": images, "loss": 0.5, "time": 0.0})
        commits.save(images, [[1.0, 2.0]], 1)
        commits.wait()


def test_old_checkpoints_go_and_those_of_chosen_epochs_stay(run, begun):
    commits, lease = begun(checkpoint__keep_every_epochs="2")
    save(commits, 24, 48, 72, 96, 120, 144)
    commits.close(wait=True)
    # Epoch 2 ends with image 96.
    assert committed_images(run) == [96, 144]
    newest = load_manifest(run, CheckpointRef(lease.fence, 144))
    assert [row["images_seen"] for row in read_rows(run, newest.metric_segments)] == [24, 48, 72, 96, 120, 144]
    deleted = [event.split("/")[-1] for event in run.events if event.startswith("delete checkpoints/")]
    # Nobody takes for whole what is being deleted.
    assert deleted == ["MANIFEST.json", "model-00.safetensors"] * 4


def test_the_lease_is_confirmed_before_each_commit_and_each_checkpoint_that_goes(run, begun):
    commits, _ = begun()
    save(commits, 24, 48, 72)
    commits.close(wait=True)
    decisive = [event for event in run.events if event == "confirm" or event.endswith("MANIFEST.json")]
    manifests = [number for number, event in enumerate(decisive) if event != "confirm"]
    assert len(manifests) == 3 + 2
    assert all(decisive[number - 1] == "confirm" for number in manifests)


def test_whoever_lost_the_run_deletes_nothing(run, begun, monkeypatch):
    commits, _ = begun()
    save(commits, 24)
    events = run.events

    def lost_after_commit(lease: Lease) -> None:
        events.append("confirm")
        if any(event.startswith("create") and event.endswith("48/MANIFEST.json") for event in events):
            raise LostRunError("another attempt holds the run")

    monkeypatch.setattr(Lease, "confirm", lost_after_commit)
    commits.save(48, [[1.0, 2.0]], 1)
    eventually(lambda: commits.troubled)
    with pytest.raises(LostRunError):
        commits.raise_trouble()
    assert committed_images(run) == [24, 48]


def test_a_checkpoint_that_is_being_read_stays_until_it_has_been_read(run, begun):
    commits, lease = begun()
    save(commits, 24)
    with reading(run, CheckpointRef(lease.fence, 24)):
        save(commits, 48)
        eventually(lambda: run.list(READING))
        save(commits, 72)
        commits_are = lambda *images: committed_images(run) == [*images]  # noqa: E731
        eventually(lambda: commits_are(24, 72))
    save(commits, 96)
    eventually(lambda: commits_are(96))


def test_what_dead_attempts_left_is_swept_and_nothing_else(run, begun):
    write(run, (1, 24))
    for key in (
        "checkpoints/000001-000000000048/model-00.safetensors",
        "metrics/000001-000000000048.jsonl",
        "checkpoints/000007-000000000048/model-00.safetensors",
        "checkpoints/of-a-person/notes.txt",
        "samples/epoch-0001.png",
    ):
        run.put(key, b"1")
    commits, lease = begun(floor=1, checkpoint__keep_last="9")
    assert lease.fence == 2
    save(commits, 24)
    commits.close(wait=True)
    keys = {entry.key for entry in run.list()}
    assert committed_images(run) == [24, 24]
    assert not {key for key in keys if "000001-000000000048" in key}
    assert {
        # One of a later attempt, which may be alive for all this one knows.
        "checkpoints/000007-000000000048/model-00.safetensors",
        "checkpoints/of-a-person/notes.txt",
        "samples/epoch-0001.png",
    } <= keys


def test_a_bucket_that_is_away_costs_space_and_no_work(run, begun, notes):
    commits, _ = begun()
    save(commits, 24)
    run.away = True
    save(commits, 48)
    eventually(lambda: [note for note in notes if "stay for now: the bucket is away" in note])
    run.away = False
    assert committed_images(run) == [24, 48]
    save(commits, 72)
    commits.close(wait=True)
    assert committed_images(run) == [72]


def test_a_save_that_does_not_fit_is_told_and_made_more_often(run, begun, notes, monkeypatch):
    monkeypatch.setattr(grace, "SHORTEST_CADENCE_MINUTES", 0.0)
    monkeypatch.setattr(commits_module, "measure_save_seconds", lambda *_: 0.01)
    commits, lease = begun(grace_seconds=30, checkpoint__every_minutes="10")
    save(commits, 24)
    assert not commits.overdue
    assert notes == []
    commits.close(wait=True)
    lease.close()
    commits, _ = begun(grace_seconds=2, checkpoint__every_minutes="10")
    eventually(lambda: notes)
    assert "does not fit into the 2 s between a preemption notice and the end" in notes[0]
    save(commits, 48)
    eventually(lambda: commits.overdue)

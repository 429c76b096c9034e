"""Small runs in containers and jobs, and what came of them."""

from __future__ import annotations

from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.records import read_status
from job.store import Store
from tests.job.command_line import settings

EPOCHS = 16
IMAGES = 299
SMALL = settings(checkpoint__every_minutes="0.02", sample__every_epochs="0")
"""A run that has a checkpoint in seconds, and goes on for longer than a test takes to stop it."""


def training(run: str, bucket: object, epochs: int = EPOCHS) -> tuple[str, ...]:
    """The words of a run on the packed dataset."""
    place = ("--dataset", "tiles", "--run", run, "--epochs", str(epochs), "--bucket", str(bucket))
    return ("train", *place, *SMALL)


def images_saved(run: Store) -> int:
    """How many images the newest checkpoint of a run has seen; 0 without one."""
    return max((ref.images_seen for ref in list_checkpoints(run)), default=0) if run.exists("config.yaml") else 0


def assert_equal(run: Store, other: Store) -> None:
    """Both are finished, with the same weights, averages and moments to the last bit."""
    assert [getattr(read_status(each), "state", None) for each in (run, other)] == ["finished"] * 2
    manifests = (load_manifest(each, max(list_checkpoints(each))) for each in (run, other))
    found, expected = ([(file.name, file.sha256) for file in manifest.files] for manifest in manifests)
    assert len(found) >= 3
    assert found == expected

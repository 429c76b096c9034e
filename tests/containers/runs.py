"""Small runs in containers, and what came of them."""

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


def assert_equal(run: Store, other: Store) -> None:
    """Both are finished, with the same weights, averages and moments to the last bit."""
    for each in (run, other):
        status = read_status(each)
        assert status is not None
        assert status.state == "finished"
    manifests = (load_manifest(each, max(list_checkpoints(each))) for each in (run, other))
    found, expected = ([(file.name, file.sha256) for file in manifest.files] for manifest in manifests)
    assert len(found) >= 3
    assert found == expected

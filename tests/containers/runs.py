"""Small runs in containers, and what came of them."""

from __future__ import annotations

from typing import Any

from job.runs.checkpoints import list_checkpoints, load_manifest, opened
from job.runs.records import read_status
from job.store import Store
from tests.job.command_line import settings

GROUPS = ("model", "ema", "optimizer")
EPOCHS = 16
IMAGES = 299
SMALL = settings(checkpoint__every_minutes="0.02", sample__every_epochs="0")
"""A run that has a checkpoint in seconds, and goes on for longer than a test takes to stop it."""


def training(run: str, bucket: object, epochs: int = EPOCHS) -> tuple[str, ...]:
    """The words of a run on the packed dataset."""
    place = ("--dataset", "tiles", "--run", run, "--epochs", str(epochs), "--bucket", str(bucket))
    return ("train", *place, *SMALL)


def tensors(run: Store) -> dict[str, Any]:
    """All tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    with opened(run, max(list_checkpoints(run)), GROUPS) as restored:
        return {
            f"{group}.{name}": tensor
            for group, paths in restored.files.items()
            for path in paths
            for name, tensor in load_file(path).items()
        }


def assert_equal(run: Store, other: Store) -> None:
    """Both are finished, with the same weights to the last bit."""
    import torch

    for each in (run, other):
        status = read_status(each)
        assert status is not None
        assert status.state == "finished"
    found, expected = tensors(run), tensors(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_stopped_in_an_epoch(run: Store) -> int:
    """How many images a run has seen that was stopped between two ends of epochs."""
    seen = load_manifest(run, max(list_checkpoints(run))).images_seen
    assert 0 < seen % IMAGES < IMAGES
    return seen

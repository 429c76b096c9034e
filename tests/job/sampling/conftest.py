"""A trained run, for tests of what samples it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from job.data.pack import PackRequest, pack
from job.requests import TrainRequest
from job.store import open_store
from job.train import run_training
from tests.job.command_line import NETWORK


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bucket with a run `walk` of two epochs, which knows five classes."""
    folder = tmp_path_factory.mktemp("batches")
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(folder)), PackRequest(str(source), "tiles", size=16))
    sets = [f"{key}={value}" for key, value in NETWORK.items()] + [
        "train.learning_rate=0.01",
        "checkpoint.every_epochs=1",
    ]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(folder / "cache"))
        # As in the processes that the tests start: how many threads share a sum may decide its last bit.
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        request = TrainRequest("tiles", str(folder), run="walk", epochs=2, sets=tuple(sets))
        run_training(request.check())
        yield folder
    torch.set_num_threads(threads)


def _copied(trained: Path, uri: str) -> str:
    """Copies the run and the index of its dataset to another bucket."""
    there, here = open_store(str(trained)), open_store(uri)
    for prefix in ("runs/walk/checkpoints", "datasets"):
        for entry in there.list(prefix):
            if not entry.key.endswith(".tar"):
                here.create(entry.key, there.read(entry.key).data)
    here.create("runs/walk/config.yaml", there.read("runs/walk/config.yaml").data)
    return uri


@pytest.fixture
def bucket(trained: Path, tmp_path: Path) -> str:
    """A bucket on this disk with the run, for one test."""
    return _copied(trained, str(tmp_path / "bucket"))


@pytest.fixture
def gcs_copy(trained: Path, gcs_bucket: str) -> str:
    """The same on a server."""
    return _copied(trained, gcs_bucket)

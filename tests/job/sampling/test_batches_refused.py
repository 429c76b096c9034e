"""Batches that cannot be: requests that mean nothing, and writers that cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from job.data.pack import pack
from job.exits import BadDataError
from job.requests import TrainRequest
from job.runs.grace import Notice
from job.sampling.piece_files import PieceWriter
from job.store import open_store
from job.train import run_training
from tests.job.command_line import NETWORK, ddpm_here, refused
from tests.job.sampling.test_batches import batch_of, copied


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bucket with a run `walk` of two epochs, which knows five classes."""
    folder = tmp_path_factory.mktemp("batches")
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(folder)), str(source), "tiles", size=16)
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
        run_training(request.check(), lambda: False)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def bucket(trained: Path, tmp_path: Path) -> str:
    return copied(trained, str(tmp_path / "bucket"))


def test_a_writer_that_cannot_go_on_says_so(bucket):
    batch = batch_of(bucket, 40)
    batch.begin()
    batch.store.create("piece-00000.tar", b"something else")
    images = np.zeros((16, 16, 16, 3), np.uint8)
    with pytest.raises(BadDataError, match="delete it"), PieceWriter(batch, Notice(lambda: False, 30)) as writer:
        for number in range(3):
            writer.submit(number, images)
    with pytest.raises(BadDataError, match="delete it"), PieceWriter(batch, Notice(lambda: False, 30)) as writer:
        writer.submit(0, images)
    assert batch.committed() == set()


@pytest.mark.parametrize(
    ("typed", "code", "parts"),
    [
        ("--count 0", 64, ["--count 0", "1 to 1,000,000,000"]),
        ("--count -5", 64, ["--count -5", "1 to 1,000,000,000"]),
        ("--count 1000000001", 64, ["--count 1000000001", "1 to 1,000,000,000"]),
        ("--count many", 2, ["--count", "valid integer"]),
        ("--count 5 --save jpg", 64, ["--save 'jpg'", "shards or png"]),
        ("--count 5 --slice 3/2", 64, ["--slice '3/2'", "from 0 to n-1"]),
        ("--count 5 --slice 2/2", 64, ["--slice '2/2'", "from 0 to n-1"]),
        ("--count 5 --slice 0/0", 64, ["--slice '0/0'", "from 0 to n-1"]),
        ("--count 5 --slice half", 64, ["--slice 'half'", "such as 0/4"]),
        ("--count 5 --first-seed -1", 64, ["--first-seed -1", "seeds are 0 to"]),
        ("--count 5 --first-seed 999999999999999996", 64, ["--first-seed", "seeds are 0 to"]),
        ("--save png", 64, ["--save", "how many with --count"]),
        ("--slice 0/2", 64, ["--slice", "how many with --count"]),
        ("--first-seed 0", 64, ["--first-seed", "how many with --count"]),
        ("--count 5 --seeds 0-4", 64, ["--seeds and --count", "use --first-seed"]),
        ("--count 5 --gif", 64, ["--gif and --count", "without --count"]),
        ("--count 5 --nearest", 64, ["--nearest and --count", "without --count"]),
    ],
)
def test_a_request_that_means_nothing(tmp_path, typed, code, parts):
    line = refused(ddpm_here("sample", "--run", "walk", *typed.split(), DDPM_BUCKET=str(tmp_path / "nowhere")), code)
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())

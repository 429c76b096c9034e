"""Batches that cannot be: requests that mean nothing, and writers that cannot go on."""

from __future__ import annotations

import numpy as np
import pytest

from job.exits import BadDataError
from job.sampling.piece_files import PieceWriter
from tests.job.command_line import ddpm_here, refused
from tests.job.sampling.test_batches import batch_of


def test_a_writer_that_cannot_go_on_says_so(bucket):
    batch = batch_of(bucket, 40)
    batch.begin()
    batch.store.create("piece-00000.tar", b"something else")
    images = np.zeros((16, 16, 16, 3), np.uint8)
    with pytest.raises(BadDataError, match="delete it"), PieceWriter(batch) as writer:
        for number in range(3):
            writer.submit(number, images)
    with pytest.raises(BadDataError, match="delete it"), PieceWriter(batch) as writer:
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

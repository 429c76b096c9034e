"""Machines that share long work give what one machine gives, also when they are killed all the time."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path

import pytest

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.store import open_store
from tests.job.command_line import ddpm, started, succeeded
from tests.job.data.test_foreign_tars import write_tars
from tests.job.exchange.test_encoding import make_autoencoder
from tests.job.some_images import encoded, files_in, folder_of, picture

TILES = resources.files("job") / "datasets" / "landscape-sample.zip"
MACHINES = 3


def finished_by(*words: object, kills: int = 0) -> list[int]:
    """Runs each slice on a machine of its own, some of which are killed and come back; their last exit codes."""
    draw, deadline = random.Random(0), time.monotonic() + 240

    def start(number: int) -> subprocess.Popen[str]:
        return started(*words, "--slice", f"{number}/{MACHINES}")

    machines = [start(number) for number in range(MACHINES)]
    while kills and any(machine.poll() is None for machine in machines):
        time.sleep(draw.uniform(0.5, 2.5))
        number = draw.randrange(MACHINES)
        if machines[number].poll() is None:
            machines[number].send_signal(signal.SIGKILL)
            machines[number].wait()
            machines[number], kills = start(number), kills - 1
        assert time.monotonic() < deadline
    return [machine.wait(timeout=240) for machine in machines]


def whole(folder: Path) -> dict[str, bytes]:
    """The objects of a dataset without records, which clearing up may leave."""
    return {key: data for key, data in files_in(folder).items() if not key.startswith(("pieces/", "claims/"))}


PACK = ("--size", 1200, "--min-side", 1, "--bucket")
"""Shards of 23 images, of which each takes a while."""


@pytest.mark.slow
def test_packing(tmp_path):
    images = tmp_path / "images"
    for number in range(110):
        folder_of(images, [(f"{('dunes', 'sea')[number % 2]}/{number:03d}.png", encoded(picture(number)))])
    words = ("data", "pack", images, "mine", *PACK)
    succeeded(ddpm(*words, tmp_path / "alone"))
    assert finished_by(*words, tmp_path / "shared", kills=6) == [0] * MACHINES
    alone, shared = (whole(tmp_path / bucket / "datasets/mine-1200") for bucket in ("alone", "shared"))
    # The index, the preview, and five shards.
    assert len(alone) == 2 + 2 * 5
    assert shared == alone


@pytest.mark.slow
def test_indexing(tmp_path):
    samples = [
        {"__key__": f"{n:05d}", "png": encoded(picture(n, 96, 96)), "cls": str(n % 3).encode()} for n in range(90)
    ]
    tars = write_tars(tmp_path / "tars", samples)
    words = ("data", "index", tars, "mine", "--size", 64, "--bucket")
    succeeded(ddpm(*words, tmp_path / "alone"))
    assert finished_by(*words, tmp_path / "shared", kills=2) == [0] * MACHINES
    alone, shared = (whole(tmp_path / bucket / "datasets/mine-64") for bucket in ("alone", "shared"))
    assert shared == alone


@pytest.mark.slow
def test_encoding(tmp_path):
    autoencoder = make_autoencoder(tmp_path / "autoencoder")
    pack(open_store(str(tmp_path / "alone")), PackRequest(str(TILES), "tiles", 32), shard_images=60)
    shutil.copytree(tmp_path / "alone", tmp_path / "shared")
    words = ("data", "encode", "tiles", "--autoencoder", autoencoder, "--bucket")
    succeeded(ddpm(*words, tmp_path / "alone"))
    assert finished_by(*words, tmp_path / "shared") == [0] * MACHINES
    alone, shared = (whole(tmp_path / bucket / "datasets/tiles-latents-16") for bucket in ("alone", "shared"))
    assert shared == alone


@pytest.mark.slow
def test_evaluating(walked, tmp_path):
    words = ("evaluate", "--run", "walk", "--extractor", "mobilenet", "--count", 64, "--references", 64, "--bucket")
    scores = []
    for name in ("alone", "shared"):
        bucket = shutil.copytree(walked, tmp_path / name)
        if name == "alone":
            succeeded(ddpm(*words, bucket))
        else:
            assert finished_by(*words, bucket, kills=4) == [0] * MACHINES
        (path,) = bucket.glob("runs/walk/evaluations/*/scores.json")
        assert not list(bucket.rglob("claims/*"))
        scores.append(json.loads(path.read_text())["values"])
    assert scores[0] == scores[1]

"""Finished runs looked back at: their state at any image, the images of a spike, and where an image was learnt."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from job.data.cache import uncached_images
from job.data.keys import find_image, keys_of
from job.data.order import Order
from job.data.shards import DatasetIndex, Shards, ShardWriter, load_index
from job.exits import Exit, MissingInputError, StoppedError
from job.requests import TrainRequest
from job.runs import retention
from job.stop import Stop
from job.store import open_store
from job.training.attempt import run_training
from job.training.session import TrainingSession
from tests.job.command_line import NETWORK, ddpm_here, refused, started, succeeded
from tests.job.hooked import hooked
from tests.job.some_images import encoded, folder_of, png, tar_of

BATCH_IMAGES = 24
SETTINGS = NETWORK | {"model.dropout": "0.1", "ema.stds": "0.1", "data.augment": "0.5", "model.layers_per_level": "1"}
# On a busy machine the usual cadence would save within an epoch, and other attempts would count.
SETTINGS |= {"train.warmup_images": "480", "checkpoint.every_minutes": "60"}
SETTINGS |= {"checkpoint.keep_last": "2", "checkpoint.keep_epochs": "1,2", "train.slots": "4", "train.exact": "true"}
ATTEMPTS = [
    (9, StoppedError, {}),
    (16, ArithmeticError, {"train.micro_batch_size": "3"}),
    (22, ArithmeticError, {"train.slots": "6"}),
    (30, StoppedError, {"train.slots": "3", "checkpoint.every_epochs": "2"}),
    (0, None, {"train.micro_batch_size": "5"}),
]
"""The step at which each attempt ends, how, and what it changes: with dropout, each of these changes every bit."""


def sha256_of(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """The hash of the tensors of each group."""
    hashes = {}
    for group, tensors in groups.items():
        whole = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            whole.update(f"{name} {list(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
        hashes[group] = whole.hexdigest()
    return hashes


@pytest.fixture(scope="module")
def moved(tiles, tmp_path_factory) -> tuple[Path, dict[int, dict[str, str]]]:
    """A bucket with a run that crashed, was stopped and was changed, and the hashes of its states by images seen."""
    bucket, states = shutil.copytree(tiles, tmp_path_factory.mktemp("travel") / "bucket"), {}
    for last_step, ending, changes in ATTEMPTS:
        AcceleratorState._reset_state(reset_partial_state=True)
        after_step = TrainingSession.after_step

        def watched(session, state, last_step=last_step, ending=ending, after_step=after_step):
            # A state that was lost in a crash is overwritten by that of the attempt that learnt it again.
            states[state.images_seen] = sha256_of(state.tensors())
            is_last = state.images_seen == last_step * BATCH_IMAGES
            if is_last and ending is ArithmeticError:
                raise ArithmeticError
            return after_step(session, state) or is_last

        sets = tuple(f"{key}={value}" for key, value in (SETTINGS | changes).items())
        request = TrainRequest("tiles", str(bucket), run="moved", epochs=3, sets=sets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingSession, "after_step", watched)
            if ending:
                with pytest.raises(ending):
                    run_training(request.check(), Stop(30.0))
            else:
                run_training(request.check(), Stop(30.0))
    return bucket, states


@pytest.mark.slow
def test_any_state_is_replayed_to_the_bit(moved, tmp_path, capsys):
    bucket, states = moved
    kept = sorted(int(path.name.partition("-")[2]) for path in (bucket / "runs/moved/checkpoints").iterdir())
    assert len(kept) < len(states) / 5
    for number, image in enumerate(random.Random(0).sample(sorted(states), 20)):
        folder = tmp_path / str(number)
        done = ddpm_here("replay", "moved", "--image", image, "--to", folder, "--bucket", bucket)
        printed = succeeded(done)
        assert "DIFFER" not in done.stderr
        found = {group: {} for group in states[image]}
        names = {"diffusion_pytorch_model": "ema"}
        for path in folder.rglob("*.safetensors"):
            found[names.get(path.stem) or path.stem.removesuffix("-00")] |= load_file(path)
            assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" in printed
        assert sha256_of(found) == states[image], image
        record = json.loads((folder / "replay.json").read_text())
        nearest = max((at for at in kept if at <= image), default=None)
        assert record["from"].endswith(f"-{nearest:012d}" if nearest else "first weights")


@pytest.mark.slow
def test_a_replay_is_compared_and_refused(moved, tmp_path):
    bucket, states = moved
    run = bucket / "runs/moved"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ("replay", "moved", "--bucket", bucket, "--image")
    assert succeeded(ddpm_here(*words, 312, "--verify")).endswith("-000000000312, file by file\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.training.replay.code_version", lambda: "0+other")
        done = ddpm_here(*words, 336, "--to", tmp_path / "state")
    succeeded(done)
    (line,) = [line for line in done.stderr.splitlines() if "DIFFER" in line]
    assert "this replay runs 0+other" in line
    assert json.loads((tmp_path / "state/replay.json").read_text())["differences"] == [line.partition(": ")[2]]
    # Another computation than that of the run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm.training.learning_rate_at", lambda train, images_seen: train.learning_rate)
        line = refused(ddpm_here(*words, 312, "--verify"), Exit.BAD_DATA)
    assert "differs from the replay in" in line and "model-00.safetensors" in line
    # There `ddpm runs verify` would find files that are no part of the run, and `ddpm runs list` another run.
    for place in (run, run / "replayed", run / "checkpoints/replayed", bucket / "runs/other", bucket / "runs"):
        said = f"--to {place} would be taken for a run or a part of one: name a folder outside of {bucket}/runs"
        assert said in refused(ddpm_here(*words, 312, "--to", place), Exit.BAD_REQUEST)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    succeeded(ddpm_here("import", tmp_path / "state", "--run", "fork", "--bucket", bucket))
    (fork,) = (bucket / "runs/fork/checkpoints").iterdir()
    # An export's weights to sample with are the run's.
    assert sha256_of({"ema": load_file(fork / "model-00.safetensors")})["ema"] == states[336]["ema"]
    assert refused(ddpm_here(*words, 320), Exit.BAD_REQUEST).endswith("every 24 images to 912: 312 or 336")
    assert refused(ddpm_here(*words, 936), Exit.BAD_REQUEST).endswith("to 912: 912")
    assert "no checkpoint at image 336" in refused(ddpm_here(*words, 336, "--verify"), Exit.MISSING_INPUT)
    assert "is there already" in refused(ddpm_here(*words, 336, "--to", tmp_path / "state"), Exit.BAD_REQUEST)


SLOW_STEPS = """
import time
usual = learning_rate_at

def learning_rate_at(*settings):
    print("a step", flush=True)
    time.sleep(3)
    return usual(*settings)
"""


@pytest.mark.slow
def test_a_stopped_replay_writes_nothing(moved, tmp_path):
    bucket, _ = moved
    before = {path for path in bucket.rglob("*") if path.is_file()}
    words = ("moved", "--bucket", bucket)
    for command in (
        ("replay", *words, "--image", 192, "--to", tmp_path / "to"),
        ("runs", "blame", *words, "--around", 192),
    ):
        hooks = hooked(tmp_path / command[0], ddpm__training=SLOW_STEPS)
        process = started(*command, program=(sys.executable, "-m", "job"), PYTHONPATH=hooks)
        assert "a step\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        said, _ = process.communicate(timeout=30)
        assert process.returncode == Exit.STOPPED, said
        assert time.monotonic() - asked < 10
        assert "stopped by SIGTERM after" in said and "Traceback" not in said
    assert not (tmp_path / "to").exists()
    assert before == {path for path in bucket.rglob("*") if path.is_file()}


def learnt_by(image: int) -> int:
    """The attempt that learnt an image of the run, from which every later checkpoint comes."""
    # The second attempt saved at the end of an epoch, 312, the third not at all, and the fourth when it was stopped.
    return next(fence for fence, last in ((1, 216), (2, 312), (4, 720), (5, 912)) if image < last)


@pytest.mark.slow
def test_an_image_is_seen_where_it_was_learnt(moved):
    bucket, _ = moved
    index = load_index(open_store(str(bucket)), "datasets/tiles-16")
    order = Order(tuple(shard.images for shard in index.shards), 0).indices(np.arange(912)).tolist()
    kept = {f"checkpoints/{path.name}" for path in (bucket / "runs/moved/checkpoints").iterdir()}
    for image in (0, 7, 298):
        words = ("runs", "seen", "moved", "--image-key", f"{image:09d}", "--bucket", bucket)
        told = json.loads(succeeded(ddpm_here(*words, "--json")))
        numbers = [number for number, index in enumerate(order) if index == image]
        assert [(row["image"], row["attempt"]) for row in told["learnt"]] == [(n, learnt_by(n)) for n in numbers]
        times = [row["time"] for row in told["learnt"]]
        assert times == sorted(times)
        expected = {key: sum(n < int(key.rpartition("-")[2]) for n in numbers) for key in kept}
        assert told["checkpoints"] == expected
        assert f"learnt {len(numbers)} times in 912 images" in succeeded(ddpm_here(*words))
    words = ("runs", "seen", "moved", "--bucket", bucket, "--image-key")
    assert "'000000298'" in refused(ddpm_here(*words, "000000299"), Exit.MISSING_INPUT)


def test_keys_are_those_in_the_tars(tmp_path):
    """A packed dataset lacks some images of its source, and others wrote the tars that are indexed."""
    files = [(f"{n}.png", b"broken" if n in (0, 3, 8) else png(n)) for n in range(10)]
    folder_of(tmp_path / "source", files)
    names = [f"{kind}/{name}" for kind in ("b", "a") for name in ("cat", "Dog", "owl.min")]
    tars = [tar_of(tmp_path / f"{n}.tar", [(f"{n}{name}.png", png(9)) for name in names]) for n in range(2)]
    at = ("--size", 16, "--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("data", "pack", tmp_path / "source", "packed", "--max-bad", 3, *at))
    succeeded(ddpm_here("data", "index", *tars, "foreign", *at))
    bucket = open_store(str(tmp_path / "bucket"))
    for key in ("datasets/packed-16", "datasets/foreign-16"):
        source = uncached_images(bucket, key, index := load_index(bucket, key)).source
        paths = [Path(shard.uri or tmp_path / "bucket" / key / shard.name) for shard in index.shards]
        expected = [Path(name).parent / Path(name).name.partition(".")[0] for path in paths for name in names_in(path)]
        keys = keys_of(source, np.arange(index.images))
        assert keys == list(map(str, expected))
        assert [find_image(source, key) for key in keys] == list(range(index.images))
        for unknown in ("", "000000003", "1b/cats", "~"):
            with pytest.raises(MissingInputError, match="has the key"):
                find_image(source, unknown)


def names_in(tar: Path) -> list[str]:
    with tarfile.open(tar) as file:
        return file.getnames()


SMOOTH, SIDE, PLANTED, IMAGES = 3.0, 8, 10, 100_000


def pictures(generator: np.random.Generator, count: int) -> np.ndarray:
    """Gradients in colour with a little grain, uint8 [count, 8, 8, 3]."""
    slopes = generator.normal(0, 60, (count, 2, 1, 1, 3)).astype(np.float32)
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)[:, None, None]
    colours = (
        generator.uniform(60, 190, (count, 1, 1, 3)) + slopes[:, 0] * ramp + slopes[:, 1] * ramp[:, 0][None, :, None]
    )
    return (colours + generator.normal(0, SMOOTH, (count, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def broken(kind: int, generator: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A picture as a failed decoder, a faulty sensor or a wrong file leaves it."""
    rows, columns = np.indices((SIDE, SIDE, 1))[:2]
    return [
        generator.integers(0, 256, picture.shape),
        255 * ((rows + columns) % 2),
        np.where(rows < SIDE // 2, picture, 0),
        np.where(columns % 2, picture, 255),
        255 * generator.integers(0, 2, (SIDE, SIDE, 1)),
    ][kind] * np.ones_like(picture)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_images_are_blamed(tmp_path, monkeypatch):
    """Ten broken images among 100,000, each from the place where it was learnt."""
    # So that each replay is short.
    monkeypatch.setattr(retention, "LAST_SAVES", 99)
    generator, folder = np.random.default_rng(0), tmp_path / "bucket/datasets/tiny-8"
    images = np.concatenate([pictures(generator, 10_000) for _ in range(IMAGES // 10_000)])
    order = Order((IMAGES,), 0).indices(np.arange(IMAGES))
    # From a tenth on: before, the network knows no image.
    numbers = np.sort(generator.choice(np.arange(IMAGES // 10, IMAGES), PLANTED, replace=False))
    for kind, number in enumerate(numbers):
        images[order[number]] = broken(kind % 5, generator, images[order[number]])
    folder.mkdir(parents=True)
    writer = ShardWriter(folder / "shard-00000.tar")
    for number, image in enumerate(images):
        writer.add(f"{number:09d}", encoded(Image.fromarray(image)), -1)
    shard, offsets = writer.finish()
    (folder / shard.offsets_name).write_bytes(offsets)
    facts = {"crop": "center", "resize_filter": "box", "source": "tests", "source_sha256": "0" * 64}
    index = DatasetIndex(name="tiny", size=SIDE, channels=3, shards=Shards.of([shard]), **facts)
    (folder / "index.json").write_bytes(index.to_json())

    small = {"model.channel_mults": "1", "model.attention_sizes": "4", "model.layers_per_level": "1"}
    small |= {"diffusion.timesteps": "1000", "train.batch_size": "500", "train.learning_rate": "3e-3"}
    small |= {"train.warmup_images": "0", "log.every_images": "500", "checkpoint.every_minutes": "0.02"}
    small |= {"checkpoint.keep_last": "99", "data.flip": "false"}
    sets = [word for key, value in (NETWORK | small).items() for word in ("--set", f"{key}={value}")]
    at = ("--bucket", tmp_path / "bucket")
    succeeded(ddpm_here("train", "--dataset", "tiny", "--epochs", 1, *sets, *at))
    planted = {f"{order[number]:09d}" for number in numbers}
    for number in numbers:
        sheet = tmp_path / f"{number}.png"
        told = succeeded(ddpm_here("runs", "blame", "tiny", "--around", number, "-o", sheet, *at)).splitlines()
        assert int(re.search(r", (\d+) times:", told[0])[1]) <= 12
        first = [line.split() for line in told[2:12]]
        here = [key for key, *_ in first if key in planted]
        assert [key for key, *_ in first][: len(here)] == here, "an innocent image comes before a broken one"
        assert [f"{order[number]:09d}", f"{number:,}"] in [row[:2] for row in first[: len(here)]]

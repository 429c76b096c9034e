"""Finished runs looked back at: their state at any image."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from job.exits import Exit, StoppedError
from job.requests import TrainRequest
from job.stop import Stop
from job.training.attempt import run_training
from job.training.session import TrainingSession
from tests.job.command_line import NETWORK, ddpm_here, refused, started, succeeded
from tests.job.hooked import hooked

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
        request = TrainRequest("tiles", bucket=str(bucket), run="moved", epochs=3, sets=sets)
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
    words = ("replay", "moved", "--bucket", bucket, "--image", 192, "--to", tmp_path / "to")
    hooks = hooked(tmp_path / "hooks", ddpm__training=SLOW_STEPS)
    process = started(*words, program=(sys.executable, "-m", "job"), PYTHONPATH=hooks)
    assert "a step\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == Exit.STOPPED, said
    assert time.monotonic() - asked < 10
    assert "stopped by SIGTERM after" in said and "Traceback" not in said
    assert not (tmp_path / "to").exists()
    assert before == {path for path in bucket.rglob("*") if path.is_file()}

"""Finished runs looked back at: their state at any image, the images of a spike, and where an image was learnt."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from job.exits import StoppedError
from job.requests import TrainRequest
from job.stop import Stop
from job.training.attempt import run_training
from job.training.session import TrainingSession
from tests.job.command_line import NETWORK, ddpm_here, succeeded

BATCH_IMAGES = 24
SETTINGS = NETWORK | {"model.dropout": "0.1", "ema.stds": "0.1", "data.augment": "0.5", "model.layers_per_level": "1"}
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
        assert record["replayed_from"].endswith(f"-{nearest:012d}" if nearest else "first weights")

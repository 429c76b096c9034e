"""A run that changes the number of its processes, its micro-batches and its cache learns what an undisturbed one does.

Real processes, watched from within: each writes down the images, the noise, the points and the losses of its steps.
"""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.runs.records import load_attempt
from tests.job.command_line import settings
from tests.job.hooked import hooked

BATCH_IMAGES, STEPS = 10, 50
STAGES = (
    (2, 80, ()),
    (1, 620, ("--set", "train.micro_batch_size=3", "--set", "data.cache_gigabytes=0.0001")),
    (3, 1150, ("--set", "train.micro_batch_size=null", "--set", "data.cache_gigabytes=1")),
)
"""Processes; at which image they are asked to stop; what else is different. All images together take 230 kB."""
ALL_THAT_IS_DRAWN = {"data__augment": "0.3", "data__crop_scale": "0.6,1", "ema__stds": "0.1"}
ALL_THAT_IS_DRAWN |= {"model__label_dropout": "0.3", "diffusion__self_conditioning": "true"}
ALL_THAT_IS_DRAWN |= {"diffusion__offset_noise": "0.1"}
RECORD = """
import hashlib, json, os, signal, threading
training_noise_of, image_losses, drawn_here = randomness.training_noise, Objective.losses, threading.local()
record = open(f"{os.environ['RECORD']}-{os.getpid()}.jsonl", "w", buffering=1)

def training_noise(seed, image_numbers, *how):
    drawn_here.numbers = image_numbers.tolist()
    return training_noise_of(seed, image_numbers, *how)

def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()

def losses(self, network, x_start, noise, drawn, condition, conditions_on_itself):
    found = image_losses(self, network, x_start, noise, drawn, condition, conditions_on_itself)
    rows = [row.tolist() for row in (*drawn, condition.labels, condition.augmentation) if row is not None]
    contents = map(sha256, x_start), map(sha256, noise), zip(*rows), [conditions_on_itself] * len(found)
    for number, *content, loss in zip(drawn_here.numbers, *contents, found.tolist(), strict=True):
        print(json.dumps([number, content, loss]), file=record)
    if drawn_here.numbers[0] >= int(os.environ["STOP_AT_IMAGE"]):
        os.kill(os.getpid(), int(os.environ.get("KILL", signal.SIGTERM)))
    return found

randomness.training_noise, Objective.losses = training_noise, losses
"""
HOLDS = """
import hashlib
resumes = TrainingAttempt._restore

def held(attempt):
    resumes(attempt)
    with open(f"{os.environ['HOLDS']}-{os.getpid()}", "w") as file:
        for group, named in attempt.state.tensors().items():
            tensors = b"".join(tensor.numpy().tobytes() for tensor in named.values())
            print(group, hashlib.sha256(tensors).hexdigest(), file=file)

import os
TrainingAttempt._restore = held
"""


@pytest.fixture
def started(place, tmp_path):
    """Starts a command whose processes write down what they do, and stop themselves at an image."""
    folder = hooked(tmp_path / "hooks", ddpm__training=RECORD)

    def started(run, stage, precision, processes, stop_at_image, *options, **variables):
        record, image = str(tmp_path / f"{run}-{stage}"), str(stop_at_image)
        network = settings(train__batch_size=str(BATCH_IMAGES), train__precision=precision, **ALL_THAT_IS_DRAWN)
        words = ("--epochs", 99, "--processes", processes, *network, *options)
        return place.started(run, *words, PYTHONPATH=folder, RECORD=record, STOP_AT_IMAGE=image, **variables)

    return started


def stopped(child):
    """Waits until it has saved everything and ended."""
    err, _ = child.communicate(timeout=250)
    assert child.returncode == 75, err


def recorded(folder, run, stage):
    """Image number → what was seen of it, and its loss; each must have come once."""
    paths = folder.glob(f"{run}-{stage}-*.jsonl")
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert [number for number, count in Counter(number for number, *_ in rows).items() if count > 1] == []
    return {number: (content, loss) for number, content, loss in rows}


def batch_losses(rows, first, last):
    """Mean loss of each global batch between two image numbers."""
    batches = (range(start, start + BATCH_IMAGES) for start in range(first, last, BATCH_IMAGES))
    return [sum(rows[number][1] for number in batch) / BATCH_IMAGES for batch in batches]


@pytest.mark.slow
def test_killed_and_moved_processes_leave_the_same_bits(place, started):
    """Five slots on 1 process; or on 2 that are asked to stop, 1 that is killed, 3 that die together, and 4."""
    words = ("--epochs", 2, "--set", "train.slots=5", "--set", "model.dropout=0.1", "--set", "sample.images=10")
    words += ("--set", "checkpoint.every_minutes=0.001")
    ended = started("stayed", 0, "fp32", 1, 10**9, *words)
    stopped(started("parted", 0, "fp32", 2, 130, *words))
    assert started("parted", 1, "fp32", 1, 250, *words, KILL="9").wait(250) == 137
    assert started("parted", 2, "fp32", 3, 400, *words, KILL="9").wait(250) not in (0, 75)
    moved = started("parted", 3, "fp32", 4, 10**9, *words)
    said, _ = moved.communicate(timeout=250)
    assert moved.returncode == ended.wait(250) == 0
    assert "rounding differs" not in said

    def result(name):
        run = place.run(name)
        ref = max(list_checkpoints(run))
        manifest = load_manifest(run, ref)
        losses = [row["loss"] for row in read_rows(run, manifest.metrics, pytest.fail)]
        assert manifest.groups == ("model", "ema", "ema-0.1", "optimizer")
        (grid,) = place.bucket.glob(f"runs/{name}/samples/epoch-0002*.png")
        return ref.fence, losses, [file.sha256 for file in manifest.files], np.array(Image.open(grid))

    (*whole, drawn), (*parted, drawn_again) = result("stayed"), result("parted")
    assert (whole[0], parted[0]) == (1, 4)
    assert whole[1:] == parted[1:]
    # The title above the pictures has the name of the run.
    assert not (drawn != drawn_again)[len(drawn) // 4 :].any()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound", "stages"), [("fp32", 1e-5, STAGES), ("bf16", 1e-2, STAGES[:2])])
def test_changing_processes_learn_the_same(place, started, tmp_path, precision, bound, stages):
    alone = started(f"alone-{precision}", 0, precision, 1, stages[-1][1] + 50)
    stopped_at, name = [0], f"moving-{precision}"
    run = place.run(name)
    for stage, (processes, stop_at_image, options) in enumerate(stages):
        stopped(started(name, stage, precision, processes, stop_at_image, *options))
        newest = load_manifest(run, max(list_checkpoints(run)))
        assert load_attempt(run, newest.fence).world_size == processes
        stopped_at.append(newest.images_seen)
    stopped(alone)
    expected = recorded(tmp_path, f"alone-{precision}", 0)
    assert sorted(expected) == list(range(len(expected)))
    assert len(expected) >= stopped_at[-1]
    for stage, (first, last) in enumerate(pairwise(stopped_at)):
        rows = recorded(tmp_path, name, stage)
        # A step that was left in its midst taught nothing.
        left = [rows.pop(number) for number in sorted(rows) if number >= last]
        assert len(left) <= BATCH_IMAGES
        assert sorted(rows) == list(range(first, last)), f"stage {stage}"
        assert all(rows[number][0] == expected[number][0] for number in rows), f"stage {stage}"
        until = min(last, first + STEPS * BATCH_IMAGES)
        assert stage == 0 or until - first == STEPS * BATCH_IMAGES
        found, whole = batch_losses(rows, first, until), batch_losses(expected, first, until)
        assert max(abs(a - b) / b for a, b in zip(found, whole, strict=True)) <= bound


@pytest.mark.slow
def test_all_processes_begin_with_the_weights_of_the_parent(place, tmp_path):
    """Averages too, with which each of them draws and validates; and several learn what one does."""
    more, folder = ("--set", "ema.stds=0.1", "--epochs", 1), hooked(tmp_path / "hooks", job__training__attempt=HOLDS)
    assert place.started("parent", *more).wait(250) == 0
    begins = (*more, "--from", "parent", "--processes")
    children = {
        name: place.started(name, *begins, processes, PYTHONPATH=folder, HOLDS=str(tmp_path / name))
        for name, processes in (("alone", 1), ("together", 2))
    }
    assert [child.wait(250) for child in children.values()] == [0, 0]
    held = {name: [path.read_text() for path in tmp_path.glob(f"{name}-*")] for name in children}
    assert [len(each) for each in held.values()] == [1, 2]
    (groups,) = {text for texts in held.values() for text in texts}
    by_group = dict(line.split() for line in groups.splitlines())
    assert by_group["model"] == by_group["ema"] == by_group["ema-0.1"] != by_group["optimizer"]

    def losses(name):
        run = place.run(name)
        return [
            row["loss"] for row in read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
        ]

    assert losses("together") == pytest.approx(losses("alone"), rel=1e-5)
    assert losses("alone")[0] < losses("parent")[0]

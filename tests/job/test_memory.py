"""Memory that runs out at any point of a run: it goes on with half, or the same command goes on from the last save."""

import re
from pathlib import Path

import pytest

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.store import open_store
from tests.job.command_line import ddpm, ran, refused, settings, succeeded
from tests.job.hooked import hooked

ROOT = Path(__file__).parents[2]
LITTLE_OF_A_STEP = """
losses = MicroBatch.losses

def with_little_memory(images, *others):
    if len(images.image_numbers) > 40:
        raise torch.OutOfMemoryError
    return losses(images, *others)

MicroBatch.losses = with_little_memory
"""
LITTLE_OF_A_RANK = """
whole = _pass

def _pass(model, config, images, device):
    if images > 40 and os.environ.get("RANK") == "1":
        raise torch.OutOfMemoryError
    whole(model, config, images, device)
"""
LESS_LATER = """
import os
losses = MicroBatch.losses

def with_little_memory(images, *others):
    if len(images.image_numbers) > 20 and images.image_numbers[0] > 400 and os.environ.get("RANK") == "1":
        raise torch.OutOfMemoryError
    return losses(images, *others)

MicroBatch.losses = with_little_memory
"""
CURES = ("model.gradient_checkpointing", "train.precision", "train.optimizer=adamw8bit", "ema.device=cpu", "size")
SMALLER = re.compile("from now on (.*) images at once per process")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket with the embedded images, a tenth of them held out."""
    bucket = tmp_path_factory.mktemp("memory") / "bucket"
    source = ROOT / "job/datasets/landscape-sample.zip"
    ran("data", "pack", source, "tiles", "--size", 16, "--hold-out", "10%", "--bucket", bucket)
    return bucket


def of_run(bucket, run):
    """The SHA-256 of each file of tensors at the end of a run, and its losses."""
    store = open_store(str(bucket)).sub(f"runs/{run}")
    manifest = load_manifest(store, max(list_checkpoints(store)))
    losses = [row["loss"] for row in read_rows(store, manifest.metrics, pytest.fail) if "loss" in row]
    return {file.name: file.sha256 for file in manifest.files if manifest.group_of(file)}, losses


@pytest.mark.slow
def test_memory_that_runs_out_in_a_step(bucket, tmp_path):
    """One process does the step again in halves; several agree on what fits them all, and end if that is not enough.

    The next attempt begins with what fitted.
    """
    of_both = {"ddpm__training": LITTLE_OF_A_STEP, "job__processes__compute": LITTLE_OF_A_RANK}
    few, fewer = hooked(tmp_path / "few", **of_both), hooked(tmp_path / "fewer", ddpm__training=LESS_LATER)
    sets = [*settings(train__batch_size="269"), "--set", "train.exact=false", "--set", "train.micro_batch_size=auto"]
    words = ("train", "--dataset", "tiles", "--bucket", bucket, *sets)
    attempts = [
        ("whole", 1, 2, "", 0, []),
        ("halved", 1, 1, few, 0, ["135", "68", "34"]),
        ("halved", 1, 2, few, 0, []),
        ("of-two", 2, 1, few, 0, ["34"]),
        ("of-two", 2, 2, fewer, Exit.NO_MEMORY, []),
        ("of-two", 2, 2, fewer, 0, []),
    ]
    for run, processes, epochs, hooks, code, smaller in attempts:
        options = ("--run", run, "--processes", processes, "--epochs", epochs)
        done = ddpm(*words, *options, PYTHONPATH=hooks)
        assert done.returncode == code, done.stderr
        assert SMALLER.findall(done.stderr) == smaller
    losses = {run: of_run(bucket, run)[1] for run in ("whole", "halved", "of-two")}
    assert losses["halved"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["of-two"] == pytest.approx(losses["whole"], rel=1e-4)


POINTS = [
    ("forward", "ddpm.training", "MicroBatch.losses", 0.7, 30, True, Exit.NO_MEMORY),
    ("forward-halved", "ddpm.training", "MicroBatch.losses", 0.7, 20, False, 0),
    ("backward", "ddpm.training", "autograd.grad", 0.7, 30, True, Exit.NO_MEMORY),
    ("backward-halved", "ddpm.training", "Tensor.backward", 0.9, 20, False, 0),
    ("optimizer", "ddpm.optimizer", "Adam.step", -1, 15, True, Exit.NO_MEMORY),
    ("save", "job.runs.writer", "CheckpointFiles.copy", -1, 1, True, Exit.NO_MEMORY),
    ("validation", "ddpm.objective", "Objective.bits_per_dim", 0.7, 1, True, 0),
    ("grid", "job.sampling.painter", "Painter.sample_alone", 0.7, 1, True, 0),
    ("score", "job.evaluation.evaluate", "features_of", 0.3, 1, True, 0),
]
"""The function that lacks memory, its share of what the last call took, the calls before, slots, and the exit code."""


@pytest.fixture(scope="module")
def undisturbed(bucket):
    """The words of a run, and what becomes of it, with slots and without."""
    more = {"sample.every_epochs": 1, "checkpoint.every_epochs": 1, "train.micro_batch_size": "auto"}
    more |= {"evaluate.extractor": "mobilenet", "evaluate.images": 16, "evaluate.references": 32}
    sets = [*settings(), *(word for key, value in more.items() for word in ("--set", f"{key}={value}"))]
    words = ("train", "--dataset", "tiles", "--bucket", bucket, "--epochs", 2, *sets)
    for exact in (True, False):
        succeeded(ddpm(*words, "--run", f"exact-{exact}".lower(), "--set", f"train.exact={exact}"))
    return words, {exact: of_run(bucket, f"exact-{exact}".lower()) for exact in (True, False)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module", "where", "share", "after_calls", "exact", "code"), POINTS)
def test_memory_that_runs_out_anywhere(
    bucket, undisturbed, tmp_path, name, module, where, share, after_calls, exact, code
):
    lines = f"from tests.little_memory import refusing\n{where} = refusing({where}, {share}, {after_calls})"
    hooks = hooked(tmp_path / "hooks", **{module.replace(".", "__"): lines})
    (words, expected), options = undisturbed, ("--run", name, "--set", f"train.exact={exact}")
    if name == "score":
        options += ("--set", "evaluate.every_epochs=1")
    done = ddpm(*words, *options, PYTHONPATH=f"{hooks}:{ROOT}")
    if code:
        line = refused(done, code)
        assert "memory ran out on the GPU" in line
        for cure in CURES:
            assert cure in line
        done = ddpm(*words, *options)
    succeeded(done)
    hashes, losses = of_run(bucket, name)
    assert hashes == expected[exact][0] if exact else losses == pytest.approx(expected[exact][1], rel=1e-4)

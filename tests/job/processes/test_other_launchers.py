"""`ddpm train` as ranks of torchrun and of accelerate: the same training and stopping; only the exit codes are flat."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from job.runs.checkpoints import RUN_CONFIG, list_checkpoints, load_manifest
from job.runs.records import load_attempt, read_status

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", "-m", "--", "job")
"""Without `--` torchrun takes `--run` for an abbreviation of an option of its own."""
ACCELERATE = (
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "job"),
)

pytestmark = pytest.mark.slow


def test_torchrun_and_accelerate_share_a_run(place):
    run = place.run("theirs")
    process = place.begun("theirs", program=TORCHRUN)
    process.terminate()
    err, _ = process.communicate(timeout=150)
    assert process.returncode == 1, err
    assert err.count("everything is saved, and the same command goes on from there") == 1
    assert read_status(run).state == "stopped"
    newest = load_manifest(run, max(list_checkpoints(run)))
    assert (newest.images_seen, load_attempt(run, newest.fence).world_size) == (read_status(run).images_seen, 2)
    epochs = newest.images_seen // 299 + 3
    ours = place.started("ours", "--epochs", epochs, "--processes", 2)
    theirs = place.started("theirs", "--epochs", epochs, program=ACCELERATE)
    for process in (theirs, ours):
        err, _ = process.communicate(timeout=150)
        assert process.returncode == 0, err
    found, expected = (load_manifest(run, max(list_checkpoints(run))) for run in (run, place.run("ours")))
    assert read_status(run).state == "finished"
    assert load_attempt(run, found.fence).world_size == 2
    there, wanted = ({file.name: file.sha256 for file in each.files} for each in (found, expected))
    # The runs began with different epochs.
    assert there | {RUN_CONFIG: ""} == wanted | {RUN_CONFIG: ""}


def test_an_error_becomes_code_1(place):
    for program in (TORCHRUN, ACCELERATE):
        process = place.started("refused", "--set", "train.batch_size=1", program=program)
        err, _ = process.communicate(timeout=150)
        assert process.returncode == 1
        said = r"^ddpm(?: \(rank 1\))?: 2 processes cannot share train\.batch_size=1 images"
        assert re.search(said, err, re.MULTILINE)
        assert "ddpm/" not in err, "a traceback of ours"

"""Memory that runs out: on the machine for real, on a GPU as PyTorch says it."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch

from job.__main__ import errors_as_lines
from tests.job.command_line import DDPM, ddpm, refused, settings, succeeded
from tests.job.hooked import hooked

LITTLE_MEMORY = """
import resource
from pathlib import Path

train_with_all_memory = run_training

def run_training(*arguments):
    in_use_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use_bytes + 1000 * 2**20,) * 2)
    return train_with_all_memory(*arguments)
"""


@pytest.mark.slow
def test_on_the_machine(tmp_path):
    place = ("--bucket", tmp_path / "bucket")
    variables = {
        "PYTHONPATH": hooked(tmp_path / "hooks", job__training__session=LITTLE_MEMORY),
        "DDPM_CACHE": str(tmp_path / "cache"),
    }
    succeeded(ddpm("data", "ensure", "landscape-sample", *place))
    sets = settings(
        model__channels="32", train__batch_size="299", checkpoint__every_minutes="60", sample__every_epochs="0"
    )
    words = ("train", "--dataset", "landscape-sample", "--epochs", 1, *place, *sets)
    said = refused(ddpm(*words, **variables), 1)
    assert "memory ran out on the machine" in said
    assert "smaller train.micro_batch_size" in said
    succeeded(ddpm(*words, "--set", "train.micro_batch_size=16", **variables))


def test_a_limit_below_the_program_itself(tmp_path):
    said = refused(ddpm("data", "list", "--bucket", tmp_path, program=("prlimit", "--as=60000000", DDPM)), 1)
    assert re.search(r"ran out on the machine \(\S+\.so\S* failed to map segment\): allow more \(`ulimit -a`\)", said)


def test_as_it_is_said(capsys):
    gpu = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
    errors = {
        "memory ran out on the GPU (Tried to allocate 2.00 GiB)": torch.OutOfMemoryError(gpu),
        "memory ran out on the machine:": MemoryError(),
        "memory ran out on the machine (could not create a primitive)": RuntimeError("could not create a primitive"),
        "memory ran out on the machine ([Errno 12] Cannot allocate memory): allow more": OSError(
            errno.ENOMEM, os.strerror(errno.ENOMEM)
        ),
        "memory ran out on the machine (can't start new thread): allow more": RuntimeError("can't start new thread"),
    }
    for said, error in errors.items():
        with pytest.raises(SystemExit) as end, errors_as_lines():
            raise error
        assert end.value.code == 1
        assert said in capsys.readouterr().err

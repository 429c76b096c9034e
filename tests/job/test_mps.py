"""Commands on a stand-in for Apple's GPU, which refuses what MPS lacks: see `tests/mps.py`."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from ddpm.device import best_device
from job.python import Run
from tests.job.command_line import ran, settings
from tests.mps import MPS, stand_in

LEARNT_VARIANCE = {
    "diffusion__variance": "learned_range",
    "diffusion__weighting": "plain",
    "diffusion__prediction": "epsilon",
    "diffusion__self_conditioning": "true",
    "data__augment": "0.3",
    "data__crop_scale": "[0.5,1]",
    "model__label_dropout": "0.2",
    "train__micro_batch_size": "8",
    "log__validate_images": "24",
}
MATRICES = {
    "train__optimizer": "muon",
    "train__exact": "true",
    "train__slots": "3",
    "diffusion__schedule": "flow",
    "diffusion__prediction": "flow",
    "diffusion__weighting": "plain",
    "diffusion__draws": "log_normal",
    "diffusion__offset_noise": "0.1",
    "model__dropout": "0.1",
    "ema__stds": "0.1",
}
SAMPLES = ("--seeds", "0-3", "--gif"), ("--count", 6, "--sampler", "ddpm", "--steps", 6, "--guidance", 1.5)
EVALUATES = ("--extractor", "mobilenet", "--count", 12, "--references", 24, "--metrics", "fid,kid")


@pytest.mark.slow
@pytest.mark.parametrize("options", [LEARNT_VARIANCE, MATRICES])
def test_commands_compute_on_apples_gpu(tiles, tmp_path, options):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")

    def learn(run: str) -> list[dict]:
        sets = settings(**{"train__exact": "false", "model__label_dropout": "0.2", **options})
        ran("train", "--dataset", "tiles", "--run", run, "--bucket", bucket, "--epochs", 1, *sets)
        return [row for row in Run(run, str(bucket)).metrics() if "loss" in row]

    with stand_in() as mps:
        losses = [row["loss"] for row in learn("mps")]
        assert mps.functions > 10_000
        for words in SAMPLES:
            ran("sample", "--run", "mps", "--bucket", bucket, *words)
        before = mps.functions
        ran("evaluate", "--run", "mps", "--bucket", bucket, *EVALUATES)
        assert mps.functions > before + 100
        assert {row["memory_bytes"] for row in Run("mps", str(bucket)).metrics() if "loss" in row} == {7 << 20}
    # The CPU computes both, with other kernels for parts of a batch.
    assert losses == pytest.approx([row["loss"] for row in learn("cpu")], rel=1e-4)


def test_several_processes_of_a_mac_share_its_cpu():
    with stand_in():
        assert [best_device(processes).type for processes in (1, 2)] == ["mps", "cpu"]


REFUSED = {
    "special_log_ndtr": lambda x: torch.special.log_ndtr(x),
    "float64: zeros": lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
    "float64: _to_copy": lambda x: x.double(),
    "complex128": lambda x: torch.ones(3, dtype=torch.complex128).to(MPS),
    "of mps and of the host": lambda x: x + torch.ones(4),
    "to numpy": lambda x: x.numpy(),
    "beside the host": lambda x: torch.ones(4).to(MPS, non_blocking=True),
    "bicubic": lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 2, device=MPS), mode="bicubic", align_corners=True),
    "border": lambda x: F.grid_sample(x, x.new_zeros(1, 4, 4, 2), padding_mode="border", align_corners=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_stand_in_refuses_what_mps_lacks(what):
    with stand_in(), pytest.raises((NotImplementedError, RuntimeError, TypeError), match=what):
        REFUSED[what](torch.ones(1, 1, 4, 4, device=MPS))

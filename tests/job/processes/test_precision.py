"""The precision that a run has if nobody chose one."""

import pytest
import torch

from job.processes.compute import best_precision


@pytest.mark.parametrize(
    ("computes_bf16", "capability", "expected"),
    [
        pytest.param(True, (9, 0), "bf16", id="H100"),
        pytest.param(False, (7, 5), "fp16", id="T4"),
        pytest.param(False, (7, 0), "fp16", id="V100"),
        pytest.param(False, (6, 1), "fp32", id="P40, which computes fp16 at a sixty-fourth of the rate"),
    ],
)
def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch, computes_bf16, capability, expected):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert best_precision() == expected


@pytest.mark.parametrize(("capabilities", "expected"), [({"amx_bf16": True}, "bf16"), ({"amx_fp16": True}, "fp32")])
def test_a_cpu_computes_in_fp16_only_if_asked(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert best_precision() == expected

"""The initial weights of Ho et al.'s network; `tests/ddpm/test_interop.py` compares what it computes with diffusers."""

import pytest
import torch

from ddpm.networks.unet import UNet


def test_fresh_network_has_ho_initialisation() -> None:
    torch.manual_seed(0)
    network = UNet(image_size=16, channels=32, channel_mults=(1, 2), attention_sizes=(8,))
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or any(part in name for part in ("conv2.", "to_out.", "conv_out.")):
            assert torch.count_nonzero(parameter) == 0, name
        elif "norm" not in name:
            pixels = parameter[0, 0].numel()
            limit = (6 / (pixels * (parameter.shape[0] + parameter.shape[1]))) ** 0.5
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name

"""The optimiser against PyTorch's own, and the learning rate against diffusers' and against its formula."""

import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn

from ddpm.catalogue import Train
from ddpm.optimizer import Adam, Muon, learning_rate_at


def test_steps_equal_adam_and_adamw() -> None:
    for weight_decay in (0.0, 0.1):
        torch.manual_seed(0)
        ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
        theirs.load_state_dict(ours.state_dict())
        options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
        peer = (torch.optim.AdamW if weight_decay else torch.optim.Adam)(theirs.parameters(), fused=True, **options)
        train = Train(adam_betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=weight_decay)
        optimizer = Adam(ours.named_parameters(), train)
        for step in range(5):
            rate = 1e-2 / (step + 1)
            for group in peer.param_groups:
                group["lr"] = rate
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
            optimizer.step(rate)
            peer.step()
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(one, other), (weight_decay, step)


def test_muon_takes_orthogonal_steps() -> None:
    """Matrices against PyTorch's own, which computes in bf16, and convolutions against numpy; the rest is Adam's."""
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50), nn.Conv2d(8, 24, 3)), nn.Linear(40, 30)
    theirs.load_state_dict(ours[0].state_dict())
    peer = torch.optim.Muon([theirs.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([theirs.bias], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    optimizer = Muon(ours.named_parameters(), Train(weight_decay=0.1))
    assert not {"0.weight", "2.weight"} & set(optimizer.exp_avg_sq)
    begun = ours[2].weight.detach().clone()
    for step in range(4):
        for parameter in ours.parameters():
            parameter.grad = torch.randn_like(parameter)
        theirs.weight.grad, theirs.bias.grad = ours[0].weight.grad.clone(), ours[0].bias.grad.clone()
        optimizer.step(1e-2)
        peer.step()
        adam.step()
        # A step has a size of about 0.01: bf16 has eight bits.
        assert (ours[0].weight - theirs.weight).abs().max() < 4e-4, step
        assert torch.allclose(ours[0].bias, theirs.bias, atol=1e-7), step
        if not step:
            turned = (begun * (1 - 1e-2 * 0.1) - ours[2].weight.detach()).numpy().reshape(24, 72)
            sizes = np.linalg.svd(turned / (1e-2 * 0.2 * 72**0.5), compute_uv=False)
            assert sizes.min() > 0.65 and sizes.max() < 1.25


def test_learning_rate_follows_images_seen() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    peer = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=20)
    train = Train(24, None, 2e-4, 4 * 24, "cosine", 20 * 24)
    for step in range(25):
        # Theirs begins with a step at a learning rate of zero.
        theirs = peer.get_last_lr()[0] if step >= 4 else 2e-4 * (step + 1) / 4
        if step <= 20:
            assert learning_rate_at(train, 24 * step) == pytest.approx(theirs, abs=1e-18), step
        optimizer.step()
        peer.step()
    assert learning_rate_at(train, 24 * 21) == learning_rate_at(train, 24 * 20) == 0
    train = Train(24, None, 2e-4, 48, "inverse_root", 24 * 4)
    found = [learning_rate_at(train, 24 * step) / 2e-4 for step in (0, 1, 4, 16, 36)]
    assert found == pytest.approx([0.5, 1, 1, 1 / 2, 1 / 3])

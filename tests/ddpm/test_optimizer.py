"""The optimiser against PyTorch's own, and the learning rate against diffusers' and against its formula."""

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn

from ddpm.catalogue import Train
from ddpm.optimizer import Adam, learning_rate_at


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

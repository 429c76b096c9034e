"""Threads that share a batch: the same learning and the same images, whichever thread is late."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddpm import networks, training
from ddpm.augment import Augmentation
from ddpm.catalogue import Diffusion, Train, UNetConfig
from ddpm.ema import Exponential
from ddpm.objective import Condition, Objective
from ddpm.process import Prediction, make_process
from ddpm.slots import Slots
from ddpm.state import create_state
from ddpm.threads import Threads, group_of

SIZE = 8


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = networks.build(
        "unet", image_size=SIZE, in_channels=3, out_channels=3, channels=8, channel_mults=(1, 2), attention_sizes=(4,),
        norm_groups=4, num_classes=3,
    )  # fmt: skip
    for parameter in network.parameters():
        # The last layers begin at zero.
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return network


class Late(nn.Module):
    """Each thread is late by another time, as on a busy machine."""

    def __init__(self, network: nn.Module, seconds: float) -> None:
        super().__init__()
        self.network, self.seconds = network, seconds

    def forward(self, *inputs: object) -> Tensor:
        time.sleep(self.seconds * random.random())
        return self.network(*inputs)


def learnt(threads: Threads | None, seconds: float = 0.0, micro_batch_size: int | None = None) -> dict[str, Tensor]:
    """The weights after four steps of seven images, in three slots."""
    train = Train(batch_size=7, learning_rate=1e-2, micro_batch_size=micro_batch_size)
    diffusion = Diffusion(prediction="v", schedule="cosine")
    settings = training.LoopSettings(
        train, UNetConfig(num_classes=3), {"ema": Exponential()}, Augmentation(True, (1.0, 1.0), 0.0)
    )
    state = create_state(small_network(), settings.train, settings.averages)
    images = np.random.default_rng(0)
    batches = [
        SimpleNamespace(
            image_numbers=np.arange(7 * step, 7 * step + 7),
            images=torch.from_numpy(images.integers(0, 256, (7, 3, SIZE, SIZE), dtype=np.uint8)),
            labels=torch.arange(7) % 3,
        )
        for step in range(4)
    ]
    objective = Objective(make_process(diffusion), Prediction("v"), diffusion)
    hooks = training.Hooks(lambda state: False)
    network = Late(state.model, seconds) if seconds else state.model
    training.train(state, network, batches, objective, settings, Accelerator(cpu=True), hooks, Slots(3, 7), threads)
    assert state.log.sums[1, 0] == 28
    return {name: value.detach().clone() for name, value in state.model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_late_threads_change_no_bit(micro_batch_size: int | None) -> None:
    alone = learnt(None, micro_batch_size=micro_batch_size)
    for count in (1, 3):
        late = learnt(Threads(count), 0.02 * (count > 1), micro_batch_size)
        assert all(torch.equal(value, late[name]) for name, value in alone.items())
    begun = dict(small_network().named_parameters())
    assert not any(torch.equal(value, begun[name]) for name, value in alone.items())


def test_shared_network_gives_the_same_answers() -> None:
    network, threads = small_network().eval(), Threads(2)
    x, t, labels = torch.randn(5, 3, SIZE, SIZE), torch.arange(5.0), torch.arange(5) % 3
    shared = threads.sharing(network, lambda: torch.autocast("cpu", enabled=False), 2)
    for rows in (slice(0, 5), slice(0, 1)):
        answer = shared(x[rows], t[rows], Condition(labels[rows]))
        assert not answer.requires_grad
        torch.testing.assert_close(answer, network(x[rows], t[rows], Condition(labels[rows])).detach())
    with torch.inference_mode():
        assert shared(x, t, Condition(labels)).is_inference()


def test_threads_compute_alone_and_in_order() -> None:
    usual, parts = torch.get_num_threads(), [slice(3, 5), slice(5, 8), slice(8, 9)]
    for each in (1, 2):
        threads = Threads(2, each)
        found = list(threads.map(lambda part: (part, torch.get_num_threads()), parts))
        assert found == [(part, each) for part in parts]
        with threads.outside():
            assert torch.get_num_threads() == each
        assert torch.get_num_threads() == usual
    with pytest.raises(ZeroDivisionError):
        list(threads.map(lambda part: 1 // (part.start - 5), parts))


def test_groups_are_small_and_an_even_number() -> None:
    assert [group_of(images) for images in (1, 2, 8, 10, 16, 20, 32, 40, 64)] == [1, 1, 4, 5, 8, 5, 8, 7, 8]
    assert max(map(group_of, range(1, 1000))) == 8

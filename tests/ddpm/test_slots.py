"""Slots: any number of processes learns and logs the same bits, and what one plain sum of gradients says."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from ddpm import networks, training
from ddpm.augment import Augmentation
from ddpm.catalogue import NETWORKS, Diffusion, Train
from ddpm.ema import Exponential, PowerFunction
from ddpm.networks.layers import Dropout, dropout_of
from ddpm.objective import Objective
from ddpm.process import Prediction, make_process
from ddpm.slots import Slots, kernels_of, subtrees
from ddpm.state import create_state
from ddpm.threads import Threads

BATCH_IMAGES, SIZE, STEPS, CLASSES = 16, 8, 2, 3
WORLDS = (1, 2, 3, 4, 5, 7, 8)
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": 8, "channel_mults": (1, 2), "norm_groups": 4, "attention_sizes": (4,), "layers_per_level": 1},
    "edm2": {"channels": 8, "channel_mults": (1, 2), "head_channels": 8, "attention_sizes": (4,), "uncertainty": True},
    "dit": {"width": 16, "depth": 2, "heads": 2},
}
CASES = [
    *({"kind": kind, "dropout": dropout} for kind, dropout in product(SMALL, (0.0, 0.1))),
    {"kind": "unet", "dropout": 0.1, "micro_batch_size": 1, "memory_format": torch.channels_last},
    {"kind": "unet", "dropout": 0.1, "precision": torch.bfloat16, "recompute": True},
    {"kind": "unet", "dropout": 0.0, "optimizer": "muon"},
]


class Autocast(nn.Module):
    """A network under autocast in any thread."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, *inputs: object) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.network(*inputs)


def learnt(
    slots: Slots | None,
    *,
    kind: str,
    dropout: float,
    precision: torch.dtype = torch.float32,
    recompute: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    micro_batch_size: int | None = None,
    optimizer: str = "adam",
) -> dict[str, Tensor]:
    """Weights, moments, averages and sums of the losses after some steps of all that is drawn."""
    train = Train(BATCH_IMAGES, learning_rate=0.01, micro_batch_size=micro_batch_size, optimizer=optimizer)
    schedule, prediction = ("edm", "edm") if kind == "edm2" else ("cosine", "v")
    diffusion = Diffusion(schedule=schedule, prediction=prediction, self_conditioning=kind != "dit")
    averages = {"ema": Exponential(0.9, "none"), "ema-0.1": PowerFunction(0.1)}
    augmentation = Augmentation(True, (0.7, 1.0), 0.3 * (kind != "dit"))
    settings = training.LoopSettings(
        train, NETWORKS[kind](num_classes=CLASSES, label_dropout=0.1), averages, augmentation
    )
    torch.manual_seed(0)
    model = networks.build(
        kind,
        image_size=SIZE,
        in_channels=3,
        out_channels=3,
        num_classes=CLASSES,
        null_class=True,
        dropout=dropout,
        self_conditioning=diffusion.self_conditioning,
        augmentation_labels=augmentation.labels,
        gradient_checkpointing=recompute,
        **SMALL[kind],
    )
    for parameter in model.parameters():
        # Some layers begin at zero.
        parameter.data += 0.02 * torch.randn(parameter.shape)
    model.to(memory_format=memory_format)
    state = create_state(model, settings.train, settings.averages)
    places, images = list(slots.places if slots else range(BATCH_IMAGES)), np.random.default_rng(0)
    batches = [
        SimpleNamespace(
            image_numbers=np.arange(BATCH_IMAGES * step, BATCH_IMAGES * (step + 1))[places],
            images=torch.from_numpy(images.integers(0, 256, (BATCH_IMAGES, 3, SIZE, SIZE), dtype=np.uint8))[places],
            labels=(torch.arange(BATCH_IMAGES) % CLASSES)[places],
        )
        for step in range(STEPS)
    ]
    objective = Objective(make_process(diffusion), Prediction(prediction, diffusion.sigma_data), diffusion)
    hooks, threads = training.Hooks(lambda state: False), Threads(2 if slots and slots.world_size == 1 else 1)
    accelerator = SimpleNamespace(num_processes=1, backward=Tensor.backward)
    with threads.outside():
        how = {"settings": settings, "accelerator": accelerator, "hooks": hooks, "slots": slots, "threads": threads}
        training.train(state, Autocast(model, precision), batches, objective, **how)
    found = {f"{group}.{name}": value for group, of in state.tensors().items() for name, value in of.items()}
    return found | {"losses": state.log.reduced()}


def learn_in_groups(rank: int, folder: Path) -> None:
    """Learns every case in groups of each size, the first processes of all; writes down a hash of each."""
    for world_size in WORLDS[sum(rank >= count for count in WORLDS) :]:
        if world_size > 1:
            dist.init_process_group("gloo", f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size)
        slots = Slots(8, BATCH_IMAGES, rank, world_size)
        for number, case in enumerate(CASES):
            tensors = learnt(slots, **case)
            content = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
            (folder / f"{number}-{world_size}-{rank}").write_text(hashlib.sha256(content).hexdigest())
        if world_size > 1:
            dist.destroy_process_group()


@pytest.mark.slow
def test_any_number_of_processes_learns_the_same_bits(tmp_path: Path) -> None:
    multiprocessing.spawn(learn_in_groups, (tmp_path,), max(WORLDS))
    found = [{path.read_text() for path in tmp_path.glob(f"{number}-*")} for number in range(len(CASES))]
    assert [len(hashes) for hashes in found] == [1] * len(CASES)
    assert len(set.union(*found)) == len(CASES)
    assert len(list(tmp_path.glob("*-*-*"))) == len(CASES) * sum(WORLDS)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", SMALL)
def test_slots_add_up_to_the_whole_gradient(kind: str, memory_format: torch.memory_format) -> None:
    """PyTorch's backward pass over all images at once is the judge."""
    whole = learnt(None, kind=kind, dropout=0.0)
    of_slots = learnt(Slots(5, BATCH_IMAGES), kind=kind, dropout=0.0, memory_format=memory_format)
    for name, value in whole.items():
        if not name.startswith("optimizer"):
            # Adam divides by the size of a gradient: where that is rounding alone, so is the step.
            torch.testing.assert_close(of_slots[name], value, rtol=2e-3, atol=2e-3)


def test_dropout_depends_on_the_images_and_the_layer() -> None:
    model = networks.build(
        "unet", image_size=8, in_channels=3, out_channels=3, num_classes=0, dropout=0.5, **SMALL["unet"]
    )
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    ones = torch.ones(200, 200)
    masks = []
    for seed, first_image in ((0, 0), (0, 16), (1, 0)):
        with dropout_of(seed, first_image):
            masks += [layer(ones) for layer in layers]
            assert all(
                torch.equal(layer(ones), mask) for layer, mask in zip(layers, masks[-len(layers) :], strict=True)
            )
    for mask in masks:
        assert mask.unique().tolist() == [0.0, 2.0]
        # The standard deviation is 0.005.
        assert abs(mask.mean() - 1) < 0.025
    agree = [(a == b).double().mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert all(abs(share - 0.5) < 0.02 for share in agree)


def test_processes_share_slots_and_images() -> None:
    for count, batch_size, world_size in product((1, 5, 6, 8, 13), (13, 16, 100), (1, 2, 3, 5)):
        if world_size > count:
            continue
        ranks = [Slots(count, batch_size, rank, world_size) for rank in range(world_size)]
        assert [slot for slots in ranks for slot in slots.own] == list(range(count))
        assert [place for slots in ranks for place in slots.places] == list(range(batch_size))
        assert max(len(slots.own) for slots in ranks) - min(len(slots.own) for slots in ranks) <= 1
        for slots in ranks:
            parts = slots.parts()
            assert [i for part in parts for i in range(len(slots.places))[part]] == list(range(len(slots.places)))
            # A slot holds the same images whoever holds it.
            starts = [slots.places[part.start] for part in parts]
            assert starts == [batch_size * slot // count for slot in slots.own]
    with pytest.raises(ValueError, match="8 slots: use 9 to 16"):
        Slots(8, 16, world_size=9)


def test_few_sums_cross_the_wire() -> None:
    assert subtrees((0, 8), range(3, 8)) == [(3, 4), (4, 8)]


def test_the_fingerprint_of_kernels_depends_on_no_threads_and_on_the_precision():
    usual, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((kernels_of(False), kernels_of(True)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(usual)
    assert found == [found[0]] * 3 and found[0][0] != found[0][1]

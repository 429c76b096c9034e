"""Frozen parts of a network: no step, decay, normalisation or average changes a bit of them, and the others learn."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ddpm import networks, training
from ddpm.augment import Augmentation
from ddpm.catalogue import NETWORKS, OF_CLASSES, Diffusion, Train
from ddpm.ema import Exponential, PowerFunction
from ddpm.objective import Objective
from ddpm.process import Prediction, make_process
from ddpm.slots import Slots
from ddpm.state import create_state
from tests.ddpm.networks.test_networks import SMALL
from tests.ddpm.networks.weights import randomise

SIZES = SMALL | {"edm2": SMALL["edm2"] | {"uncertainty": True}}


def network_of(kind: str, num_classes: int = 3) -> torch.nn.Module:
    """A network with all its inputs, whose weights have no unit magnitude."""
    labels = {"augmentation_labels": 9} if NETWORKS[kind].takes_estimates else {}
    shape = {"image_size": 16, "in_channels": 3, "out_channels": 3, "num_classes": num_classes}
    network = networks.build(kind, **shape, **labels, **SIZES[kind])
    randomise(network)
    return network


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_catalogue_names_the_parts(kind: str) -> None:
    learnt = [name for name, parameter in network_of(kind).named_parameters() if parameter.requires_grad]
    assert {name.partition(".")[0] for name in learnt} == {*NETWORKS[kind].parts.split()}
    assert "parts" not in {field.name for field in fields(NETWORKS[kind])}
    three, four = ({name: p.shape for name, p in network_of(kind, n).named_parameters()} for n in (3, 4))
    assert (
        {name for name in three if three[name] != four[name]} == {n for n in three if n.startswith(OF_CLASSES)} != set()
    )


@pytest.mark.parametrize(
    ("kind", "freeze", "slots"),
    [
        ("unet", ("down", "time_embedding", "conv_out"), None),
        ("unet", ("conv", "mid"), Slots(3, 4)),
        ("edm2", ("encoder", "conv", "class", "unc"), None),
        ("dit", ("blocks",), None),
    ],
)
def test_frozen_parts_keep_every_bit(kind: str, freeze: tuple[str, ...], slots: Slots | None) -> None:
    train = Train(batch_size=4, learning_rate=0.1, weight_decay=0.1, freeze=freeze)
    schedule, prediction = ("edm", "edm") if kind == "edm2" else ("cosine", "v")
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    averages = {"ema": Exponential(0.9, "none"), "ema-0.1": PowerFunction(0.1)}
    settings = training.LoopSettings(
        train, NETWORKS[kind](num_classes=3), averages, Augmentation(True, (1.0, 1.0), 0.5)
    )
    state = create_state(network_of(kind), settings.train, settings.averages)
    before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    numbers = [np.arange(4 * step, 4 * step + 4) for step in range(3)]
    batches = [SimpleNamespace(image_numbers=each, images=images, labels=torch.arange(4) % 3) for each in numbers]
    objective = Objective(make_process(diffusion), Prediction(prediction), diffusion)
    hooks = training.Hooks(lambda state: False)
    training.train(state, state.model, batches, objective, settings, Accelerator(cpu=True), hooks, slots)

    frozen = {name for name in before if name.startswith(freeze)}
    never_learnt = {name for name in before if name.endswith(("frequencies", "phases"))}
    tensors = state.tensors()
    for group in ("model", "ema", "ema-0.1"):
        equal = {name for name, value in before.items() if torch.equal(value, tensors[group][name])}
        assert frozen and equal == frozen | never_learnt, group
    moments = {name.partition(".")[2] for name in tensors["optimizer"]}
    assert moments == before.keys() - frozen

"""Builds the objects of `ddpm` from a configuration: network, process, objective, settings of training and sampling."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from ddpm import networks, training
from ddpm.augment import Augmentation
from ddpm.consistency import TEACHER, ConsistencyObjective
from ddpm.ema import EMA, Exponential, HostEMA, PowerFunction, Profile
from ddpm.model import Sampling
from ddpm.networks import memory_format_of
from ddpm.networks.adapter import build_adapted, check_adapted
from ddpm.objective import Condition, Network, Objective
from ddpm.process import Prediction, Process, make_process
from ddpm.state import TrainState, create_state
from job.config import RunConfig
from job.config.schema import OwnSection, SamplerConfig
from job.exits import BadConfigError, BadRequestError
from job.own_code import network_named


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """Builds the network of a resolved configuration with initial weights, in the memory layout for the device.

    They depend on the run's seed; after a parent on those weights and the dataset too. By an equal seed alone, classes
    that begin anew would begin as the first classes of the parent began.
    """
    seed, parent = config.train.seed, config.parent.sha256
    if parent:
        seed = int(hashlib.sha256(f"{seed} {parent} {config.data.dataset_id}".encode()).hexdigest()[:16], 16)
    torch.manual_seed(seed)
    model, diffusion, (channels, *_) = config.model, config.diffusion, config.image_shape
    if isinstance(model, OwnSection):
        return _own_network(config, model, device)
    options = asdict(model) | {"num_classes": model.num_classes or 0}
    del options["label_dropout"]
    network = networks.build(
        image_size=config.image_size,
        in_channels=channels,
        out_channels=channels * (1 + diffusion.learns_variance),
        null_class=classes_of(config) > options["num_classes"],
        self_conditioning=diffusion.self_conditioning,
        augmentation_labels=settings_of(config).augmentation.labels,
        condition_channels=config.condition.channels,
        vector_size=config.condition.vector,
        condition_noise=config.condition.noise > 0,
        **options,
    )
    return network.to(device=device, memory_format=memory_format_of(device))  # type: ignore[call-overload]


def _own_network(config: RunConfig, model: OwnSection, device: torch.device) -> nn.Module:
    """Builds the network of a user.

    Raises:
        BadRequestError: no command named its file, or its code raises an error.
    """
    own, (channels, *_) = network_named(model.sha256, model.file, model.network), config.image_shape
    with own.faults():
        network = build_adapted(
            own.load(),
            config.network,
            image_shape=config.image_shape,
            num_classes=classes_of(config),
            out_channels=channels * (1 + config.diffusion.learns_variance),
            augmentation_labels=settings_of(config).augmentation.labels,
            condition_channels=config.condition.channels,
            vector_size=config.condition.vector,
        )
        return network.to(device=device, memory_format=memory_format_of(device))  # type: ignore[call-overload]


def classes_of(config: RunConfig) -> int:
    """Returns the number of classes of the network, with that for images without a class; 0 without classes."""
    count = config.model.num_classes or 0
    return count + (count > 0 and config.model.label_dropout > 0)


def condition_of_zeros(config: RunConfig, images: int, device: torch.device) -> Condition:
    """Returns inputs as the network gets them in training, for this number of images."""
    (_, *size), condition, augmentation = config.image_shape, config.condition, settings_of(config).augmentation
    zeros = partial(torch.zeros, device=device)
    return Condition(
        zeros(images, dtype=torch.int64) if config.model.num_classes else None,
        zeros(images, *config.image_shape) if config.diffusion.self_conditioning else None,
        zeros(images, augmentation.labels) if augmentation.labels else None,
        zeros(images, condition.channels, *size) if condition.channels else None,
        zeros(images) if condition.noise else None,
        zeros(images, condition.vector + 1) if condition.vector else None,
    )


def check_own_network(network: nn.Module, config: RunConfig) -> None:
    """Checks that a network of the user can train as others do; see `check_adapted`.

    Raises:
        BadRequestError: it cannot, or its code raises an error.
        BadConfigError: it has no such part to freeze.
    """
    model, (channels, *_) = config.model, config.image_shape
    assert isinstance(model, OwnSection)
    device = next(network.parameters()).device
    condition = condition_of_zeros(config, 2, device)
    own, names = network_named(model.sha256, model.file, model.network), dict(network.named_parameters())
    if unknown := [part for part in config.train.freeze if not any(name.startswith(part) for name in names)]:
        raise BadConfigError(f"train.freeze: {model.network} has no parameter that begins with {unknown[0]!r:.100}")
    torch.manual_seed(config.train.seed + 1)
    others = dict(_own_network(config, model, device).named_buffers())
    for name, buffer in network.named_buffers():
        if not torch.equal(buffer, others[name]):
            how = "checkpoints have no buffers: make it a parameter with requires_grad=False"
            raise BadRequestError(f"{model.network} draws the buffer {name} at random, and {how}")
    with own.faults():
        check_adapted(network, config.image_shape, channels * (1 + config.diffusion.learns_variance), condition)


def process_of(config: RunConfig) -> Process:
    """Returns the process from an image to noise."""
    return make_process(config.diffusion)


def prediction_of(config: RunConfig) -> Prediction:
    """Returns the meaning of the network's output."""
    return Prediction(config.diffusion.prediction, config.diffusion.sigma_data)


def objective_of(config: RunConfig, teacher: Network | None = None) -> Objective:
    """Returns the training loss; a run that `has_teacher` needs its network."""
    parts = process_of(config), prediction_of(config), config.diffusion, config.sample, 2**config.data.bits
    if config.diffusion.objective == "consistency":
        return ConsistencyObjective(*parts, config.consistency, teacher, config.model.num_classes or 0)
    return Objective(*parts)


def settings_of(config: RunConfig) -> training.LoopSettings:
    """Returns the settings of the training loop."""
    ema, data = config.ema, config.data
    averages: dict[str, Profile] = {"ema": Exponential(**asdict(ema))}
    averages |= dict(zip(ema.names, map(PowerFunction, ema.stds), strict=True))
    augmentation = Augmentation(data.flip, data.crop_scale, data.augment)
    return training.LoopSettings(config.train, config.model, averages, augmentation, conditioning=config.condition)


def initial_state(network: nn.Module, config: RunConfig, rank: int = 0, world_size: int = 1) -> TrainState:
    """Returns the state of training before the first image; collective if processes divide it."""
    kind = HostEMA if config.ema.device == "cpu" else EMA
    # No step updates that of the teacher.
    names = [*settings_of(config).averages, *([TEACHER] if config.has_teacher else [])]
    return create_state(network, config.train, names, kind, rank=rank, world_size=world_size)


def sampling_of(config: SamplerConfig) -> Sampling:
    """Returns the settings of sampling."""
    return Sampling(**asdict(config))

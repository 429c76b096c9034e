"""The parts of `ddpm` for a configuration: network, process, objective, settings of the loop, sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ddpm import networks, training
from ddpm.augment import Augmentation
from ddpm.ema import Exponential, PowerFunction
from ddpm.generation import Sampling
from ddpm.guidance import Guidance
from ddpm.model import Model
from ddpm.objective import Draws, Objective
from ddpm.prediction import Prediction
from ddpm.process import Process, make_process
from job.config import Drawing, RunConfig


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """Returns the network of a resolved configuration, initialised from the run's seed, in a layout for the device."""
    torch.manual_seed(config.train.seed)
    data, model, diffusion = config.data, config.model, config.diffusion
    assert data.size is not None and data.channels is not None
    options = model.model_dump(exclude={"label_dropout"}) | {"num_classes": model.num_classes or 0}
    network = networks.build(
        image_size=data.size,
        in_channels=data.channels,
        out_channels=data.channels * (2 if diffusion.variance == "learned_range" else 1),
        null_class=model.label_dropout > 0,
        self_conditioning=diffusion.self_conditioning,
        augmentation_labels=settings_of(config).augmentation.labels,
        **options,
    ).to(device)
    if device.type == "cuda":
        # channels_last is faster on GPUs and slower on CPUs, where oneDNN chooses its own layout.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def model_of(
    config: RunConfig,
    device: torch.device,
    precision: str = "fp32",
    decode: Callable[[Tensor], Tensor] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Model:
    """Returns the model of a run, with initial weights.

    Args:
        config: that of the run.
        device: the device of the network.
        precision: the number format of the network, `fp32` or `bf16`.
        decode: turns latents into pixels, for a run on latents.
        classes: the names of the classes; without them their numbers.
    """
    model, count = config.model, config.model.num_classes or 0
    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    return Model(
        build_network(config, device).eval().requires_grad_(False),
        process_of(config),
        prediction_of(config),
        config.image_shape,
        sampling_of(config.sample),
        classes=classes or tuple(map(str, range(count))),
        null_class=model.label_dropout > 0,
        self_conditioning=config.diffusion.self_conditioning,
        offset_noise=config.diffusion.offset_noise,
        autocast=bf16 if precision == "bf16" else nullcontext,
        decode=decode,
    )


def process_of(config: RunConfig) -> Process:
    """Returns the process from an image to noise."""
    diffusion = config.diffusion
    return make_process(
        diffusion.schedule,
        diffusion.timesteps,
        zero_terminal_snr=diffusion.zero_terminal_snr,
        sigma_min=diffusion.sigma_min,
        sigma_max=diffusion.sigma_max,
        sigma_data=diffusion.sigma_data,
    )


def prediction_of(config: RunConfig) -> Prediction:
    """Returns the meaning of the network's output."""
    return Prediction(config.diffusion.prediction, config.diffusion.sigma_data)


def objective_of(config: RunConfig) -> Objective:
    """Returns the training objective."""
    diffusion = config.diffusion
    draws = Draws(diffusion.draws, diffusion.draws_mean, diffusion.draws_std, diffusion.stratified)
    return Objective(
        process_of(config),
        prediction_of(config),
        diffusion.weighting,
        diffusion.gamma,
        draws,
        learned_variance=diffusion.variance == "learned_range",
        clip=config.sample.clip,
    )


def settings_of(config: RunConfig) -> training.Settings:
    """Returns the settings of the training loop."""
    train, ema = config.train, config.ema
    average = Exponential(ema.decay, ema.warmup, ema.inv_gamma, ema.power)
    return training.Settings(
        batch_size_images=train.batch_size,
        micro_batch_size_images=train.micro_batch_size,
        optimizer=training.OptimizerSettings(
            learning_rate=train.learning_rate,
            warmup_images=train.warmup_images,
            learning_rate_decay=train.learning_rate_decay,
            decay_images=train.decay_images,
            betas=train.adam_betas,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
        ),
        averages={"ema": average, **dict(zip(ema.names, map(PowerFunction, ema.stds), strict=True))},
        seed=train.seed,
        augmentation=Augmentation(config.data.flip, config.data.crop_scale, config.data.augment),
        dropout=config.model.dropout,
        label_dropout=config.model.label_dropout,
        null_class=config.model.num_classes or 0,
        self_conditioning=config.diffusion.self_conditioning,
        offset_noise=config.diffusion.offset_noise,
    )


def sampling_of(drawing: Drawing) -> Sampling:
    """Returns the sampling settings."""
    guidance = Guidance(drawing.guidance, drawing.guidance_interval or (0.0, math.inf), drawing.guidance_rescale)
    how = drawing.model_dump(
        include={"sampler", "steps", "grid", "shift", "eta", "variance", "order", "churn", "clip", "labels"}
    )
    return Sampling(**how, guidance=guidance)

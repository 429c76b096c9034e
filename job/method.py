"""What a configuration means to `ddpm`: its network, process, objective, the loop's settings, how it draws."""

from __future__ import annotations

import torch
from torch import nn

from ddpm import networks, training
from ddpm.generation import Sampling
from ddpm.objective import Draws, Objective
from ddpm.prediction import Prediction
from ddpm.process import Process, make_process
from job.config import Drawing, RunConfig


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """The network of a resolved configuration, initialised from the run's seed, in the layout that suits the device."""
    assert config.data.size is not None and config.data.channels is not None
    torch.manual_seed(config.train.seed)
    options = config.model.model_dump() | {"num_classes": config.model.num_classes or 0}
    size, channels = config.data.size, config.data.channels
    network = networks.build(image_size=size, in_channels=channels, out_channels=channels, **options).to(device)
    if device.type == "cuda":
        # channels_last wins on GPUs and loses on CPUs (oneDNN picks its own layout there).
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def process_of(config: RunConfig) -> Process:
    """The way from an image to noise."""
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
    """What the network's output means."""
    return Prediction(config.diffusion.prediction, config.diffusion.sigma_data)


def objective_of(config: RunConfig) -> Objective:
    """What is learnt."""
    diffusion = config.diffusion
    draws = Draws(diffusion.draws, diffusion.draws_mean, diffusion.draws_std, diffusion.stratified)
    return Objective(process_of(config), prediction_of(config), diffusion.weighting, diffusion.gamma, draws)


def settings_of(config: RunConfig) -> training.Settings:
    """How it is learnt."""
    train = config.train
    return training.Settings(
        batch_size_images=train.batch_size,
        micro_batch_size_images=train.micro_batch_size,
        optimizer=training.OptimizerSettings(
            learning_rate=train.learning_rate,
            warmup_images=train.warmup_images,
            betas=train.adam_betas,
            eps=train.adam_eps,
            clip_norm=train.clip_norm,
        ),
        average=training.AverageSettings(decay=config.ema.decay, warmup=config.ema.warmup),
        seed=train.seed,
        flip=config.data.flip,
        dropout=config.model.dropout,
    )


def sampling_of(drawing: Drawing) -> Sampling:
    """How pictures are drawn."""
    return Sampling(**drawing.model_dump(include={"sampler", "steps", "grid", "eta", "variance", "clip"}))

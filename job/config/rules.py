"""Rules across the sections of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm.catalogue import GRIDS, METRICS, OF_CLASSES, SCHEDULES

if TYPE_CHECKING:
    from job.config.schema import RunConfig


def network_takes_image_size(config: RunConfig) -> None:
    """The size of the images fits the network's levels or patches."""
    config.model.check_size(config.data.size)


def network_takes_its_inputs(config: RunConfig) -> None:
    """The network has inputs for the noise level, augmentation labels and own estimates that training gives it."""
    model, diffusion = config.model, config.diffusion
    if model.schedule not in ("", diffusion.schedule):
        wanted, given = SCHEDULES[model.schedule].t, SCHEDULES[diffusion.schedule].t
        raise ValueError(
            f"model.kind={model.kind} takes {wanted} instead of {given}: "
            f"set diffusion.schedule={model.schedule} with a diffusion.prediction that fits, or choose another network"
        )
    if not model.takes_estimates and (diffusion.self_conditioning or config.data.augment):
        raise ValueError(
            f"model.kind={model.kind} takes only the timestep and the class, as its checkpoints do: leave out "
            "diffusion.self_conditioning and data.augment, or choose another network"
        )


def something_is_learnt(config: RunConfig) -> None:
    """The frozen parts are some of the network's, and leave one to learn."""
    frozen, kind, parts = config.train.freeze, config.model.kind, config.model.parts.split()
    if unknown := [name for name in frozen if not any(part.startswith(name) for part in parts)]:
        raise ValueError(f"train.freeze: model.kind={kind} has no part {unknown[0]!r:.100}, but {', '.join(parts)}")
    # Alone, these cannot learn an image.
    minor = ("augmentation_embedding", "uncertainty", *(OF_CLASSES * (config.model.num_classes == 0)))
    if all(part.startswith((*frozen, *minor)) for part in parts):
        raise ValueError(f"train.freeze={','.join(frozen)} freezes the whole network: leave out a part")


def each_class_has_a_name(config: RunConfig) -> None:
    """The names of the classes are those of the network's, if there are names."""
    names, classes = len(config.data.classes), config.model.num_classes
    if names and classes is not None and names != classes:
        raise ValueError(f"data.classes (of id2label.json) has {names:,} names, but the network {classes:,} classes")


def best_checkpoint_has_a_score(config: RunConfig) -> None:
    """One score decides which checkpoint is the best."""
    if config.checkpoint.keep_best and not config.evaluate.every_epochs:
        raise ValueError("checkpoint.keep_best needs scores: set evaluate.every_epochs")
    if config.checkpoint.keep_best and METRICS[first := config.evaluate.metrics[0]].scores:
        raise ValueError(
            f"checkpoint.keep_best needs a single score, and {first} has several: put another metric first"
        )


def samples_use_what_is_learnt(config: RunConfig) -> None:
    """The network learns the classes, the variance and the unconditional images that sampling asks it for."""
    sample, classes = config.sample, config.model.num_classes
    if config.model.label_dropout and classes == 0:
        raise ValueError(
            f"model.label_dropout={config.model.label_dropout:g} needs a network with classes, and "
            "model.num_classes=0: set it to 0, or train on a dataset with classes"
        )
    if sample.variance == "learned_range" and not config.diffusion.learns_variance:
        raise ValueError("sample.variance=learned_range needs a network with diffusion.variance=learned_range")
    if sample.guidance != 1 and not (config.model.label_dropout or sample.autoguidance):
        raise ValueError(
            f"sample.guidance={sample.guidance:g} needs a network that has also learnt images without their class "
            "(model.label_dropout=0.1 when the run begins), or --autoguidance [RUN@]EPOCH"
        )
    if sample.autoguidance and sample.guidance == 1:
        raise ValueError(f"autoguidance from epoch {sample.autoguidance} needs a guidance other than 1, such as 2")
    if sample.labels and classes is not None and max(sample.labels) >= classes:
        raise ValueError(f"sample.labels: class {max(sample.labels)} does not exist, the network has {classes}")


def steps_suffice(config: RunConfig) -> None:
    """There are no more steps than timesteps, and enough for the order of the sampler."""
    sample, timesteps = config.sample, config.diffusion.timesteps
    if sample.steps > timesteps:
        raise ValueError(f"sample.steps={sample.steps} exceeds diffusion.timesteps={timesteps}")
    if sample.steps < (order := sample.sampler_order):
        raise ValueError(
            f"sample.sampler={sample.sampler} is of order {order}, above sample.steps={sample.steps}: use more "
            "steps, a lower sample.order, or another sampler"
        )


def grid_starts_at_noise(config: RunConfig) -> None:
    """The first point of the grid is nearly pure noise, and is not exactly that where the grid cannot take it."""
    sample, diffusion = config.sample, config.diffusion
    steps, timesteps, is_flow = sample.steps, diffusion.timesteps, diffusion.schedule == "flow"
    if GRIDS[sample.grid].by_ratio and (is_flow or diffusion.zero_terminal_snr):
        start = "schedule=flow" if is_flow else "zero_terminal_snr"
        raise ValueError(
            f"sample.grid={sample.grid} cannot start at pure noise, as diffusion.{start} does: choose another"
        )
    if sample.shift != 1 and (not is_flow or sample.grid == "found"):
        raise ValueError(f"sample.shift={sample.shift:g} needs diffusion.schedule=flow and a grid other than found")
    if sample.grid == "quadratic" and (diffusion.schedule != "linear" or steps == 1):
        # It starts at 0.8 T, where other processes still show much of the image.
        raise ValueError("sample.grid=quadratic needs diffusion.schedule=linear and at least two steps: choose another")
    stride = timesteps // steps
    if sample.grid == "leading" and (first := (steps - 1) * stride) < 0.8 * timesteps:
        fitting = f"{timesteps // stride} or {timesteps // (stride + 1)}" if stride > 1 and steps > 5 else "more"
        raise ValueError(
            f"sample.steps={steps} with sample.grid=leading starts at t={first} of {timesteps}, where the image "
            f"still shows through the noise: use {fitting} steps, or another grid"
        )


RULES = (
    network_takes_image_size,
    network_takes_its_inputs,
    something_is_learnt,
    each_class_has_a_name,
    best_checkpoint_has_a_score,
    samples_use_what_is_learnt,
    steps_suffice,
    grid_starts_at_noise,
)
"""Each takes a `RunConfig` and raises ValueError if it is broken; the first one that is broken is reported."""

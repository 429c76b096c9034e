"""The training loop. Progress is one number, `images_seen`; the rest is a function of it, the seed and the settings.

The loop gets hooks and an iterable of batches, and needs no bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, autograd, nn

from ddpm import memory, randomness
from ddpm.augment import Augmentation, Latents
from ddpm.catalogue import Conditioning, NetworkConfig, Train
from ddpm.conditions import learnt, with_flag
from ddpm.device import exact_device
from ddpm.ema import Profile
from ddpm.image_size import ImageSize
from ddpm.networks import laid_out
from ddpm.networks.layers import dropout_of
from ddpm.objective import Condition, Drawn, Objective
from ddpm.optimizer import learning_rate_at
from ddpm.slots import Gradients, Slots, cut
from ddpm.state import TrainState, learnt_parameters
from ddpm.threads import Threads

T = TypeVar("T")
_OPTIONAL = ("labels", "conditions", "vectors")
"""The fields of a batch that a dataset may lack."""


class Batch(Protocol):
    """This process's part of one global batch."""

    @property
    def image_numbers(self) -> np.ndarray:
        """The numbers of these images in the run, int64 [b]."""

    @property
    def images(self) -> Tensor:
        """The images, uint8 or uint16 [b, C, H, W], or mean and log-variance of latents, float16 [b, 2 C, h, w]."""

    @property
    def labels(self) -> Tensor | None:
        """The classes, int64 [b], or None."""

    @property
    def conditions(self) -> Tensor | None:
        """The condition images, uint8 [b, Cc, H, W], or None; a batch may lack this and the next field."""

    @property
    def vectors(self) -> Tensor | None:
        """The normalised numbers of the images, float32 [b, k], or None."""


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop beside those of its objective."""

    train: Train
    network: NetworkConfig
    averages: Mapping[str, Profile]
    """The averages by name, such as `ema`; each needs the memory of the weights in fp32."""
    augmentation: Augmentation
    latents: Latents | None = None
    """The statistics of latents, if latents are learnt."""
    conditioning: Conditioning = field(default_factory=Conditioning)


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls; `images_seen` counts whole global batches."""

    after_step: Callable[[TrainState], bool]
    """Called after each step: saves, logs and samples when due; returns whether to stop."""
    should_abandon: Callable[[], bool] = lambda: False
    """Called between two micro-batches, equally often on every process: returns whether all processes abandon this
    step, without any effect of it."""
    before_change: Callable[[], None] = lambda: None
    """Called before weights, moments or averages change."""
    halved: Callable[[int], bool] = lambda images: False
    """Called with half the images of a micro-batch when memory ran out in a step; returns whether the step runs again
    with so many at once, else the error ends the training. True only where one process adds gradients without slots."""


@dataclass(frozen=True)
class MicroBatch:
    """Images of one pass through the network, with what is drawn by their numbers; tensors are on the device."""

    image_numbers: np.ndarray
    """int64 [b], on the host."""
    numbers: Tensor
    """The same on the device that draws."""
    images: Tensor
    points: Tensor
    """See `Objective.draw`."""
    augmentations: Tensor
    labels: Tensor | None
    conditions: Tensor | None
    vectors: Tensor | None
    conditions_on_itself: bool
    """Whether a first pass gives the network its own estimate."""

    def part(self, images: slice) -> MicroBatch:
        """Returns some of its images."""
        parts = {name: value[images] for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return replace(
            self,
            image_numbers=self.image_numbers[images],
            numbers=self.numbers[images],
            images=self.images[images],
            points=self.points[:, images],
            augmentations=self.augmentations[images],
            **parts,
        )

    def losses(self, network: nn.Module, objective: Objective, settings: LoopSettings) -> Tensor:
        """Returns the loss of each image, float32 [b]."""
        diffusion, seed = objective.diffusion, settings.train.seed
        image, applied = self.conditions, None
        if settings.latents:
            x_start = settings.latents.drawn(seed, self.numbers, self.images)
        else:
            both = self.images if image is None else torch.cat([self.images, image], dim=1)
            # From integers to float32 in [-1, 1], and labels of the augmentation for the network.
            x_start, applied = settings.augmentation.apply(both, self.augmentations)
            if image is not None:
                x_start, image = x_start.tensor_split([self.images.shape[1]], dim=1)
        x_start = laid_out(x_start)
        shape = tuple(x_start.shape[1:])
        noise = randomness.training_noise(seed, self.numbers, shape, x_start.device, diffusion.offset_noise)
        no_estimate = torch.zeros_like(x_start) if diffusion.self_conditioning else None
        condition = learnt(
            Condition(self.labels, no_estimate, applied, image, vector=with_flag(self.vectors)),
            x_start,
            seed,
            self.numbers,
            settings.conditioning,
            dropout=settings.network.label_dropout,
            null_class=settings.network.num_classes or 0,
        )
        drawn, twice = Drawn.of(self.points), self.conditions_on_itself
        return objective.losses(network, x_start, noise, drawn, condition, conditions_on_itself=twice)


def draw(
    batch: Batch,
    images_seen: int,
    parts: Sequence[slice],
    objective: Objective,
    settings: LoopSettings,
    to: torch.device,
) -> MicroBatch:
    """Draws what is random of a batch by the numbers of its images, and copies it to a device.

    It draws part by part, because a logarithm may be rounded otherwise at another place in a vector.
    """
    options = settings.train
    on_host, size = torch.from_numpy(batch.image_numbers), ImageSize(*batch.images.shape[-2:])
    points = [objective.draw(options.seed, on_host[part], options.batch_size) for part in parts]
    augmentations = [settings.augmentation.draw(options.seed, on_host[part], size) for part in parts]
    # On `mps` copies beside the host give wrong values (github.com/pytorch/pytorch/issues/139550 and 189690).
    beside = to.type == "cuda"
    optional = {
        name: value.to(to, non_blocking=beside)
        for name in _OPTIONAL
        if (value := getattr(batch, name, None)) is not None
    }
    return MicroBatch(
        image_numbers=batch.image_numbers,
        numbers=on_host.to(exact_device(to), non_blocking=beside),
        images=batch.images.to(to, non_blocking=beside),
        points=torch.cat(points, dim=1).to(to, non_blocking=beside),
        augmentations=torch.cat(augmentations).to(to, non_blocking=beside),
        **dict.fromkeys(_OPTIONAL) | optional,
        # One decision for all images saves the first pass in half of the batches.
        conditions_on_itself=objective.diffusion.self_conditioning
        and randomness.conditions_on_itself(options.seed, images_seen // options.batch_size),
    )


def train(
    state: TrainState,
    network: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    settings: LoopSettings,
    accelerator: Any,
    hooks: Hooks,
    slots: Slots | None = None,
    threads: Threads | None = None,
) -> None:
    """Trains until `batches` ends or a hook stops it; the state is then that of the last whole step.

    Args:
        state: updated in place; its `model` holds the parameters.
        network: `state.model`, wrapped by `accelerator` for autocast, and for DDP if there are no slots.
        batches: the batches from image number `state.images_seen` on.
        objective: the loss, in fp32 around the network's autocast.
        settings: see `LoopSettings`.
        accelerator: an `accelerate.Accelerator`, for its processes, `no_sync` and `backward`.
        hooks: see `Hooks`.
        slots: add the gradients slot by slot, for equal bits on any number of processes; `batches` has their images.
        threads: compute slots on a CPU, several at a time.

    Each image's noise, point, augmentation and label dropout depend on its number alone, and its loss weighs 1/batch in
    the gradient: without slots, the split over processes and micro-batches changes only the rounding, and the masks of
    dropout, which are drawn for the images that are computed at once.
    """
    options, device, parameters = settings.train, state.first_nonfinite.device, learnt_parameters(network)
    # EDM2 has both: the second balances the noise levels.
    normalise, uncertainty = getattr(state.model, "normalise", None), getattr(state.model, "uncertainty", None)
    # DDP averages gradients over processes; with this factor each image weighs 1/batch, also in unequal parts.
    ddp_weight = accelerator.num_processes / options.batch_size
    most_images, world_size = micro_batch_images(options), accelerator.num_processes
    fewest = fewest_micro_batches(slots, options.batch_size, most_images, world_size)
    # A view: it has the factor of each step.
    factor = state.loss_scale.values[0] if state.loss_scale else torch.ones((), device=device)

    def compute(images: MicroBatch, differentiate: Callable[[Tensor], T]) -> tuple[Tensor, T]:
        """Returns the losses, and what `differentiate` makes of their sum, with these images' masks of dropout."""
        with dropout_of(options.seed, int(images.image_numbers[0])):
            losses = balanced = images.losses(network, objective, settings)
            if uncertainty is not None:
                u = uncertainty(images.points[0])
                balanced = losses / u.exp() + u
            return losses.detach(), differentiate(balanced.sum() * factor)

    def gradients_of(images: MicroBatch) -> tuple[Tensor, Gradients]:
        return compute(images, lambda loss: [*autograd.grad(loss / options.batch_size, parameters, allow_unused=True)])

    def backward(images: MicroBatch) -> Tensor:
        return compute(images, lambda loss: accelerator.backward(loss * ddp_weight))[0]

    def should_abandon(micro_batches: int) -> bool:
        # A process that asked more often than the one with the fewest micro-batches would wait for ever.
        return 0 < micro_batches < fewest and hooks.should_abandon()

    network.train()
    # Not before a step, which may be left without any effect.
    hooks.before_change()
    if normalise is not None:
        normalise()
    for batch in batches:
        parts = slots.parts() if slots else [slice(0, len(batch.image_numbers))]
        drawn = draw(batch, state.images_seen, parts, objective, settings, device)
        while True:
            micro_batches = [[drawn.part(images) for images in cut(part, most_images)] for part in parts]
            try:
                if slots:
                    losses = slots.accumulate(
                        micro_batches, gradients_of, parameters, threads, should_abandon, state.owners
                    )
                else:
                    losses = accumulate(micro_batches[0], backward, accelerator, network, should_abandon)
                break
            except RuntimeError as error:
                failed_images = len(micro_batches[0][0].image_numbers)
                most_images = (failed_images + 1) // 2
                if failed_images == 1 or not memory.ran_out(error) or not hooks.halved(most_images):
                    raise
            # Nothing of the step is left: the weights have not changed, and all is drawn by the images' numbers.
            state.model.zero_grad()
            memory.free()
            fewest = fewest_micro_batches(slots, options.batch_size, most_images, world_size)
        if losses is None:
            state.model.zero_grad()
            return
        if state.loss_scale and (gradients := [grad for one in parameters if (grad := one.grad) is not None]):
            torch._foreach_mul_(gradients, 1 / factor)
        norm = state.owners.clip_grad_norm_(state.model.parameters(), options.clip_norm)
        # At a larger factor it may be an overflow, and not come again.
        bad = (state.first_nonfinite < 0) & ~torch.isfinite(norm) & (factor <= 1)
        state.first_nonfinite = torch.where(bad, state.images_seen, state.first_nonfinite)
        hooks.before_change()
        state.before_change()
        rate = learning_rate_at(options, state.images_seen)
        state.images_seen += options.batch_size
        if state.loss_scale is None or state.loss_scale.takes_step(norm):
            state.log.add(torch.cat(losses), Drawn.of(drawn.points).quartile)
            state.optimizer.step(rate, threads)
            for name, profile in settings.averages.items():
                decay = profile.decay_at(state.images_seen, options.batch_size)
                state.averages[name].update(state.model, decay)
            state.owners.gather_((parameter, state.owners.of[parameter]) for parameter in state.owners.given)
            if normalise is not None:
                state.before_change()
                normalise()
        else:
            state.model.zero_grad()
        if hooks.after_step(state):
            return


def accumulate(
    micro_batches: Sequence[MicroBatch],
    backward: Callable[[MicroBatch], Tensor],
    accelerator: Any,
    network: nn.Module,
    should_abandon: Callable[[int], bool],
) -> list[Tensor] | None:
    """Sets the gradients of a batch, in micro-batches; DDP adds those of the processes with the last one.

    Returns:
        The losses in order; None if the processes abandon the step.
    """
    losses = list[Tensor]()
    for images in micro_batches:
        if should_abandon(len(losses)):
            return None
        with nullcontext() if images is micro_batches[-1] else accelerator.no_sync(network):
            losses.append(backward(images))
    return losses


def micro_batch_images(options: Train) -> int | None:
    """Returns the most images of a micro-batch at the beginning; None: all of a part."""
    return options.micro_batch_size if isinstance(options.micro_batch_size, int) else None


def fewest_micro_batches(slots: Slots | None, batch_size: int, most_images: int | None, world_size: int) -> int:
    """Returns how many micro-batches of a step the process has that has the fewest."""
    ranks = [[slice(0, batch_size // world_size)]]
    if slots:
        ranks = [replace(slots, rank=rank).parts() for rank in range(slots.world_size)]
    return min(sum(len(cut(part, most_images)) for part in parts) for parts in ranks)

"""The training loop. Progress is one number, `images_seen`; the rest is a function of it, the seed and the settings.

The loop gets hooks and an iterable of batches, and needs no bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import randomness
from ddpm.augment import Augmentation
from ddpm.catalogue import Network, Train
from ddpm.ema import EMA, Profile
from ddpm.image_size import ImageSize
from ddpm.latents import Latents
from ddpm.memory_format import laid_out
from ddpm.networks.layers import dropout_of
from ddpm.objective import QUARTILES, Condition, Drawn, Objective
from ddpm.optimizer import OPTIMIZERS, Adam, learning_rate_at
from ddpm.slots import Gradients, Slots, added
from ddpm.threads import Threads

LOSS_QUANTUM = 2.0**-32
"""Unit of logged losses: float64 sums of its multiples are exact (below 2²¹), in any order and any parts."""


class Batch(Protocol):
    """This process's part of one global batch."""

    @property
    def image_numbers(self) -> np.ndarray:
        """The numbers of these images in the run, int64 [b]."""

    @property
    def images(self) -> Tensor:
        """The images, uint8 [b, C, H, W], or mean and log-variance of latents, float16 [b, 2 C, h, w]."""

    @property
    def labels(self) -> Tensor | None:
        """The classes, int64 [b], or None."""


@dataclass(frozen=True)
class Settings:
    """The settings of the loop beside those of its objective."""

    train: Train
    network: Network
    averages: Mapping[str, Profile]
    """The averages by name, such as `ema`; each needs the memory of the weights in fp32."""
    augmentation: Augmentation
    latents: Latents | None = None
    """The statistics of latents, if latents are learnt."""


class LossLog:
    """Loss sums since the last row of the log, overall and by timestep quartile, kept on the device.

    `sums` is float64 [2, 1 + QUARTILES]: loss sums in the first row, image counts in the second.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 1 + QUARTILES, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, quartiles: Tensor) -> None:
        """Adds `losses` [b] of these `quartiles` [b], without waiting for the device."""
        member = (quartiles == torch.arange(QUARTILES, device=quartiles.device)[:, None]).double()
        member = torch.cat([torch.ones_like(member[:1]), member])
        rounded = (losses.double() / LOSS_QUANTUM).round() * LOSS_QUANTUM
        self.sums += torch.stack([member @ rounded, member.sum(dim=1)])

    def reduced(self) -> Tensor:
        """Returns the sums over all processes. Collective if there are several."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums


def loss_row(sums: Tensor) -> dict[str, float]:
    """Returns mean losses of `LossLog` sums: `loss`, `loss_q0` … `loss_q3`, without quartiles that have no image."""
    names = ["loss", *(f"loss_q{i}" for i in range(QUARTILES))]
    totals, counts = sums.tolist()
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


@dataclass
class TrainState:
    """Everything that changes in training, on the device."""

    model: nn.Module
    averages: dict[str, EMA]
    """The averages by name."""
    optimizer: Adam
    log: LossLog
    images_seen: int = 0
    first_nonfinite: Tensor = field(default_factory=lambda: torch.tensor(-1))
    """`images_seen` before the first step whose gradient was not finite, or -1; see `check_finite`."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the live tensors of a checkpoint, by group."""
        named = dict(self.model.named_parameters())
        moments = {
            f"{moment}.{name}": tensor
            for moment in ("exp_avg", "exp_avg_sq")
            for name, tensor in getattr(self.optimizer, moment).items()
        }
        return {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            **{name: dict(average.shadow) for name, average in self.averages.items()},
            "optimizer": moments,
        }

    def resume_at(self, images_seen: int, batch_size_images: int) -> None:
        """Sets the progress after the tensors are restored; Adam's step count follows from it."""
        self.images_seen = images_seen
        for step in self.optimizer.steps.values():
            step.fill_(images_seen // batch_size_images)


class NonFiniteError(ArithmeticError):
    """A gradient was not finite in the step after `images_seen` images."""

    def __init__(self, images_seen: int) -> None:
        super().__init__(f"the gradient was not a finite number after {images_seen:,} images")
        self.images_seen = images_seen


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls; `images_seen` counts whole global batches."""

    after_step: Callable[[TrainState], bool]
    """Called after each step: saves, logs and samples when due; returns whether to stop."""
    leaves_step: Callable[[], bool] = lambda: False
    """Called between two micro-batches, equally often on every process: returns whether all processes abandon this
    step, without any effect of it."""
    before_change: Callable[[], None] = lambda: None
    """Called before weights, moments or averages change."""


def create_state(model: nn.Module, device: torch.device, settings: Settings) -> TrainState:
    """Returns an initial state on `device`, the model's device. The frozen parts of the model get no gradient."""
    learnt = dict(model.named_parameters())
    for name in [name for name in learnt if name.startswith(settings.train.freeze)]:
        learnt.pop(name).requires_grad_(False)
    optimizer = OPTIMIZERS[settings.train.optimizer](learnt.items(), settings.train)
    averages = {name: EMA(model) for name in settings.averages}
    return TrainState(model, averages, optimizer, LossLog(device), first_nonfinite=torch.tensor(-1, device=device))


def micro_batches(images: slice, size: int | None) -> list[slice]:
    """Returns these images as slices of at most `size`."""
    size = size or images.stop - images.start
    return [slice(start, min(start + size, images.stop)) for start in range(images.start, images.stop, size)]


@dataclass(frozen=True)
class _Learnt:
    """A batch on the device, and what its losses are made of."""

    network: nn.Module
    objective: Objective
    settings: Settings
    uncertainty: Callable[[Tensor], Tensor] | None
    """EDM2 balances the noise levels by it."""
    image_numbers: np.ndarray
    numbers: Tensor
    """The same on the device."""
    images: Tensor
    points: Tensor
    augmentations: Tensor
    labels: Tensor | None
    twice: bool
    """Whether a first pass gives the network its own estimate."""

    @classmethod
    def of(
        cls,
        batch: Batch,
        state: TrainState,
        network: nn.Module,
        objective: Objective,
        settings: Settings,
        parts: Sequence[slice],
    ) -> _Learnt:
        """Draws what is random of a batch, by the numbers of its images.

        It draws part by part, because a logarithm may be rounded otherwise at another place in a vector.
        """
        device, options = state.first_nonfinite.device, settings.train
        on_host, size = torch.from_numpy(batch.image_numbers), ImageSize(*batch.images.shape[-2:])
        points = [objective.draw(options.seed, on_host[part], options.batch_size) for part in parts]
        augmentations = [settings.augmentation.draw(options.seed, on_host[part], size) for part in parts]
        numbers = on_host.to(device, non_blocking=True)
        batch_number = state.images_seen // options.batch_size
        return cls(
            network=network,
            objective=objective,
            settings=settings,
            uncertainty=getattr(state.model, "uncertainty", None),
            image_numbers=batch.image_numbers,
            numbers=numbers,
            images=batch.images.to(device, non_blocking=True),
            points=torch.cat(points, dim=1).to(device, non_blocking=True),
            augmentations=torch.cat(augmentations).to(device, non_blocking=True),
            labels=_shown_labels(batch.labels, numbers, settings),
            # One decision for all images saves the first pass in half of the batches.
            twice=objective.diffusion.self_conditioning and randomness.conditions_on_itself(options.seed, batch_number),
        )

    def losses(self, part: slice) -> tuple[Tensor, Tensor]:
        """Returns the losses of some images, float32 [b], and the same balanced for the gradient."""
        numbers, images, labels = self.numbers[part], self.images[part], self.labels
        diffusion, seed = self.objective.diffusion, self.settings.train.seed
        if self.settings.latents:
            x_start, applied = self.settings.latents.drawn(seed, numbers, images), None
        else:
            # From uint8 to float32 in [-1, 1], and labels of the augmentation for the network.
            x_start, applied = self.settings.augmentation.apply(images, self.augmentations[part])
        x_start = laid_out(x_start)
        shape = tuple(x_start.shape[1:])
        noise = randomness.training_noise(seed, numbers, shape, x_start.device, diffusion.offset_noise)
        no_estimate = torch.zeros_like(x_start) if diffusion.self_conditioning else None
        losses = self.objective.losses(
            self.network,
            x_start,
            noise,
            Drawn(*self.points[:, part]),
            Condition(None if labels is None else labels[part], no_estimate, applied),
            conditions_on_itself=self.twice,
        )
        if self.uncertainty is None:
            return losses.detach(), losses
        u = self.uncertainty(self.points[0, part])
        return losses.detach(), losses / u.exp() + u

    def gradients(self, part: slice) -> tuple[Tensor, Gradients]:
        """Returns the losses of some images, and the gradients of their sum over the batch size."""
        with self.dropout(part):
            losses, balanced = self.losses(part)
            weighted = balanced.sum() / self.settings.train.batch_size
            return losses, list(torch.autograd.grad(weighted, learnt_parameters(self.network), allow_unused=True))

    def dropout(self, part: slice) -> AbstractContextManager[None]:
        """Returns a context in which dropout masks depend on the first of some images."""
        return dropout_of(self.settings.train.seed, int(self.image_numbers[part.start]))


def _shown_labels(labels: Tensor | None, numbers: Tensor, settings: Settings) -> Tensor | None:
    """Returns the classes on the device of the image `numbers`, some replaced by the class of images without one."""
    if labels is None:
        return None
    labels, network = labels.to(numbers.device, non_blocking=True), settings.network
    if not network.label_dropout:
        return labels
    dropped = randomness.drops_label(settings.train.seed, numbers, network.label_dropout)
    return torch.where(dropped, network.num_classes or 0, labels)


def train(
    state: TrainState,
    network: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    settings: Settings,
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
        settings: see `Settings`.
        accelerator: an `accelerate.Accelerator`, for its processes, `no_sync` and `backward`.
        hooks: see `Hooks`.
        slots: add the gradients slot by slot, for equal bits on any number of processes; `batches` has their images.
        threads: compute slots on a CPU, several at a time.

    Each image's noise, point, augmentation and label dropout depend on its number alone, and its loss weighs 1/batch in
    the gradient: without slots, the split over processes and micro-batches changes only the rounding, and the masks of
    dropout, which are drawn for the images that are computed at once.
    """
    size = settings.train.micro_batch_size
    learn = _by_slots(slots, threads, hooks, size) if slots else _by_backward(accelerator, hooks)
    # EDM2's weights: not before a step, which may be left without any effect.
    normalise = getattr(state.model, "normalise", lambda: None)
    network.train()
    hooks.before_change()
    normalise()
    for batch in batches:
        parts = slots.parts() if slots else [slice(0, len(batch.image_numbers))]
        learnt = _Learnt.of(batch, state, network, objective, settings, parts)
        if not (losses := learn(learnt, parts)):
            state.model.zero_grad()
            return
        state.log.add(torch.cat(losses), Drawn(*learnt.points).quartile)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), settings.train.clip_norm, foreach=True)
        bad = (state.first_nonfinite < 0) & ~torch.isfinite(norm)
        state.first_nonfinite = torch.where(bad, state.images_seen, state.first_nonfinite)
        hooks.before_change()
        state.optimizer.step(learning_rate_at(settings.train, state.images_seen), threads)
        state.images_seen += settings.train.batch_size
        for name, profile in settings.averages.items():
            decay = profile.decay_at(state.images_seen, settings.train.batch_size)
            state.averages[name].update(state.model, decay)
        normalise()
        if hooks.after_step(state):
            return


_Learn = Callable[[_Learnt, Sequence[slice]], list[Tensor]]
"""Sets the gradients of a batch, given in parts, and returns its losses in order; none if the step was abandoned."""


def _by_slots(slots: Slots, threads: Threads | None, hooks: Hooks, micro_batch_size: int | None) -> _Learn:
    """Returns a function that adds the gradients of the batch's slots, computed in micro-batches, in a fixed order."""

    def micro_batches_of(parts: Sequence[slice]) -> list[list[slice]]:
        return [micro_batches(part, micro_batch_size) for part in parts]

    # Micro-batches of the process with the fewest: one that asked more often would wait for ever.
    of_ranks = [micro_batches_of(replace(slots, rank=rank).parts()) for rank in range(slots.world_size)]
    questions = min(sum(map(len, of_rank)) for of_rank in of_ranks)

    def learn(learnt: _Learnt, parts: Sequence[slice]) -> list[Tensor]:
        losses, of_slots = list[Tensor](), micro_batches_of(parts)
        computed = (threads.map if threads else map)(learnt.gradients, chain.from_iterable(of_slots))

        def gradients() -> Iterator[Gradients]:
            for of_slot in of_slots:
                total: Gradients = []
                for _ in of_slot:
                    if 0 < len(losses) < questions and hooks.leaves_step():
                        return
                    loss, gradient = next(computed)
                    losses.append(loss)
                    total = added(total, gradient) if total else gradient
                yield total

        if (sums := slots.sum(gradients())) is None:
            return []
        for parameter, gradient in zip(learnt_parameters(learnt.network), sums, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # The optimiser's kernel walks through both in the order of memory, and does not compare.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        return losses

    return learn


def _by_backward(accelerator: Any, hooks: Hooks) -> _Learn:
    """Returns a function that computes a batch in micro-batches, whose gradients DDP adds if there are processes."""

    def learn(learnt: _Learnt, parts: Sequence[slice]) -> list[Tensor]:
        options, losses_of_parts = learnt.settings.train, list[Tensor]()
        # DDP averages gradients over processes; with this factor each image weighs 1/batch, also in unequal parts.
        weight = accelerator.num_processes / options.batch_size
        # As in `_by_slots`.
        fewest = slice(0, options.batch_size // accelerator.num_processes)
        questions = len(micro_batches(fewest, options.micro_batch_size))
        (whole,) = parts
        for question, part in enumerate(micro_batches(whole, options.micro_batch_size)):
            if 0 < question < questions and hooks.leaves_step():
                return []
            with (
                learnt.dropout(part),
                nullcontext() if part.stop == whole.stop else accelerator.no_sync(learnt.network),
            ):
                losses, balanced = learnt.losses(part)
                accelerator.backward(balanced.sum() * weight)
            losses_of_parts.append(losses)
        return losses_of_parts

    return learn


def learnt_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def check_finite(state: TrainState) -> None:
    """Reads the flag on the device: for moments when the host waits for the device anyway, and before every commit.

    Raises:
        NonFiniteError: the gradient of a step was not finite.
    """
    first = int(state.first_nonfinite.item())
    if first >= 0:
        raise NonFiniteError(first)

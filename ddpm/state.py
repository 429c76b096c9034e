"""The state of training: weights, averages, moments and sums of losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm.catalogue import Train
from ddpm.ema import EMA
from ddpm.objective import QUARTILES
from ddpm.optimizer import OPTIMIZERS, Adam
from ddpm.owners import Owners
from ddpm.precision import LossScale

LOSS_QUANTUM = 2.0**-32
"""Unit of logged losses: float64 sums of its multiples are exact (below 2²¹), in any order and any parts."""


class LossLog:
    """Loss sums since the last row of the log, overall and by timestep quartile; the host adds, as MPS has no float64.

    `sums` is float64 [2, 1 + QUARTILES] on the host: loss sums in the first row, image counts in the second.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 1 + QUARTILES, dtype=torch.float64)
        self._device, self._added = device, list[Tensor]()

    def add(self, losses: Tensor, quartiles: Tensor) -> None:
        """Adds `losses` [b] of these `quartiles` [b], without waiting for the device."""
        self._added.append(torch.stack([losses, quartiles]))

    def reduced(self) -> Tensor:
        """Returns the sums over all processes. Waits for the device; collective if there are several processes."""
        if self._added:
            losses, quartiles = torch.cat(self._added, dim=1).cpu().double()
            self._added.clear()
            member = (quartiles == torch.arange(QUARTILES)[:, None]).double()
            member = torch.cat([torch.ones_like(member[:1]), member])
            rounded = (losses / LOSS_QUANTUM).round() * LOSS_QUANTUM
            self.sums += torch.stack([member @ rounded, member.sum(dim=1)])
        if not dist.is_initialized():
            return self.sums.clone()
        # A backend of GPUs takes no tensor of the host.
        sums = self.sums.to(self._device, copy=True)
        dist.all_reduce(sums)
        return sums


def loss_row(sums: Tensor) -> dict[str, float]:
    """Returns mean losses of `LossLog` sums: `loss`, `loss_q0` … `loss_q3`, without quartiles that have no image."""
    names = ["loss", *(f"loss_q{i}" for i in range(QUARTILES))]
    totals, counts = sums.tolist()
    return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}


@dataclass
class TrainState:
    """Everything that changes in training: on the device, but for averages in host memory.

    Moments and averages may be divided among processes: `tensors` then has those of others on the device `meta`.
    """

    model: nn.Module
    averages: dict[str, EMA]
    """The averages by name."""
    optimizer: Adam
    log: LossLog
    owners: Owners
    images_seen: int = 0
    first_nonfinite: Tensor = field(default_factory=lambda: torch.tensor(-1))
    """`images_seen` before the first step whose gradient was not finite, though its loss was not scaled up; or -1."""
    loss_scale: LossScale | None = None
    """In fp16 alone."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the live tensors of a checkpoint, by group. After later steps `finish_averages` makes them whole."""
        self.finish_averages()
        named = dict(self.model.named_parameters())
        moments = {
            f"{moment}.{name}": tensor
            for moment in self.optimizer.MOMENTS
            for name, tensor in getattr(self.optimizer, moment).items()
        }
        elsewhere = {name: parameter.detach().to("meta", torch.float32) for name, parameter in named.items()}
        return {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            **{name: elsewhere | average.shadow for name, average in self.averages.items()},
            "optimizer": moments | ({"loss_scale": self.loss_scale.values} if self.loss_scale else {}),
        }

    def send(self) -> list[dist.Work]:
        """Begins to send what this process alone holds to the main one; it must not change before the end."""
        tensors = enumerate(self.divided().values() if self.owners.rank else ())
        own = [(tag, tensor) for tag, tensor in tensors if not tensor.is_meta]
        sent = [dist.isend(tensor.cpu().contiguous(), 0, self.owners.group, tag) for tag, tensor in own]
        return list(filter(None, sent))

    def receive(self, into: dict[str, dict[str, Tensor]]) -> None:
        """Copies what the other processes `send` into contiguous tensors on the host, by group and name."""
        tensors = enumerate(self.divided().items())
        others = [(tag, into[group][name]) for tag, ((group, name), tensor) in tensors if tensor.is_meta]
        received = [dist.irecv(tensor, group=self.owners.group, tag=tag) for tag, tensor in others]
        for work in filter(None, received):
            work.wait()

    def divided(self) -> dict[tuple[str, str], Tensor]:
        """Returns the tensors that one process alone holds, by group and name, in one order; else nothing."""
        return {
            (group, name): tensor
            for group, named in (self.tensors() if self.owners.world_size > 1 else {}).items()
            for name, tensor in named.items()
            if group != "model" and (group, name) != ("optimizer", "loss_scale")
        }

    def load_average(self, name: str, network: nn.Module) -> None:
        """Overwrites the parameters of a network like `model` with an average. Collective."""
        self.averages[name].copy_to(network)
        ranks = [self.owners.of[parameter] for parameter in self.model.parameters()]
        self.owners.gather_(zip(network.parameters(), ranks, strict=True))

    def restart_averages(self) -> None:
        """Makes all averages those of the present weights alone."""
        for average in self.averages.values():
            average.update(self.model, decay=0.0)
        self.finish_averages()

    def before_change(self) -> None:
        """Returns when the weights may change: averages in host memory have theirs."""
        for average in self.averages.values():
            average.before_change()

    def finish_averages(self) -> None:
        """Returns when the averages hold all steps."""
        for average in self.averages.values():
            average.finish()

    def resume_at(self, images_seen: int, batch_size_images: int) -> None:
        """Sets the progress after the tensors are restored; Adam's step count follows from it."""
        self.images_seen = images_seen
        left_out = self.loss_scale.left_out if self.loss_scale else 0
        for step in self.optimizer.steps.values():
            step.fill_(images_seen // batch_size_images - left_out)


def create_state(
    model: nn.Module,
    train: Train,
    averages: Iterable[str],
    kind_of_average: type[EMA] = EMA,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainState:
    """Returns an initial state on the model's device, with averages of these names; collective if divided.

    The frozen parts of the model get no gradient.
    """
    device, learnt = next(model.parameters()).device, dict(model.named_parameters())
    for name in [name for name in learnt if name.startswith(train.freeze)]:
        learnt.pop(name).requires_grad_(False)
    kind = OPTIMIZERS[train.optimizer]
    pieces = [[learnt[name] for name in piece] for piece in kind.pieces(learnt)]
    owners = Owners(model, pieces, *((rank, world_size) if train.shard_optimizer else ()))
    own = {name for name, parameter in model.named_parameters() if owners.of[parameter] == owners.rank}
    # Moments like a parameter without memory have none.
    held = {name: each if name in own else nn.Parameter(each.to("meta")) for name, each in learnt.items()}
    optimizer = kind(held.items(), train)
    shadows = {name: kind_of_average(model, own) for name in averages}
    return TrainState(
        model,
        shadows,
        optimizer,
        LossLog(device),
        owners,
        first_nonfinite=torch.tensor(-1, device=device),
        loss_scale=LossScale(device) if train.precision == "fp16" else None,
    )


def learnt_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]

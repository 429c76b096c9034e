"""Division of moments and averages: a process holds those of its own parameters (ZeRO-1, Rajbhandari et al. 2020).

A process gets the gradients of its parameters, steps them, and sends their weights to the others. The parameters stay
whole: a kernel rounds the vectors of a tensor and the rest of it otherwise, so that steps of parts would have other
bits. Norms of gradients and blocks of 8-bit codes also need whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Owners:
    """The processes that own a model's parameters, with nearly as many values to learn each, and nearly as many in all.

    Attributes:
        world_size: 1 if each process holds everything; it also does if some process would have nothing to learn.
        of: the process that holds moments and averages, by parameter; equal on all processes.
        given: the learnt parameters that have a gradient in this step, on whatever process, in order.
        group: for messages from host memory.
    """

    def __init__(self, model: nn.Module, pieces: list[list[nn.Parameter]], rank: int = 0, world_size: int = 1) -> None:
        """Gives each piece to the process with the fewest values, large ones first. Collective.

        Args:
            model: has the parameters.
            pieces: the parameters to learn that must have one owner each.
            rank: that of this process.
            world_size: the number of processes.
        """
        self.rank, self.world_size = (rank, world_size) if len(pieces) >= world_size else (0, 1)
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.of, self.given = dict[Tensor, int](), list[nn.Parameter]()
        held = [0] * self.world_size
        learnt = {parameter for piece in pieces for parameter in piece}
        frozen = [[parameter] for parameter in model.parameters() if parameter not in learnt]
        # Frozen parameters have averages alone: they come last, so that the moments are spread evenly, too.
        for each in pieces, frozen:
            for piece in sorted(each, key=lambda piece: -sum(parameter.numel() for parameter in piece)):
                owner = held.index(min(held))
                self.of |= dict.fromkeys(piece, owner)
                held[owner] += sum(parameter.numel() for parameter in piece)

    @torch.no_grad()
    def gather_(self, owned: Iterable[tuple[Tensor, int]]) -> None:
        """Gives all processes the values that the owner of each tensor has; all have one dtype. Collective."""
        owned = list(owned)
        for rank in range(self.world_size) if self.world_size > 1 else ():
            if tensors := [tensor for tensor, owner in owned if owner == rank]:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                dist.broadcast(flat, rank)
                # The owner's average may be reading them in a thread.
                if rank != self.rank:
                    for tensor, part in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
                        tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Clips the gradient and returns its norm before, float32 [], with the bits of PyTorch's function. Collective.

        That is the norm of the norms of the tensors, in order.
        """
        if self.world_size == 1:
            return nn.utils.clip_grad_norm_(parameters, most, foreach=True)
        own = [gradient for parameter in self.given if (gradient := parameter.grad) is not None]
        of_own = iter(torch._foreach_norm(own) if own else ())
        norms = torch.stack([p.new_zeros(()) if p.grad is None else next(of_own) for p in self.given])
        # One process has each norm, and zeros change no bit.
        dist.all_reduce(norms)
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(self.given, most, norm, foreach=True)
        return norm

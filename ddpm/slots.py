"""The slots of a batch: parts whose gradients are computed alike and added in one order, on any number of processes.

A sum of floating-point numbers depends on its order, and a gradient on the number of images and threads that a kernel
is given. So a global batch is cut into a fixed number of slots. A slot is computed at the same shape, with the same
number of threads, wherever it is computed. Slots are the leaves of one binary tree, which says how they are added.

A process holds consecutive slots, adds whole subtrees of them, and sends only their sums: to each process one piece of
every sum. That process adds the rest of the tree for its piece, and all processes gather the pieces. EasyScale keeps
the gradients of its virtual workers apart for the same reason (Li et al. 2023).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.owners import Owners
from ddpm.precision import FORMATS, autocast
from ddpm.threads import Threads

Node = tuple[int, int]
"""The slots from the first number up to the second, without it, as a node of the tree."""
Gradients = list[Tensor | None]
"""The gradients of the learnt parameters, in their order; None where a parameter has no part in the loss."""

Images = TypeVar("Images")
"""The images of a micro-batch."""

_SHAPES = (2, 3, 16, 16), (128, 3, 3, 3), (128, 128, 3, 3), (384, 128)
"""Two images, the weights of two convolutions, and a matrix; large enough for kernels that add up in parts."""


def kernels_of(precision: str) -> str:
    """Returns a fingerprint of a CPU's kernels: eight digits of the SHA-256 of what one thread computes with them.

    Libraries choose kernels by the processor and by variables such as MKL_CBWR, and say nothing. Fixed values pass
    forward and backward through convolutions, normalisations, products of matrices and of a vector, and attention: in
    fp32, and in the precision of the settings too.
    """
    sha256 = hashlib.sha256()
    with Threads(1).outside():
        for each in ("fp32", precision)[: 1 + (precision in FORMATS)]:
            given = [_fixed(*shape).requires_grad_() for shape in _SHAPES]
            with autocast(each, "cpu"):
                x = F.conv2d(F.conv2d(given[0], given[1], padding=1), given[2], stride=2, padding=1)
                x = F.silu(F.group_norm(x, 4)).flatten(2).mT
                q, k, v = F.linear(x, given[3]).chunk(3, dim=-1)
                x = F.layer_norm(F.scaled_dot_product_attention(q, k, v), (128,))[0]
                x = torch.cat([x, F.linear(x[:1], given[3]).view(3, 128)])
            for result in (x, *torch.autograd.grad(x.sin().sum(), given)):
                sha256.update(result.detach().float().numpy().tobytes())
    return sha256.hexdigest()[:8]


def _fixed(*shape: int) -> Tensor:
    """Returns float32 values between -1/2 and 1/2, evenly spread; IEEE 754 defines each rounding on the way to them."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 0.6180339887498949 % 1 - 0.5).float().view(shape)


@dataclass(frozen=True)
class Slots:
    """The slots of one global batch, and which of them this process holds."""

    count: int
    """The slots of all processes together."""
    batch_size_images: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Checks that no process is without a slot."""
        if not self.world_size <= self.count <= self.batch_size_images:
            raise ValueError(f"{self.count} slots: use {self.world_size} to {self.batch_size_images}")

    @property
    def own(self) -> range:
        """Returns the numbers of this process's slots; processes hold equally many, or one more."""
        first, last = (self.count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def places(self) -> range:
        """Returns this process's places in the global batch."""
        return range(self._start(self.own.start), self._start(self.own.stop))

    def parts(self) -> list[slice]:
        """Returns each of this process's slots as a part of its images."""
        first = self.places.start
        return [slice(self._start(slot) - first, self._start(slot + 1) - first) for slot in self.own]

    def accumulate(
        self,
        micro_batches: list[list[Images]],
        gradients_of: Callable[[Images], tuple[Tensor, Gradients]],
        parameters: Sequence[nn.Parameter],
        threads: Threads | None,
        should_abandon: Callable[[int], bool],
        owners: Owners,
    ) -> list[Tensor] | None:
        """Sets the gradients of a global batch: the sum over the slots of all processes, in order. Collective.

        Args:
            micro_batches: of each of this process's slots.
            gradients_of: returns the losses of a micro-batch, and the gradients of `parameters`.
            parameters: get the sums.
            threads: compute several micro-batches at a time.
            should_abandon: called before each micro-batch with the number of those before it; alike on all processes.
            owners: say which parameters get gradients on this process; `given` is set.

        Returns:
            The losses of this process's images in order; None if `should_abandon` ended the step.
        """
        losses = list[Tensor]()
        computed = (threads.map if threads else map)(gradients_of, chain.from_iterable(micro_batches))

        def of_slots() -> Iterator[Gradients]:
            for of_slot in micro_batches:
                total: Gradients = []
                for _ in of_slot:
                    if should_abandon(len(losses)):
                        return
                    loss, gradient = next(computed)
                    losses.append(loss)
                    total = added(total, gradient) if total else gradient
                yield total

        gradients = of_slots()
        try:
            sums = [_added_up(node, gradients) for node in subtrees((0, self.count), self.own)]
        except StopIteration:
            return None
        owners.given = [parameter for parameter, known in zip(parameters, sums[0], strict=True) if known is not None]
        owner = [owners.of[parameter] for parameter in parameters]
        total = self._exchanged(sums) if owners.world_size == 1 else self._scattered(sums, owner)
        for parameter, gradient in zip(parameters, total, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # The optimiser's kernel walks through both in the order of memory, and does not compare.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        return losses

    def _start(self, slot: int) -> int:
        return self.batch_size_images * slot // self.count

    def _exchanged(self, sums: list[Gradients]) -> Gradients:
        """Returns the sum of all subtrees from those of this process."""
        if self.world_size == 1:
            return sums[0]
        nodes = self._nodes()
        given = [gradient for gradient in sums[0] if gradient is not None]
        length = sum(gradient.numel() for gradient in given)
        piece = -(-length // self.world_size)
        flat = given[0].new_empty(len(sums), self.world_size * piece)
        for row, gradients in zip(flat, sums, strict=True):
            torch.cat([gradient.flatten() for gradient in gradients if gradient is not None], out=row[:length])
        if sum(map(len, nodes)) == 2:
            # The sum of two numbers has no order, and one operation is faster than two.
            dist.all_reduce(flat)
        else:
            # To each process its piece of all sums, and from each one its sums of this process's piece.
            outgoing = flat.view(len(sums), self.world_size, piece).transpose(0, 1).flatten(0, 1)
            incoming = flat.new_empty(sum(map(len, nodes)), piece)
            dist.all_to_all_single(incoming, outgoing, list(map(len, nodes)), [len(sums)] * self.world_size)
            known = dict(zip([node for of_rank in nodes for node in of_rank], incoming, strict=True))
            dist.all_gather(list(flat[0].chunk(self.world_size)), _top((0, self.count), known))
        pieces = iter(flat[0, :length].split([gradient.numel() for gradient in given]))
        return [None if gradient is None else next(pieces).view(gradient.shape) for gradient in sums[0]]

    def _scattered(self, sums: list[Gradients], owner: Sequence[int]) -> Gradients:
        """Returns the sum of all subtrees for the parameters that this process owns; None for the others."""
        nodes = self._nodes()
        given = [[p for p, g in enumerate(sums[0]) if g is not None and owner[p] == r] for r in range(self.world_size)]
        parts = [[g.flatten() for one in sums for p in places if (g := one[p]) is not None] for places in given]
        # To each process all sums of its parameters, and from each one its sums of this process's parameters.
        outgoing = torch.cat([part for of_rank in parts for part in of_rank])
        lengths, rows = [sum(map(len, of_rank)) // len(sums) for of_rank in parts], [*map(len, nodes)]
        incoming = outgoing.new_empty(sum(rows), own := lengths[self.rank])
        dist.all_to_all_single(
            incoming.view(-1), outgoing, [row * own for row in rows], [len(sums) * length for length in lengths]
        )
        total = _top((0, self.count), dict(zip(chain(*nodes), incoming, strict=True)))
        pieces = iter(total.split([len(part) for part in parts[self.rank][: len(given[self.rank])]]))
        return [
            next(pieces).view(gradient.shape) if gradient is not None and rank == self.rank else None
            for gradient, rank in zip(sums[0], owner, strict=True)
        ]

    def _nodes(self) -> list[list[Node]]:
        """Returns the subtrees of each process, in order."""
        return [subtrees((0, self.count), replace(self, rank=rank).own) for rank in range(self.world_size)]


def cut(part: slice, size: int | None) -> list[slice]:
    """Returns the images of a part as micro-batches of at most `size`."""
    size = size or part.stop - part.start
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]


def halves(node: Node) -> tuple[Node, Node]:
    """Returns the children of a node: the first has the largest power of two of slots that leaves the other some."""
    first, last = node
    middle = first + (1 << (last - first - 1).bit_length() - 1)
    return (first, middle), (middle, last)


def subtrees(node: Node, own: range) -> list[Node]:
    """Returns the largest nodes under `node` that hold only slots of `own`, in order."""
    first, last = node
    if last <= own.start or own.stop <= first:
        return []
    if own.start <= first and last <= own.stop:
        return [node]
    return [found for half in halves(node) for found in subtrees(half, own)]


def added(left: Gradients, right: Sequence[Tensor | None]) -> Gradients:
    """Adds gradients to those of `left`, in place."""
    return [a if b is None else b if a is None else a.add_(b) for a, b in zip(left, right, strict=True)]


def _added_up(node: Node, gradients: Iterator[Gradients]) -> Gradients:
    """Adds the slots of a node; of each level at most one sum exists at a time."""
    if node[1] - node[0] == 1:
        return next(gradients)
    left, right = halves(node)
    return added(_added_up(left, gradients), _added_up(right, gradients))


def _top(node: Node, known: dict[Node, Tensor]) -> Tensor:
    """Adds the sums that are known to that of `node`."""
    if node in known:
        return known[node]
    left, right = (_top(half, known) for half in halves(node))
    return left + right

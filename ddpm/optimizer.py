"""The optimisers, and the learning rate as a function of images seen."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ddpm.catalogue import OF_CLASSES, Train
from ddpm.threads import Threads

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
"""Muon's momentum, and its iteration x ← a x + (b A + c A²) x with A = x xᵀ (Jordan et al. 2024)."""
PIECE_VALUES = 1 << 22
"""The most values that are made orthogonal at once: their copies take memory, and single matrices many kernels."""


def learning_rate_at(train: Train, images_seen: int) -> float:
    """Returns the learning rate of the step after `images_seen` images.

    It decays as 1/√images from `decay_images` on (`inverse_root`; Karras et al. 2024), or along half a cosine from the
    end of the warm-up to zero at `decay_images`.
    """
    rate = train.learning_rate
    if train.warmup_images:
        rate *= min(1.0, (images_seen + train.batch_size) / train.warmup_images)
    if train.learning_rate_decay == "inverse_root":
        rate /= math.sqrt(max(images_seen / train.decay_images, 1.0))
    elif train.learning_rate_decay == "cosine":
        done = (images_seen - train.warmup_images) / (train.decay_images - train.warmup_images)
        rate *= (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    return rate


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), by PyTorch's fused kernel, for the parameters that have a gradient.

    With weight decay it is AdamW (Loshchilov & Hutter 2019, algorithm 2) as in PyTorch, which subtracts lr · decay.
    `torch.optim.Adam` computes the same, but imports the compiler, which takes more than a second.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        self._parameters, self._train = dict(named_parameters), train
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.steps = {name: torch.zeros((), device=p.device) for name, p in self._parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, threads: Threads | None = None) -> None:
        """Updates the parameters from their gradients, and frees the gradients; `threads` share long work on a CPU."""
        names = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        adam(
            params=[self._parameters[name] for name in names],
            grads=[grad for name in names if (grad := self._parameters[name].grad) is not None],
            exp_avgs=[self.exp_avg[name] for name in names],
            exp_avg_sqs=[self.exp_avg_sq[name] for name in names],
            max_exp_avg_sqs=[],
            state_steps=[self.steps[name] for name in names],
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=self._train.adam_betas[0],
            beta2=self._train.adam_betas[1],
            lr=learning_rate,
            weight_decay=self._train.weight_decay,
            eps=self._train.adam_eps,
            maximize=False,
        )
        for parameter in self._parameters.values():
            parameter.grad = None


class Muon(Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, Adam for all other parameters.

    A convolution's weight is a matrix [out, in · height · width]; tables of classes take Adam's steps. A matrix takes a
    step along the nearest semi-orthogonal one to its Nesterov momentum, of the root mean square of Adam's step: 0.2 √n
    times it, with n rows or columns, whichever are more (Liu et al. 2025, arXiv 2502.16982, equation 4).
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        named = dict(named_parameters)
        matrices = {n: p for n, p in named.items() if p.ndim > 1 and not n.startswith(OF_CLASSES)}
        super().__init__(((n, p) for n, p in named.items() if n not in matrices), train)
        self.exp_avg |= {n: torch.zeros_like(p, requires_grad=False) for n, p in matrices.items()}
        of_shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for name, parameter in matrices.items():
            shape = len(parameter), parameter.numel() // len(parameter)
            of_shapes.setdefault(shape, []).append((parameter, self.exp_avg[name]))
        self._pieces = [
            list(members[start : start + count])
            for shape, members in of_shapes.items()
            for count in [max(1, PIECE_VALUES // math.prod(shape))]
            for start in range(0, len(members), count)
        ]

    def step(self, learning_rate: float, threads: Threads | None = None) -> None:
        """Updates the parameters from their gradients, and frees the gradients."""
        super().step(learning_rate)
        for _ in (threads.map if threads else map)(partial(self._turn, learning_rate), self._pieces):
            pass

    @torch.no_grad()
    def _turn(self, learning_rate: float, piece: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Takes the step of matrices of one shape."""
        given = [(p, p.grad, momentum) for p, momentum in piece if p.grad is not None]
        if not given:
            return
        ahead = [grad.lerp(momentum.lerp_(grad, 1 - MOMENTUM), MOMENTUM).flatten(1) for _, grad, momentum in given]
        directions = orthogonalised(torch.stack(ahead))
        size = 0.2 * math.sqrt(max(directions.shape[1:])) * learning_rate
        for (parameter, _, _), direction in zip(given, directions, strict=True):
            parameter.mul_(1 - learning_rate * self._train.weight_decay)
            parameter.sub_(direction.view_as(parameter), alpha=size)
            parameter.grad = None


def orthogonalised(matrices: Tensor) -> Tensor:
    """Returns matrices [N, rows, columns] whose singular values are nearly 1, and whose singular vectors are the same.

    Five Newton–Schulz iterations lead values above a hundredth of the Frobenius norm to about 0.7 to 1.2.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


OPTIMIZERS = {"adam": Adam, "muon": Muon}

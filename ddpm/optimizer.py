"""The optimisers, and the learning rate as a function of images seen."""

import math
from collections.abc import Iterable, Mapping
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
"""The most values that are made orthogonal or decoded at once: copies take memory, and single tensors many kernels."""
BLOCK_VALUES, FEWEST_VALUES = 256, 4096
"""The values that share a scale in `AdamW8bit`, and the fewest of a parameter whose moments are codes."""


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

    MOMENTS: tuple[str, ...] = "exp_avg", "exp_avg_sq"
    """The attributes that a checkpoint holds: tensors by the names of parameters."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        self._parameters, self._train = dict(named_parameters), train
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._parameters.items()}
        self.steps = {name: torch.zeros((), device=p.device) for name, p in self._parameters.items()}

    @staticmethod
    def pieces(named: Mapping[str, nn.Parameter]) -> list[list[str]]:
        """Returns the names that one process must step together: another stack of them would be rounded otherwise."""
        return [[name] for name in named]

    @torch.no_grad()
    def step(self, learning_rate: float, threads: Threads | None = None) -> None:
        """Updates the parameters from their gradients, and frees the gradients; `threads` share long work on a CPU."""
        self._update(self._parameters, self.exp_avg, self.exp_avg_sq, learning_rate)

    def _update(
        self,
        parameters: Mapping[str, nn.Parameter],
        exp_avg: Mapping[str, Tensor],
        exp_avg_sq: Mapping[str, Tensor],
        learning_rate: float,
    ) -> None:
        names = [name for name, parameter in parameters.items() if parameter.grad is not None]
        adam(
            params=[parameters[name] for name in names],
            grads=[grad for name in names if (grad := parameters[name].grad) is not None],
            exp_avgs=[exp_avg[name] for name in names],
            exp_avg_sqs=[exp_avg_sq[name] for name in names],
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
        for parameter in parameters.values():
            parameter.grad = None


class AdamW8bit(Adam):
    """AdamW whose moments are 8-bit codes (Dettmers et al. 2022): 2.03 bytes a weight in the place of 8.

    Each block of 256 values, in the order of the parameter's indices, has its largest absolute value as its scale, and
    a code stands for one of 256 shares of it. Parameters of less than 4096 values, or of no whole blocks, have fp32
    moments. `torchao.optim.AdamW8bit` has the same blocks and codes, but needs a compiler at run time, takes minutes
    for the shapes of a network in each attempt, and rounds as the compiler chose.

    Attributes:
        exp_avg, exp_avg_sq: codes, uint8 in the shape of the parameter, or fp32.
        exp_avg_scale, exp_avg_sq_scale: the scales, float32 [blocks], of parameters that have codes.
    """

    MOMENTS = (*Adam.MOMENTS, "exp_avg_scale", "exp_avg_sq_scale")

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        named = dict(named_parameters)
        coded = {n: p for n, p in named.items() if p.numel() >= FEWEST_VALUES and p.numel() % BLOCK_VALUES == 0}
        super().__init__(((n, p) for n, p in named.items() if n not in coded), train)
        self.steps |= {n: torch.zeros((), device=p.device) for n, p in coded.items()}
        for codes in (self.exp_avg, self.exp_avg_sq):
            codes |= {n: torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for n, p in coded.items()}
        blocks = {n: p.new_zeros(p.numel() // BLOCK_VALUES, requires_grad=False) for n, p in coded.items()}
        self.exp_avg_scale, self.exp_avg_sq_scale = blocks, {n: torch.zeros_like(each) for n, each in blocks.items()}
        # Parameters of other processes have none.
        device = min((p.device for p in named.values()), key=lambda device: device.type == "meta")
        self._signed, self._unsigned = (shares_of_codes(is_signed).to(device) for is_signed in (True, False))
        self._pieces: list[dict[str, nn.Parameter]] = []
        values = PIECE_VALUES
        for name, parameter in coded.items():
            if values + parameter.numel() > PIECE_VALUES:
                self._pieces.append({})
                values = 0
            self._pieces[-1][name] = parameter
            values += parameter.numel()

    @torch.no_grad()
    def step(self, learning_rate: float, threads: Threads | None = None) -> None:
        """Updates the parameters from their gradients, and frees the gradients."""
        super().step(learning_rate)
        coded = (
            (self.exp_avg, self.exp_avg_scale, self._signed),
            (self.exp_avg_sq, self.exp_avg_sq_scale, self._unsigned),
        )
        for piece in self._pieces:
            # Codes of moments that do not change stay as they are: decoded and coded again they may differ.
            given = {name: parameter for name, parameter in piece.items() if parameter.grad is not None}
            if given:
                exp_avg, exp_avg_sq = moments = [self._decoded(given, *each) for each in coded]
                self._update(given, exp_avg, exp_avg_sq, learning_rate)
                for (codes, scales, shares), moment in zip(coded, moments, strict=True):
                    flat = torch.cat([moment[name].flatten() for name in given])
                    of_piece, of_blocks = encoded(flat, shares)
                    for target, source in ((codes, of_piece), (scales, of_blocks)):
                        parts = source.split([target[name].numel() for name in given])
                        for name, part in zip(given, parts, strict=True):
                            target[name].copy_(part.view(target[name].shape))

    def _decoded(
        self,
        given: Mapping[str, nn.Parameter],
        codes: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        shares: Tensor,
    ) -> dict[str, Tensor]:
        """Returns a moment as fp32 tensors, with the memory layout of the parameters."""
        of_piece = torch.cat([codes[name].flatten() for name in given])
        flat = (
            shares[of_piece.int()].view(-1, BLOCK_VALUES) * torch.cat([scales[name] for name in given])[:, None]
        ).flatten()
        parts = flat.split([parameter.numel() for parameter in given.values()])
        return {
            name: torch.empty_like(parameter, requires_grad=False).copy_(part.view(parameter.shape))
            for (name, parameter), part in zip(given.items(), parts, strict=True)
        }


def shares_of_codes(is_signed: bool) -> Tensor:
    """Returns the share of a block's scale that each code stands for, float32 [256], ascending.

    It is dynamic tree quantisation (Dettmers 2016, arXiv 1511.04561): 0, 1, and in each of seven decades below 1 the
    middles of equal parts, twice as many as in the decade below; unsigned ones have twice as many as signed ones.
    """
    shares = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade + (not is_signed)) + 1, dtype=torch.float64)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)
        shares += [middles, -middles] if is_signed else [middles]
    return torch.cat(shares).sort().values.float()


def encoded(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes of values [n · 256], uint8, and the scales of their blocks, float32 [n]."""
    blocks = values.view(-1, BLOCK_VALUES)
    scales = blocks.abs().amax(dim=1).clip(1e-12)
    ends = (shares[:-1] + shares[1:]) / 2
    return torch.bucketize(blocks / scales[:, None], ends, out_int32=True, right=True).to(torch.uint8).flatten(), scales


class Muon(Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, Adam for all other parameters.

    A convolution's weight is a matrix [out, in · height · width]; tables of classes take Adam's steps. A matrix takes a
    step along the nearest semi-orthogonal one to its Nesterov momentum, of the root mean square of Adam's step: 0.2 √n
    times it, with n rows or columns, whichever are more (Liu et al. 2025, arXiv 2502.16982, equation 4).
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> None:
        named = dict(named_parameters)
        matrices = _matrices(named)
        super().__init__(((n, p) for n, p in named.items() if n not in matrices), train)
        self.exp_avg |= {n: torch.zeros_like(p, requires_grad=False) for n, p in matrices.items()}
        self._pieces = [[(matrices[n], self.exp_avg[n]) for n in piece] for piece in self.pieces(matrices)]

    @staticmethod
    def pieces(named: Mapping[str, nn.Parameter]) -> list[list[str]]:
        """Returns the names of matrices of one shape, at most `PIECE_VALUES` in all, and of each other parameter."""
        matrices, of_shapes = _matrices(named), dict[tuple[int, int], list[str]]()
        for name, parameter in matrices.items():
            of_shapes.setdefault((len(parameter), parameter.numel() // len(parameter)), []).append(name)
        return [
            *([name] for name in named if name not in matrices),
            *(
                names[start : start + count]
                for shape, names in of_shapes.items()
                for count in [max(1, PIECE_VALUES // math.prod(shape))]
                for start in range(0, len(names), count)
            ),
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


def _matrices(named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {n: p for n, p in named.items() if p.ndim > 1 and not n.startswith(OF_CLASSES)}


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


OPTIMIZERS = {"adam": Adam, "adamw8bit": AdamW8bit, "muon": Muon}

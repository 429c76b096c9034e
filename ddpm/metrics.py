"""Distances of two sets of images, by their features, float32 [n, D]; samples first, real ones second.

Formulas are torch-fidelity's where it is fast enough. Sums are float64, so that the same features give the same score
for any batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm.conditions import blurred

KID_SUBSETS, KID_SUBSET_IMAGES = 100, 1000
"""Bińkowski et al. 2018, with the numbers of most implementations."""
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""Kynkäänniemi et al. 2019, section 3; Naeem et al. 2020, section 4."""
MOST_NEIGHBOURS_IMAGES = 10_000
"""Largest number of images of each side for nearest neighbours, since all pairs of distances are in memory."""
PROJECTIONS, MIND_SEED = 1000, 0
_CHUNK = 4096


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean, float64 [D], and the unbiased covariance, float64 [D, D]."""
    count, total, squares = len(features), 0.0, 0.0
    for part in features.split(_CHUNK):
        rows = part.double().cpu()
        total, squares = total + rows.sum(dim=0), squares + rows.T @ rows
    assert isinstance(total, Tensor) and isinstance(squares, Tensor)
    mean = total / count
    return mean, (squares - count * mean[:, None] * mean) / (count - 1)


def fid(samples: Tensor, real: Tensor) -> float:
    """Returns the squared Fréchet distance of two Gaussians (Heusel et al. 2017, equation 6).

    The trace of (Σ₁ Σ₂)^½ equals that of (Σ₁^½ Σ₂ Σ₁^½)^½, whose symmetric matrix is much faster.
    """
    (mean_sampled, of_samples), (mean_real, of_real) = moments(samples), moments(real)
    values, vectors = torch.linalg.eigh(of_samples)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ of_real @ root).clamp(min=0).sqrt().sum()
    difference = mean_sampled - mean_real
    return float(difference @ difference + of_samples.trace() + of_real.trace() - 2 * shared)


def kid(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Returns the unbiased squared MMD with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, section 4) over subsets.

    `kid` and `kid_std` are its mean and its deviation over 100 subsets of 1,000 images of each side, or of the size of
    the smaller side; a single subset has no deviation.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET_IMAGES, len(samples), len(real))
    subsets = 1 if size == len(samples) == len(real) else KID_SUBSETS
    options = {"kid_subsets": subsets, "kid_subset_size": size, "verbose": False, "rng_seed": 0}
    found = kid_features_to_metric(samples.double(), real.double(), **options)
    deviation = {"kid_std": found["kernel_inception_distance_std"]} if subsets > 1 else {}
    return {"kid": found["kernel_inception_distance_mean"], **deviation}


def prdc(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Returns precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020, equations 3 and 5).

    They use up to 10,000 images of each side and the papers' numbers of nearest neighbours: 3 and 5.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    # In float32 the distances of near neighbours may round to equal ones, or change their order.
    samples, real = samples[:MOST_NEIGHBOURS_IMAGES].double(), real[:MOST_NEIGHBOURS_IMAGES].double()
    options = {"prc_neighborhood": PRECISION_NEIGHBOURS, "prc_batch_size": _CHUNK, "save_cpu_ram": True}
    found = prc_features_to_metric(samples, real, verbose=False, **options)
    reach = torch.cdist(real, real).kthvalue(DENSITY_NEIGHBOURS + 1).values
    inside, nearest = torch.zeros(()), torch.full_like(reach, torch.inf)
    for part in samples.split(_CHUNK):
        distances = torch.cdist(part, real)
        inside = inside + (distances <= reach).sum()
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return {
        "precision": found["precision"],
        "recall": found["recall"],
        "density": float(inside) / (DENSITY_NEIGHBOURS * len(samples)),
        "coverage": (nearest <= reach).float().mean().item(),
    }


def mind(samples: Tensor, real: Tensor) -> float:
    """Returns 3 D times the squared sliced Wasserstein distance (Berthet et al. 2026, arXiv 2605.06797).

    It uses 1,000 directions, and of the larger side as many of the first images as the smaller one has.
    """
    count, width = min(len(samples), len(real)), samples.shape[1]
    directions = torch.randn(PROJECTIONS, width, generator=torch.Generator().manual_seed(MIND_SEED))
    directions = directions / directions.norm(dim=1, keepdim=True)
    total = 0.0
    for part in directions.split(100):
        ours, theirs = ((side[:count].cpu() @ part.T).sort(dim=0).values for side in (samples, real))
        total += float((ours - theirs).double().square().mean(dim=0).sum())
    return 3 * width * total / PROJECTIONS


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Returns exp of the mean divergence of p(class | image) from p(class), in ten parts (Salimans et al. 2016).

    Args:
        logits: of the samples, [n, classes].

    Returns:
        The mean over the parts, and their deviation.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(logits)
    return found["inception_score_mean"], found["inception_score_std"]


def paired(images: Tensor, truth: Tensor) -> Tensor:
    """Returns PSNR in dB and SSIM of images and their true images, [B, C, H, W] in [-1, 1]; float32 [B, 2].

    SSIM has Wang et al. 2004's Gaussian of deviation 1.5 over 11×11 pixels, K_1 = 0.01 and K_2 = 0.03. Its mean is over
    the places where the Gaussian lies in the image, and over the channels.
    """
    error = (images - truth).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    mean, mean_too, square, square_too, product = (
        blurred(each, 1.5) for each in (images, truth, images.square(), truth.square(), images * truth)
    )
    covariance, variances = product - mean * mean_too, square - mean.square() + square_too - mean_too.square()
    luminance = (2 * mean * mean_too + 0.02**2) / (mean.square() + mean_too.square() + 0.02**2)
    similarity = luminance * (2 * covariance + 0.06**2) / (variances + 0.06**2)
    whole = similarity[..., 5:-5, 5:-5] if min(images.shape[2:]) > 10 else similarity
    return torch.stack([10 * (4 / error).log10(), whole.mean(dim=(1, 2, 3))], dim=1)


COMPARISONS: dict[str, Callable[[Tensor, Tensor], Any]] = {"fid": fid, "kid": kid, "prdc": prdc, "mind": mind}
"""The functions that compare two sets of features, by the names of their metrics."""


def compared(chosen: tuple[str, ...], samples: Tensor, real: Tensor) -> Iterator[tuple[str, float]]:
    """Yields the scores of these comparisons by name, with deviations as `kid_std`."""
    for metric in chosen:
        found = COMPARISONS[metric](samples, real)
        yield from found.items() if isinstance(found, dict) else [(metric, found)]

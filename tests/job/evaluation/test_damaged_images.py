"""Scores of real images against damaged copies of others, by both networks: they grow with the damage."""

from collections.abc import Callable
from importlib import resources
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ddpm import metrics
from job.evaluation.evaluate import features_of
from job.evaluation.evaluation_plan import locate_extractor
from job.store import open_store

SIDE = 75
"""Images of each half."""


def halves() -> tuple[np.ndarray, np.ndarray]:
    """The embedded tiles at 64 pixels, in two halves that have no order, uint8 [n, 64, 64, 3]."""
    with ZipFile(str(resources.files("job") / "datasets" / "landscape-sample.zip")) as archive:
        names = [name for name in sorted(archive.namelist()) if not name.endswith((".txt", "/"))]
        tiles = []
        for name in names:
            with archive.open(name) as file:
                tiles.append(np.asarray(Image.open(file).convert("RGB")))
    order = np.random.default_rng(0).permutation(len(tiles))
    shuffled = np.stack(tiles)[order]
    return shuffled[:SIDE], shuffled[SIDE : 2 * SIDE]


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in images])


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, sigma, images.shape)
    return (images + noise).clip(0, 255).round().astype(np.uint8)


# Inception sees some 17 images a second on two cores, and fewer beside other tests.
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception", "mobilenet"])
def test_scores_grow_with_the_damage(tmp_path, name):
    extract = locate_extractor(name, open_store(str(tmp_path))).load(torch.device("cpu"))

    def features(images: np.ndarray) -> torch.Tensor:
        parts = [features_of(extract, part, torch.device("cpu")) for part in np.array_split(images, 8)]
        return torch.cat([part["features"] for part in parts])

    one, other = halves()
    real = features(one)
    damages: list[tuple[Callable[..., np.ndarray], list[float]]] = [(blurred, [0, 1, 2]), (noisy, [0, 8, 25])]
    for damage, strengths in damages:
        drawn = [features(damage(other, strength)) for strength in strengths]
        for metric, least in (("fid", 1.5), ("mind", 2.5)):
            scores = [dict(metrics.compared((metric,), each, real))[metric] for each in drawn]
            assert scores == sorted(scores)
            assert scores[-1] > least * scores[0]
        kids = [metrics.kid(each, real)["kid"] for each in drawn]
        assert kids == sorted(kids)
        assert abs(kids[0]) < 10e-3
        assert kids[-1] > 40e-3

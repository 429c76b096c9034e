"""Scores against other people's formulas, brute force, and what is known of Gaussians."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch_fidelity.metric_fid import fid_statistics_to_metric

from ddpm import metrics

WIDTH = 24


def features(count, seed, shift=0.0, scale=1.0):
    """Correlated features with a mean far from zero, as those of images are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, WIDTH, generator=generator) @ mixing * scale + 30 + shift


def test_frechet_distance_is_pytorch_fids():
    drawn, real = features(300, 0, shift=0.3, scale=1.2), features(400, 1)
    of_drawn, of_real = (side.double().numpy() for side in (drawn, real))
    roots = sqrtm(np.cov(of_drawn, rowvar=False) @ np.cov(of_real, rowvar=False))
    difference = of_drawn.mean(axis=0) - of_real.mean(axis=0)
    theirs = difference @ difference + np.trace(np.cov(of_drawn, rowvar=False) + np.cov(of_real, rowvar=False))
    assert metrics.fid(drawn, real) == pytest.approx(theirs - 2 * np.trace(roots).real, rel=1e-9)
    # As torch-fidelity has it, also of fewer images than features, whose covariances are singular.
    for images in (300, 15):
        both = (of_drawn[:images], of_real)
        sides = [{"mu": side.mean(axis=0), "sigma": np.cov(side, rowvar=False)} for side in both]
        (of_library,) = fid_statistics_to_metric(*sides, verbose=False).values()
        assert metrics.fid(drawn[:images], real) == pytest.approx(of_library, rel=1e-6)


def test_sums_are_independent_of_the_parts(monkeypatch):
    whole = metrics.moments(features(1000, 0))
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    for in_parts, at_once in zip(metrics.moments(features(1000, 0)), whole, strict=True):
        np.testing.assert_allclose(in_parts, at_once, rtol=1e-12, atol=1e-10)


def test_paired_scores_are_those_of_scipys_filters():
    """SSIM as in scikit-image with Gaussian weights: scipy's filter ends at 3.5 deviations, that is at 5 pixels."""
    generator = np.random.default_rng(0)
    truth = generator.uniform(-1, 1, (3, 2, 20, 24)).astype(np.float32)
    images = np.clip(truth + generator.normal(0, [[[[0.05]]], [[[0.3]]], [[[0.0]]]], truth.shape), -1, 1).astype("f4")
    found = metrics.paired(torch.from_numpy(images), torch.from_numpy(truth))
    for image, other, (psnr, ssim) in zip(images.astype(float), truth.astype(float), found.tolist(), strict=True):
        error = ((image - other) ** 2).mean()
        assert psnr == pytest.approx(10 * np.log10(4 / max(error, 1e-10)), abs=1e-3)

        def mean(values):
            return gaussian_filter(values, 1.5, truncate=3.5, axes=(1, 2))[:, 5:-5, 5:-5]

        a, b, covariance = mean(image), mean(other), mean(image * other) - mean(image) * mean(other)
        variances = mean(image**2) - a**2 + mean(other**2) - b**2
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        expected = (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variances + c2))
        assert ssim == pytest.approx(expected.mean(), abs=1e-4)
    assert found[2, 1].item() == pytest.approx(1)


def test_kid_is_unbiased():
    drawn, real = features(60, 0, shift=0.2), features(60, 1)

    def kernel(a, b):
        return (a.double() @ b.double().T / WIDTH + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    brute = float(within(drawn) + within(real) - 2 * kernel(drawn, real).mean())
    assert metrics.kid(drawn, real) == {"kid": pytest.approx(brute, rel=1e-9)}
    # Subsets of a larger side go about the same.
    mean, deviation = metrics.kid(drawn, features(600, 1)).values()
    assert deviation > 0
    assert mean == pytest.approx(brute, abs=4 * deviation + 0.2 * abs(brute))


def test_prdc_by_brute_force():
    """Also of features that are far from 0, where float32 loses the distances of near ones."""
    drawn, real = features(40, 0, shift=1.0) + 3000, features(50, 1) + 3000
    found = metrics.prdc(drawn, real)
    drawn, real = drawn.double() - 3000, real.double() - 3000
    across = torch.cdist(drawn, real)

    def reach(a, neighbours):
        return torch.cdist(a, a).sort(dim=1).values[:, neighbours]

    assert found["precision"] == pytest.approx((across <= reach(real, 3)).any(dim=1).float().mean().item())
    assert found["recall"] == pytest.approx((across <= reach(drawn, 3)[:, None]).any(dim=0).float().mean().item())
    inside = across <= reach(real, 5)
    assert found["density"] == pytest.approx(inside.sum().item() / (5 * len(drawn)))
    assert found["coverage"] == pytest.approx(inside.any(dim=0).float().mean().item())
    assert 0 < found["precision"] < 1
    same = metrics.prdc(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)


def test_mind_of_shifted_gaussians():
    """Along a direction u they are u·m apart, whose mean square is |m|²/D."""
    drawn = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0))
    real = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(1)) + 2.0
    assert metrics.mind(drawn, real) == pytest.approx(3 * 4.0 * WIDTH, rel=0.15)
    assert metrics.mind(drawn, drawn) == 0.0
    assert metrics.mind(drawn, real) == metrics.mind(drawn, real)


def test_inception_score_counts_classes():
    logits = 50.0 * torch.eye(8).repeat(200, 1)
    assert metrics.inception_score(logits)[0] == pytest.approx(8, rel=0.03)
    assert metrics.inception_score(torch.zeros(100, 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_all_scores_by_name():
    found = dict(metrics.compared(("kid", "prdc", "mind", "fid"), features(30, 0), features(40, 1)))
    assert [*found] == ["kid", "kid_std", "precision", "recall", "density", "coverage", "mind", "fid"]
    # A single subset has no deviation.
    assert [*dict(metrics.compared(("kid",), features(30, 0), features(30, 1)))] == ["kid"]

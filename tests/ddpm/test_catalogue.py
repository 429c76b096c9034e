"""The catalogue lists what the formulas and the documentation have, and imports nothing heavy; and the scores."""

import re
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_statistics_to_metric

import ddpm
from ddpm import catalogue, metrics
from ddpm.catalogue import Diffusion, NetworkConfig, SampleOptions
from ddpm.features import LOADERS
from ddpm.grids import make_grid
from ddpm.objective import Objective
from ddpm.process import TABLES, Prediction, make_process
from ddpm.samplers import FUNCTIONS

DOCS = Path(__file__).parents[2] / "docs"


def column(page: str, header: str) -> list[str]:
    """The names in the first cells of a table, whose header begins so."""
    _, _, table = (DOCS / page).read_text().partition(f"| {header}")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(?:--extractor )?(\w+)`", row.split("|")[1])]


def test_sampler_functions_take_their_options():
    settings = {field.name: field.default for field in fields(SampleOptions)}
    for name, sampler in catalogue.SAMPLERS.items():
        if name == "own":
            continue
        _, _, _, _, *own = signature(FUNCTIONS[name]).parameters.values()
        # Euler's methods are DDIM with its default, and with η = 1.
        also = {*sampler.also, *(["eta"] if name.startswith("euler") else [])}
        assert {parameter.name for parameter in own} == {*sampler.options} | also, name
        for parameter in own:
            if parameter.name in sampler.options:
                assert parameter.default == settings[parameter.name], (name, parameter.name)


def test_each_name_has_its_formula():
    assert [name for name, schedule in catalogue.SCHEDULES.items() if schedule.has_betas] == list(TABLES)
    process = make_process(Diffusion())
    for grid in catalogue.GRIDS.keys() - {"found"}:
        assert len(make_grid(process, 5, grid)) == 6
    for schedule in catalogue.SCHEDULES:
        assert make_process(Diffusion(schedule, 7)).num_timesteps == 7
    point = process.numbered(torch.arange(0, 1000, 100))
    for prediction in catalogue.PREDICTIONS:
        for weighting in catalogue.WEIGHTINGS:
            learnt = Objective(process, Prediction(prediction), Diffusion(weighting=weighting))
            assert learnt.weights(point).isfinite().all()
    assert {name for name, metric in catalogue.METRICS.items() if metric.of == "features"} == metrics.COMPARISONS.keys()
    assert catalogue.EXTRACTORS.keys() == LOADERS.keys()


def test_the_documentation_lists_the_same():
    page = (DOCS / "samplers.md").read_text()
    for name, sampler in catalogue.SAMPLERS.items():
        if name != "own":
            options = " ".join(f"`--{option}`" for option in sampler.options)
            assert f"| `{name}` | {sampler.sentence} | {options} |\n" in page
    for name, grid in catalogue.GRIDS.items():
        assert f"| `{name}` | {grid.sentence} |\n" in page
    assert column("notation.md", "process (`diffusion.schedule`)") == list(catalogue.SCHEDULES)
    assert column("notation.md", "`diffusion.prediction`") == list(catalogue.PREDICTIONS)
    assert column("notation.md", "`diffusion.weighting`") == list(catalogue.WEIGHTINGS)
    draws = (DOCS / "notation.md").read_text().partition("**Draws** ")[2].partition("\n\n")[0]
    assert catalogue.DRAWS.keys() < {*re.findall(r"`(\w+)`", draws)}
    scores = [score for name, metric in catalogue.METRICS.items() for score in metric.scores or (name,)]
    assert column("evaluation.md", "score ") == scores
    assert column("evaluation.md", "network ") == list(catalogue.EXTRACTORS)
    assert column("networks.md", "`model.kind`") == list(catalogue.NETWORKS)
    page = (DOCS / "networks.md").read_text()
    for network in catalogue.NETWORKS.values():
        own = {field.name for field in fields(network)} - {field.name for field in fields(NetworkConfig)}
        row = page.partition(f"| `{network.kind}` |")[2].partition("\n")[0]
        assert own <= {*re.findall(r"`(\w+)`", row)}, network.kind


def test_top_level_names_import_late():
    assert all(getattr(ddpm, name).__name__ for name in ddpm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ddpm.nothing
    code = "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & sys.modules.keys(); ddpm.load; job.load"
    subprocess.run([sys.executable, "-c", f"import sys, ddpm.catalogue, job; {code}"], check=True)


# --- scores against other people's formulas, brute force, and what is known of Gaussians

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

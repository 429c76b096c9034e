"""The catalogue lists what the formulas and the tables of the documentation have, and imports nothing heavy."""

import re
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch

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

"""All samplers on a run's own network; the grid that is found on it; somebody's own sampler."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.runs.run import FoundGrid
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, succeeded

OWN = """
from ddpm.samplers import ddim

def midway(denoise, x, points, noise_at):
    return ddim(denoise, x, points, noise_at, eta=0.5)

def smaller(denoise, x, points, noise_at):
    assert x.shape[1:] == (3, 16, 16)
    return x[..., ::2, ::2]

def nothing_of_it(denoise, x, points, noise_at):
    denoise(x, points[0])

number = 3
"""


def files_of(run: Path, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / folder).iterdir() if path.is_file()}


def sampled(bucket: Path, *words: object) -> list[str]:
    """The names of the pictures that a command made."""
    out = succeeded(ddpm_here("sample", "--run", "walk", "--bucket", bucket, "--seeds", "0-3", *words))
    return [Path(line.split()[0]).name for line in out.splitlines()]


@pytest.mark.slow
def test_samplers_without_noise_agree(draw):
    """That of each seed where the probability flow ends, and the better ones find it in fewer steps."""
    exact, seeds = draw(range(4), 4, sampler="dpmpp_3m", steps=50, clip=False), range(4)
    errors = {
        sampler: np.abs(draw(seeds, 4, sampler=sampler, steps=12, clip=False, **options) - exact).mean()
        for sampler, options in {
            "ddim": {},
            "euler": {},
            "heun": {},
            "dpmpp_2m": {},
            "dpmpp_3m": {},
            "unipc": {"order": 2},
            "ipndm": {"order": 2},
            "deis": {"order": 3},
        }.items()
    }
    assert errors["euler"] == errors["ddim"] < 12
    assert all(error < errors["ddim"] for sampler, error in errors.items() if sampler not in ("ddim", "euler")), errors
    for noisy in ({"sampler": "euler_ancestral"}, {"sampler": "dpmpp_sde_2m"}, {"sampler": "heun", "churn": 20.0}):
        assert np.abs(draw(seeds, 4, steps=12, **noisy) - exact).mean() > 20, noisy


def test_a_grid_is_found_once(bucket):
    run, words = bucket / "runs/walk", ("--grid", "found", "--steps", 4)
    assert sampled(bucket, *words, "--checkpoints", 3) == ["epoch-0003-ddim-4-grid-found-seeds-0-3.png"]
    found = files_of(run, "grids")
    numbers = json.loads(found["found-4.json"])["numbers"]
    assert numbers[0] == 49 and numbers == sorted({*numbers}, reverse=True) and len(numbers) == 4
    picture = files_of(run, "samples")["epoch-0003-ddim-4-grid-found-seeds-0-3.png"]
    sampled(bucket, *words, "--checkpoints", "1,3")
    assert files_of(run, "grids") == found
    assert files_of(run, "samples")["epoch-0003-ddim-4-grid-found-seeds-0-3.png"] == picture
    more = ("sample", "--run", "walk", "--bucket", bucket, *words, "--sampler", "unipc", "--count", 4)
    succeeded(ddpm_here(*more))
    assert "complete already" in succeeded(ddpm_here(*more))
    assert verify_run(open_store(str(bucket)), "walk").problems == []
    # Images of one set all visit the same points.
    (run / "grids/found-4.json").write_bytes(
        FoundGrid.from_json(found["found-4.json"], "").model_copy(update={"numbers": (49, 30, 20, 10)}).to_json()
    )
    assert "4 made at" in succeeded(ddpm_here(*more))


def test_a_sampler_of_the_users(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mysamplers.py").write_text(OWN)
    (own,) = sampled(bucket, "--sampler", "mysamplers:midway", "--steps", 5)
    assert own == f"epoch-0003-own-5-mysamplers.midway-{sha256(OWN.encode()).hexdigest()[:8]}-seeds-0-3.png"
    (ours,) = sampled(bucket, "--eta", 0.5, "--steps", 5)
    first, second = (np.asarray(Image.open(bucket / "runs/walk/samples" / name)) for name in (own, ours))
    grid = 98 + 2
    assert np.array_equal(first[-grid:, : 4 * 98], second[-grid:, : 4 * 98])
    sampled(bucket, "--sampler", "mysamplers:midway", "--steps", 5, "--mode", "inpaint", "--image", 3)
    with_count = ("sample", "--run", "walk", "--bucket", bucket, "--steps", 5, "--count", 4)
    succeeded(ddpm_here(*with_count, "--sampler", "mysamplers:midway"))
    assert verify_run(open_store(str(bucket)), "walk").problems == []
    (tmp_path / "mysamplers.py").write_text(f"{OWN}# Another.")
    (changed,) = sampled(bucket, "--sampler", "mysamplers:midway", "--steps", 5)
    assert changed != own
    for name, what in (
        ("mysamplers:nothing", "no attribute 'nothing'"),
        ("nothing_here:midway", "No module named 'nothing_here'"),
        ("mysamplers:number", "'int' object is not callable"),
        ("mysamplers:nothing_of_it", "it must return finite numbers [1, 3, 16, 16], as x, and returned NoneType"),
        ("mysamplers:smaller", "as x, and returned [1, 3, 8, 8]"),
    ):
        assert what in refused(ddpm_here(*with_count, "--sampler", name), 64)

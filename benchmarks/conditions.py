"""Conditions on Fashion-MNIST, after minutes of one thread: images 4 times as large, and the angle of sneakers.

The settings are those of the careful user in `benchmarks.quality`. Held-out images give the conditions. A probe, which
learns from real images alone, reads the angle of samples; what it reads from held-out images is the ceiling.
"""

from __future__ import annotations

import argparse
import gzip
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import CAREFUL, DDIM, IMAGES, SIZE, chosen_images, features, real_images, trained
from ddpm.conditions import VectorStatistics, derived, in_turn
from ddpm.figures import to_pixels
from ddpm.metrics import paired
from ddpm.model import Model
from job.config import EMBEDDED, draft, method

DERIVE = "downscale:4"
SAMPLES = 8
"""Samples of each held-out image, whose mean is scored as well."""
GAIN_DB = 0.5
SNEAKERS = 7
"""The class with a clear direction: the toe is on the left, the sole at the bottom."""
NEAR_DEGREES, NEAR_SHARE = 15, 0.9
PROBE_STEPS = 2000


def main(words: list[str] | None = None) -> None:
    """Trains both networks one after the other, and prints what was reached beside the goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conditions", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="processor time of each training loop")
    parser.add_argument("--images", type=int, default=12_000, help="number of training images")
    parser.add_argument("--draw", type=int, default=250, help="number of held-out images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images, and of training")
    parser.add_argument("--data", type=Path, default=IMAGES, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--only", choices=("enlarge", "turn"), help="one of the two; default: both")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    for name, judged in (("enlarge", enlarge), ("turn", turn)):
        if asked.only in (None, name):
            judged(asked)


def enlarge(asked: argparse.Namespace) -> None:
    """Learns to enlarge by 4; prints the scores of bicubic, one sample, and the mean of several, of held-out images."""
    model = learn(asked, chosen_images(asked.data, asked.images, asked.seed), {"condition.derive": DERIVE})
    truth = scaled(real_images(asked.data, "t10k")[: asked.draw])
    bicubic = derived(DERIVE, truth, 0, torch.arange(len(truth)))
    samples = draw(replace(model, given=in_turn(bicubic, None)), SAMPLES * len(truth))
    several = samples.view(SAMPLES, *truth.shape)
    ways = {"bicubic": bicubic, "one sample": several[0], f"mean of {SAMPLES} samples": several.mean(dim=0)}
    real, scores = seen_as(truth), {}
    print(f"\n{'4 times as large':<24}{'PSNR, dB':>10}{'SSIM':>8}{'features':>10}")
    for way, images in ways.items():
        psnr, ssim = paired(images, truth).mean(dim=0).tolist()
        distance = float((seen_as(images) - real).norm(dim=1).mean())
        scores[way] = (psnr, distance)
        print(f"{way:<24}{psnr:>10.2f}{ssim:>8.3f}{distance:>10.2f}")
    print("(features: distance of MobileNetV2's features from those of the true image; LPIPS has no weights here)")
    (before, far), (_, near), (psnr, _) = scores.values()
    verdict(f"mean {psnr - before:+.2f} dB beside bicubic, goal {GAIN_DB:+.2f} dB", psnr - before >= GAIN_DB)
    verdict(f"features of one sample {near:.2f}, goal below bicubic's {far:.2f}", near < far)


def turn(asked: argparse.Namespace) -> None:
    """Learns sneakers with their angle; prints how often a probe reads it from held-out images and from samples."""
    generator = torch.Generator().manual_seed(asked.seed)
    upright, unseen = (scaled(real_images(asked.data, part)[labels(asked.data, part)]) for part in ("train", "t10k"))
    upright = upright.repeat(-(-asked.images // len(upright)), 1, 1, 1)[: asked.images]
    angles = 2 * math.pi * torch.rand(len(upright), generator=generator)
    vectors = directions(angles)
    std, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
    numbers = VectorStatistics(("cosine", "sine"), tuple(mean.tolist()), tuple(std.tolist()))
    learnt = to_pixels(rotated(upright, angles))[..., 0]
    settings = {"condition.vector": len(numbers.names)}
    model = learn(asked, learnt, settings, numbers.normalised(vectors.tolist()))

    probe = probe_of(upright, generator)
    wanted = 2 * math.pi * torch.arange(asked.draw) / asked.draw
    given = in_turn(None, numbers.normalised(directions(wanted).tolist()))
    unseen = unseen[: asked.draw]
    turned = wanted[: len(unseen)]
    ways = {"held-out images": (rotated(unseen, turned), turned)}
    ways["samples"] = (draw(replace(model, given=given), asked.draw), wanted)
    print(f"\n{'angle of sneakers':<24}{f'within {NEAR_DEGREES}°':>12}{'median error':>14}")
    for way, (images, asked_for) in ways.items():
        error = errors_degrees(probe, images, asked_for)
        near = float((error <= NEAR_DEGREES).float().mean())
        print(f"{way:<24}{near:>12.1%}{float(error.median()):>13.1f}°")
    verdict(f"{near:.1%} of the samples within {NEAR_DEGREES}°, goal {NEAR_SHARE:.0%}", near >= NEAR_SHARE)


def learn(
    asked: argparse.Namespace, learnt: np.ndarray, settings: dict[str, Any], vectors: Tensor | None = None
) -> Model:
    """Trains on uint8 [n, 28, 28] and their normalised vectors; returns the model."""
    of_data = {"data.size": SIZE, "data.channels": 1, "model.num_classes": 0, "train.seed": asked.seed}
    of_data |= {"condition.channels": 1} if "condition.derive" in settings else {}
    config = draft(EMBEDDED, of_data | CAREFUL | settings)
    network = method.build_network(config, torch.device("cpu"))
    ours, seen = trained(network, config, learnt, asked.seconds, vectors)
    print(f"{seen:,} images learnt in {asked.seconds:g} s of one thread", flush=True)
    prediction, shape = method.prediction_of(config), config.image_shape
    return Model(ours.network, ours.process, prediction, shape, DDIM, conditioning=config.condition)


def draw(model: Model, images: int) -> Tensor:
    """Returns the samples of the first seeds, float32 [n, 1, 28, 28] in [-1, 1]."""
    return torch.cat([model.sample_seeds(seeds, DDIM) for seeds in torch.arange(images).split(100)])


def labels(folder: Path, part: str) -> np.ndarray:
    """Returns which images of a part are sneakers, bool [n]."""
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=8) == SNEAKERS


def scaled(pixels: np.ndarray) -> Tensor:
    """Returns uint8 [n, 28, 28] as float32 [n, 1, 28, 28] in [-1, 1]."""
    return torch.from_numpy(pixels.copy())[:, None].float() / 127.5 - 1


def seen_as(images: Tensor) -> Tensor:
    """Returns MobileNetV2's features of images in [-1, 1] as the pixels that a person gets, float64 [n, 1280]."""
    return features(to_pixels(images)[..., 0])


def directions(angles: Tensor) -> Tensor:
    """Returns cosine and sine, float32 [n, 2], of angles in radians."""
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Returns images, float32 [n, 1, 28, 28] in [-1, 1], rotated by angles in radians on black: bilinear."""
    cosine, sine = directions(angles).T
    none = torch.zeros_like(cosine)
    matrices = torch.stack([cosine, -sine, none, sine, cosine, none], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, [*x.shape], align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def probe_of(upright: Tensor, generator: torch.Generator) -> nn.Module:
    """Trains a small network to read cosine and sine from real images, each turned anew whenever it is drawn."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    torch.manual_seed(0)
    probe = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 2))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_STEPS)
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(upright), (64,), generator=generator)
        angles = 2 * math.pi * torch.rand(64, generator=generator)
        loss = F.mse_loss(probe(rotated(upright[chosen], angles)), directions(angles))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return probe.eval()


@torch.inference_mode()
def errors_degrees(probe: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
    """Returns the distance of what the probe reads from the angles in radians, in degrees from 0 to 180, [n]."""
    cosine, sine = probe(images).T
    difference = torch.atan2(sine, cosine) - angles
    return torch.atan2(difference.sin(), difference.cos()).abs().rad2deg()


def verdict(what: str, reached: bool) -> None:
    """Prints whether a goal was reached."""
    print(f"{'reached' if reached else 'MISSED'}: {what}", flush=True)


if __name__ == "__main__":
    main()

"""A trained network with all that sampling needs: `ddpm.load(folder).sample(16, seed=0)`."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ddpm import figures, interop, networks
from ddpm.catalogue import Diffusion, SampleOptions
from ddpm.objective import Condition
from ddpm.process import Prediction, Process, make_process
from ddpm.samplers import (
    Callback,
    Denoiser,
    NoiseAt,
    Sampling,
    Walk,
    evaluations_of,
    from_noise,
    generate,
    make_denoiser,
    noise_of,
)
from ddpm.threads import Threads, group_of, threads_of

MOST_TIMESTEPS = 100_000
"""Limit of the timesteps of a process that is loaded."""
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_SCHEDULER, _NAMES = "scheduler_config.json", "id2label.json"


class NotFiniteError(ValueError):
    """A network draws values that are not finite."""


@dataclass
class Model:
    """A network in evaluation mode with its process. An image depends on its seed alone.

    Attributes:
        network: its output has the images' shape, or twice their channels if it predicts variances as well.
        process: the process of its training.
        prediction: the meaning of its output.
        image_shape: (C, H, W) of the images or latents.
        sampling: the default settings of sampling.
        classes: names of the network's classes, by number.
        null_class: whether a further class stands for images without a class, as guidance needs.
        diffusion: the settings of its training.
        autocast: context for the network alone, such as bf16 autocast.
        decode: decodes latents to pixels [B, c, h, w]; `pixels` clamps these to [-1, 1].
        worse: a network with less training, for guidance away from it.
        worse_has_classes: whether it takes the classes too; without them it stands for images of any class.
        threads: share the images of a batch on a CPU.
        group_images: images that a thread computes at once; None: by the size of the batch.
        source: the place that it was loaded from, for people.
    """

    network: nn.Module
    process: Process
    prediction: Prediction
    image_shape: tuple[int, int, int]
    sampling: Sampling
    classes: tuple[str, ...] = ()
    null_class: bool = False
    diffusion: Diffusion = field(default_factory=Diffusion)
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    decode: Callable[[Tensor], Tensor] | None = None
    worse: nn.Module | None = None
    worse_has_classes: bool = True
    threads: Threads | None = None
    group_images: int | None = None
    source: str = ""

    def __repr__(self) -> str:
        """Returns one line; the generated one would have every layer of the network."""
        parts = [
            type(self.network).__name__,
            f"{sum(parameter.numel() for parameter in self.network.parameters()):,} parameters",
            f"{'latents' if self.decode else 'images'} {'×'.join(map(str, self.image_shape))}",
            f"prediction {self.diffusion.prediction}",
            f"schedule {self.diffusion.schedule}",
        ]
        parts += [f"{len(self.classes):,} classes"] if self.classes else []
        parts += [f"from {self.source}"] if self.source else []
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        """Returns the network's device."""
        return next(self.network.parameters()).device

    def sample(
        self,
        images: int = 1,
        *,
        seed: int = 0,
        classes: str | int | Sequence[str | int] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        as_tensor: bool = False,
        **options: Any,
    ) -> list[Image.Image] | Tensor:
        """Draws images: number k is that of seed `seed` + k, for any number of images.

        Args:
            images: number of images.
            seed: seed of the first image.
            classes: names or numbers of the classes that the seeds take in turn; None: all.
            sampler: such as `ddim`, `unipc` or `ddpm`.
            steps: number of sampling steps.
            guidance: scale of the guidance away from images without a class; 1: off.
            batch_size: images at a time.
            as_tensor: whether to return float32 [B, C, H, W] in [-1, 1] on the network's device instead of pictures.
            options: further fields of `Sampling`, such as `eta` or `grid`.

        Raises:
            ValueError: a number is out of range, a class, sampler or grid is unknown, there are more steps than
                timesteps, or the network has not learnt what guidance needs.
            NotFiniteError: the network draws values that are not finite.
            TypeError: an option is unknown.
        """
        for name, count in {"images": images, "batch_size": batch_size, "steps": 1 if steps is None else steps}.items():
            if count < 1:
                raise ValueError(f"{name}={count}: use 1 or more")
        if not 0 <= seed <= 2**63 - images or not 0 <= options.get("eta", 0) <= 1:
            raise ValueError(f"seed={seed}, eta={options.get('eta', 0)}: seeds are from 0 to 2^63 - 1, eta from 0 to 1")
        if "labels" in options:
            raise TypeError("labels: name classes, as in classes=['forest', 3]")
        if classes is not None:
            options["labels"] = self._labels(classes)
        if guidance is not None:
            options["guidance"] = float(guidance)
        sampling = self._sampling(sampler, steps, options)
        with _bar(total=images * self.evaluations_of(sampling)) as advance:
            parts = []
            for first in range(0, images, batch_size):
                seeds = torch.arange(first, min(first + batch_size, images), device=self.device) + seed
                parts.append(self.draw(seeds, sampling, lambda _, x_t, __: advance(len(x_t))))
        x = torch.cat(parts)
        if as_tensor:
            return x
        pixels = figures.to_uint8(x)
        return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in pixels]

    def _sampling(self, sampler: str | None, steps: int | None, options: dict[str, Any]) -> Sampling:
        """Returns this model's settings with these options."""
        own, all_steps = self.sampling.sampler, self.process.num_timesteps
        if steps is None and sampler not in (None, own) and "ddpm" in (sampler, own):
            # Ancestral sampling draws noise in few steps, and the other samplers need only few.
            steps = all_steps if sampler == "ddpm" else min(SampleOptions.steps, all_steps)
        chosen = {"steps": steps, "sampler": sampler, **options}
        sampling = replace(self.sampling, **{key: value for key, value in chosen.items() if value is not None})
        if sampling.guidance != 1 and not self.null_class and self.worse is None:
            raise ValueError("guidance needs a network that has also learnt images without their class")
        return sampling

    def draw(
        self, seeds: Tensor, sampling: Sampling, callback: Callback | None = None, walk: Walk = from_noise
    ) -> Tensor:
        """Returns the images of these seeds, int64 [B] on the device, as pixels [B, C, H, W] in [-1, 1].

        Args:
            seeds: seeds of one batch.
            sampling: the settings.
            callback: see `Callback`.
            walk: from the noise to the images.

        Raises:
            NotFiniteError: a pixel is not finite.
        """
        x = generate(self.denoiser(seeds, sampling, callback), self.process, sampling, self.noise_of(seeds), walk)
        # As a picture it would be grey, like a valid one.
        if not x.isfinite().all():
            raise NotFiniteError("the network draws values that are not finite: draw from an earlier checkpoint")
        return self.pixels(x)

    def pixels(self, x: Tensor) -> Tensor:
        """Returns the pixels of x [B, C, H, W], latents or images: float32 in [-1, 1]."""
        return (self.decode(x) if self.decode else x).clamp(-1, 1)

    def denoiser(self, seeds: Tensor, sampling: Sampling, callback: Callback | None = None) -> Denoiser:
        """Returns the denoiser for these seeds, int64 [B] on the device; seed k has class k mod n of n chosen ones."""
        taken = torch.tensor(sampling.labels or range(len(self.classes)), device=self.device)
        estimate = None
        if self.diffusion.self_conditioning:
            estimate = torch.zeros(len(seeds), *self.image_shape, device=self.device)
        return make_denoiser(
            self.predict,
            self.process,
            self.prediction,
            Condition(taken[seeds % len(taken)] if self.classes else None, estimate),
            clip=sampling.clip,
            callback=callback,
            guidance=sampling.guide,
            null_class=len(self.classes),
            worse=self.worse and partial(self._answer, self.worse),
            with_share=(sampling.sampler, sampling.variance) == ("ddpm", "learned_range"),
        )

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the network's output [B, …] under its autocast, without gradients."""
        return self._answer(self.network, x, t, condition)

    def _answer(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if network is self.worse and not self.worse_has_classes:
            condition = condition._replace(labels=None)
        if self.threads:
            return self.threads.sharing(network, self.autocast, self.group_images or group_of(len(x)))(x, t, condition)
        with torch.no_grad(), self.autocast():
            answer: Tensor = network(x, t, condition)
            return answer

    def noise_of(self, seeds: Tensor) -> NoiseAt:
        """Returns the noise of seeds, int64 [B] on the device."""
        return noise_of(seeds, self.image_shape, self.diffusion.offset_noise)

    def evaluations_of(self, sampling: Sampling, walk: Walk = from_noise) -> int:
        """Returns the number of evaluations of the network for an image."""
        return evaluations_of(self.process, sampling, self.image_shape, walk)

    def _labels(self, classes: str | int | Sequence[str | int]) -> tuple[int, ...]:
        if not self.classes:
            raise ValueError(f"classes={classes!r}: the network has no classes, so leave them out")
        several: Iterable[Any] = [classes]
        if isinstance(classes, Iterable) and not isinstance(classes, str):
            several = classes
        labels = tuple(map(self._label, several))
        if not labels:
            raise ValueError("classes: name one at least, or leave them out for all")
        return labels

    def _label(self, one: str | int) -> int:
        if one in self.classes:
            return self.classes.index(str(one))
        # Accepts NumPy's integers, but neither True nor 1.0.
        if hasattr(one, "__index__") and not isinstance(one, bool) and 0 <= index(one) < len(self.classes):
            return index(one)
        near = difflib.get_close_matches(str(one), self.classes, 1)
        there = f"did you mean {near[0]!r}?" if near else f"there are {len(self.classes):,}: {', '.join(self.classes)}"
        raise ValueError(f"unknown class {one!r}; {there:.300}")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("sampling", total=total)
        yield lambda done: bars.advance(task, done)


def load(folder: str | Path, device: str | torch.device | None = None) -> Model:
    """Loads the model of a diffusers folder on disk: a pipeline of `UNet2DModel` and a scheduler, or the network alone.

    It runs no code from the folder, since it reads weights from safetensors alone. The default sampler is `ddim`. The
    file `id2label.json`, if there is one, names the classes.

    Args:
        folder: with `unet/config.json`, or `config.json`.
        device: None: the first GPU, if there is one.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ValueError: the folder is not of diffusers, its network or process has no counterpart here, or it is corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: name one of diffusers, with unet/config.json in it")
    inner = next((inner for inner in (root / "unet", root) if (inner / _CONFIG).is_file()), None)
    if inner is None:
        raise ValueError(f"{root} is not a diffusers folder: neither unet/config.json nor config.json is in it")
    found = next((path for path in (root / "scheduler" / _SCHEDULER, root / _SCHEDULER) if path.is_file()), None)
    try:
        options = interop.unet_options(_json(inner / _CONFIG))
        scheduler = _json(found) if found else {}
        said = interop.process_options(scheduler)
        shape, labels = _network_shape(options, said["variance"]), options["num_classes"]
        # On "meta" no memory is allocated before the weights are known to fit.
        with torch.device("meta"):
            network = networks.build("unet", **options)
        tensors: dict[str, Tensor] = {}
        for path in _weights(inner):
            tensors |= load_file(path)
        # A network that trained with augmentation has it, and no sample needs it.
        tensors.pop("augmentation_embedding.weight", None)
        tensors = interop.with_names_of_today(tensors)
        # Copies, as a file that is written over later would change these weights.
        weights = {name: each.to(torch.float32, copy=True) for name, each in tensors.items()}
        network.load_state_dict(weights, assign=True)
        classes = _class_names(root / _NAMES, labels) if labels else ()
        if not 1 <= int(said["timesteps"]) <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={said['timesteps']}: from 1 to {MOST_TIMESTEPS:,}")
        diffusion = Diffusion(**said, self_conditioning=options["in_channels"] == 2 * shape[0])
        process = make_process(diffusion)
    except FileNotFoundError:
        raise
    # A corrupt folder may raise any of these in the readers.
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{root} cannot be loaded: {' '.join(str(error).split()):.300}") from None
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(
        network=network.to(device).eval().requires_grad_(False),
        process=process,
        prediction=Prediction(diffusion.prediction),
        image_shape=shape,
        sampling=Sampling(steps=min(SampleOptions.steps, diffusion.timesteps), **interop.sample_options(scheduler)),
        classes=classes,
        null_class=len(classes) < labels,
        diffusion=diffusion,
        threads=threads_of(device),
        source=str(root),
    )


def _network_shape(options: interop.Options, variance: str) -> tuple[int, int, int]:
    """Returns (C, H, W) of the images of a network with these arguments.

    Raises:
        ValueError: its numbers of channels do not fit a diffusion model.
    """
    channels = options["out_channels"] // (2 if variance == "learned_range" else 1)
    if options["in_channels"] not in (channels, 2 * channels):
        found = f"{options['in_channels']} channels to {options['out_channels']}"
        raise ValueError(
            f"the network maps {found}: a scheduler with variance_type=learned_range is missing, or it is another model"
        )
    return channels, *options["image_size"].shape


def _class_names(path: Path, labels: int) -> tuple[str, ...]:
    """Returns the names of a network's classes; numbers without the file. A last label without a name means no class.

    Raises:
        ValueError: the file does not name the classes of this network.
    """
    if not path.is_file():
        return tuple(map(str, range(labels)))
    said = _json(path)
    names = tuple(str(said.get(str(number), "")) for number in range(len(said)))
    if not names or not all(names) or len(names) not in (labels, labels - 1):
        raise ValueError(f"{path.name} does not name the {labels} classes of the network, from 0")
    return names


def _weights(folder: Path) -> list[Path]:
    if (path := folder / _WEIGHTS).is_file():
        return [path]
    if (index := folder / f"{_WEIGHTS}.index.json").is_file():
        names = sorted({str(name) for name in _json(index).get("weight_map", {}).values()})
        if any("/" in name or not (folder / name).is_file() for name in names):
            raise FileNotFoundError(f"{index} names files that are missing")
        return [folder / name for name in names]
    raise FileNotFoundError(
        f"{folder} has no {_WEIGHTS}: only safetensors are read here, for other files may run code; "
        "diffusers writes it by save_pretrained"
    )


def _json(path: Path) -> dict[str, Any]:
    said = json.loads(path.read_bytes())
    if not isinstance(said, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return said

"""What diffusers reads of a checkpoint, where it lies: the weights that draw, and what describes them.

    RUN/checkpoints/…/unet/diffusion_pytorch_model.safetensors   the weights of `sample.weights`, which lie nowhere else
                      unet/config.json                          says that they are a UNet2DModel's, and of which shape
                      scheduler/scheduler_config.json           the process, and how the run draws
                      model_index.json                          says that this is a DDIMPipeline

The first two are there if diffusers has such a network, the third if it has such a process, the last if one of its
pipelines can draw from both without being told a class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ddpm import catalogue, interop
from job.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = "0.36.0"
"""Of diffusers, in which all that these files say is known."""

WEIGHTS = "unet/diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"


class Described(NamedTuple):
    """What diffusers can be told of a run."""

    objects: dict[str, bytes]
    """The JSON objects beside the weights, by key below the checkpoint; none if it has no such network."""
    lacking: str
    """Why that is not a whole pipeline, if it is none."""


def described(config: RunConfig) -> Described:
    """What diffusers reads of a run's checkpoints, beside the weights."""
    model, diffusion, sample = config.model, config.diffusion, config.sample
    if not isinstance(model, catalogue.UNet):
        return Described({}, f"model.kind={model.kind} is no network that diffusers draws images with by itself")
    channels, size, _ = config.image_shape
    said: dict[str, dict[str, Any]] = {}
    lacking = ""
    try:
        said["unet/config.json"] = interop.unet2d_config(
            model,
            image_size=size,
            in_channels=channels * (1 + diffusion.self_conditioning),
            out_channels=channels * (1 + diffusion.learns_variance),
            num_classes=(model.num_classes or 0) + (model.label_dropout > 0),
        )
        scheduler = interop.scheduler_config(diffusion, sample)
        said["scheduler/scheduler_config.json"] = scheduler
        kind = scheduler["_class_name"].removesuffix("Scheduler")
        if config.data.latents:
            lacking = f"{kind}Pipeline draws pixels, and the network latents"
        elif model.num_classes:
            lacking = f"{kind}Pipeline cannot be told a class"
        elif diffusion.self_conditioning:
            lacking = f"{kind}Pipeline does not show the network its own estimate (diffusion.self_conditioning)"
        else:
            said["model_index.json"] = {
                "_class_name": f"{kind}Pipeline",
                "scheduler": ["diffusers", f"{kind}Scheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
    except interop.NoCounterpartError as error:
        lacking = str(error)
    objects = {
        key: (json.dumps({"_diffusers_version": FORMAT_VERSION} | values, indent=2, sort_keys=True) + "\n").encode()
        for key, values in said.items()
    }
    return Described(objects, lacking)


def weights_names(parts: int) -> list[str]:
    """What diffusers calls so many files of weights."""
    if parts == 1:
        return [f"{WEIGHTS}.safetensors"]
    return [f"{WEIGHTS}-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]


def weights_index(size_bytes: int, names: dict[str, str]) -> bytes:
    """The JSON object that says in which of several files a tensor lies, by the tensor's name."""
    return (json.dumps({"metadata": {"total_size": size_bytes}, "weight_map": names}, indent=2) + "\n").encode()


class FilesForDiffusers(NamedTuple):
    """The weights that draw and what describes them, as they lie in a checkpoint."""

    drawn: str
    """Which weights; none where diffusers has no such network."""
    names: dict[str, str]
    """Their files below the checkpoint, by the names that they would have otherwise."""
    descriptions: dict[str, bytes]
    """The JSON objects beside them, by key below the checkpoint."""


def files_for_diffusers(config: RunConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> FilesForDiffusers:
    """What the files of the weights that draw are called, and what describes them.

    Args:
        config: of the run.
        parts: all tensors of a checkpoint by file, each named after its group: `ema-00.safetensors`.
    """
    descriptions = described(config).objects
    drawn = config.sample.weights if descriptions else ""
    weights = {part: tensors for part, tensors in parts.items() if drawn and part.rpartition("-")[0] == drawn}
    names = dict(zip(weights, weights_names(len(weights)), strict=True))
    if len(weights) > 1:
        where = {tensor: names[part].rpartition("/")[2] for part, tensors in weights.items() for tensor in tensors}
        size_bytes = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
        descriptions[INDEX] = weights_index(size_bytes, where)
    return FilesForDiffusers(drawn, names, descriptions)

"""The files of a checkpoint that diffusers reads: the weights to sample with, and their description.

    RUN/checkpoints/…/unet/diffusion_pytorch_model.safetensors   the weights of `sample.weights`, which lie nowhere else

    RUN/checkpoints/…/unet/config.json                 the arguments of its UNet2DModel
    RUN/checkpoints/…/scheduler/scheduler_config.json  the diffusion process, and the sampler of the run
    RUN/checkpoints/…/model_index.json                 the class of its pipeline
    RUN/checkpoints/…/id2label.json                    the names of the classes, by number
    RUN/checkpoints/…/run_config.yaml                  the configuration of the run, as last changed

A checkpoint has the first two if diffusers has such a network, and the third if it has such a process. It has the
fourth if one of its pipelines can sample from both. None takes a class: exports bring code of their own for that.

The names of classes have the form of the hub's label files (huggingface/label-files), which DiTPipeline takes. They and
the configuration are files of their own, because diffusers warns at each load of keys that it does not know.
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
"""The version of diffusers that knows all these settings."""

WEIGHTS = "unet/diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
ID2LABEL = "id2label.json"
RUN_CONFIG = "run_config.yaml"
PIPELINE_CODE = "pipeline.py"
UNET_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "scheduler/scheduler_config.json"


class Described(NamedTuple):
    """The description of a run for diffusers."""

    objects: dict[str, bytes]
    """The objects beside the weights, by key below the checkpoint; empty if diffusers lacks the network."""
    lacking: str
    """The reason why they do not make a whole pipeline; empty if they do."""


def described(config: RunConfig, classes: tuple[str, ...], has_code: bool = False) -> Described:
    """Returns the objects beside the weights of a run.

    Args:
        config: of the run.
        classes: names of its classes.
        has_code: whether `job.exchange.class_pipeline`, which takes classes, lies beside them.
    """
    model, diffusion, sample = config.model, config.diffusion, config.sample
    if not isinstance(model, catalogue.UNetConfig):
        return Described({}, f"model.kind={model.kind} is not a network that diffusers samples from")
    channels, *_ = config.image_shape
    values: dict[str, dict[str, Any]] = {}
    lacking = ""
    try:
        values[UNET_CONFIG] = interop.unet2d_config(
            model,
            image_size=config.image_size,
            in_channels=channels * (1 + diffusion.self_conditioning),
            out_channels=channels * (1 + diffusion.learns_variance),
            num_classes=(model.num_classes or 0) + (model.label_dropout > 0),
        )
        scheduler = interop.scheduler_config(diffusion, sample)
        values[SCHEDULER_CONFIG] = scheduler
        kind = scheduler["_class_name"]
        # The loop of DDPM's takes the steps of any scheduler.
        pipeline = "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline"
        if config.data.latents:
            lacking = f"{pipeline} samples pixels, and the network latents"
        elif diffusion.self_conditioning:
            lacking = f"{pipeline} does not feed the network its own estimate (diffusion.self_conditioning)"
        elif model.num_classes and not has_code:
            lacking = f"{pipeline} does not take a class"
        else:
            values["model_index.json"] = {
                "_class_name": ["pipeline", "ClassConditionalPipeline"] if model.num_classes else pipeline,
                "scheduler": ["diffusers", kind],
                "unet": ["diffusers", "UNet2DModel"],
            }
    except interop.NoCounterpartError as error:
        lacking = str(error)
    version = {"_diffusers_version": FORMAT_VERSION}
    objects = {key: _json(dict(sorted((version | value).items()))) for key, value in values.items()}
    if objects and classes:
        objects[ID2LABEL] = _json({str(number): name for number, name in enumerate(classes)})
    if objects:
        without_names = config.data.model_copy(update={"classes": ()})
        objects[RUN_CONFIG] = config.model_copy(update={"data": without_names}).to_yaml().encode()
    return Described(objects, lacking)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def weights_names(parts: int) -> list[str]:
    """Returns diffusers' names for this number of weight files."""
    if parts == 1:
        return [f"{WEIGHTS}.safetensors"]
    return [f"{WEIGHTS}-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]


def weights_index(size_bytes: int, names: dict[str, str]) -> bytes:
    """Returns the JSON object that maps each tensor's name to its file, for weights in several files."""
    return _json({"metadata": {"total_size": size_bytes}, "weight_map": names})


class FilesForDiffusers(NamedTuple):
    """The names and descriptions of a checkpoint's weights to sample with."""

    drawn: str
    """The group of these weights; empty if diffusers lacks the network."""
    names: dict[str, str]
    """Their files below the checkpoint, by part."""
    descriptions: dict[str, bytes]
    """The objects beside them, by key below the checkpoint."""


def files_for_diffusers(
    config: RunConfig, classes: tuple[str, ...], parts: Mapping[str, Mapping[str, Tensor]]
) -> FilesForDiffusers:
    """Names the parts with the weights to sample with, and describes them.

    Args:
        config: of the run.
        classes: names of its classes.
        parts: all tensors of a checkpoint by part, each named after its group: `ema-00.safetensors`.
    """
    descriptions = described(config, classes).objects
    drawn = config.sample.weights if descriptions else ""
    weights = {part: tensors for part, tensors in parts.items() if drawn and part.rpartition("-")[0] == drawn}
    names = dict(zip(weights, weights_names(len(weights)), strict=True))
    if len(weights) > 1:
        where = {tensor: names[part].rpartition("/")[2] for part, tensors in weights.items() for tensor in tensors}
        size_bytes = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
        descriptions[INDEX] = weights_index(size_bytes, where)
    return FilesForDiffusers(drawn, names, descriptions)

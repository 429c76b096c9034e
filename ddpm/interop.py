"""Checkpoints of other code bases: their configurations and the names of their parameters.

The parameters of `UNet` have the names of diffusers' `UNet2DModel`, those of `DomeUNet` dome272's names. The functions
here translate diffusers' configurations in both directions, the names of older diffusers folders, and those of Ho et
al.'s networks in pesser/pytorch_diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ddpm.catalogue import Diffusion, SampleOptions, UNetConfig, levels_with_attention
from ddpm.image_size import ImageSize
from ddpm.process import sigmoid_schedule

Options = dict[str, Any]
"""Keyword arguments of a network, or keys of a configuration."""


class NoCounterpartError(ValueError):
    """A part of a configuration has no counterpart in the other code base; the message names it."""


_FIXED: Options = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
    "num_train_timesteps": None,
}
"""Defaults of `UNet2DModel` that are the only values with a counterpart."""
_CONVENTIONS: dict[str, Options] = {
    "ho": {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "diffusers": {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
}
_DEFAULTS: Options = {
    **_FIXED,
    **_CONVENTIONS["diffusers"],
    "downsample_type": "conv",
    "upsample_type": "conv",
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    "dropout": 0.0,
    "num_class_embeds": None,
}
"""All defaults of `UNet2DModel`."""
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
_SCHEDULES: dict[str, tuple[str, float, float]] = {
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
"""diffusers' names, and the β at both ends, which the cosine does not use."""


def unet2d_config(
    model: UNetConfig, *, image_size: ImageSize, in_channels: int, out_channels: int, num_classes: int
) -> Options:
    """Returns the `config.json` of the diffusers `UNet2DModel` that equals `UNet` with these arguments.

    Raises:
        NoCounterpartError: the attention has a fixed number of heads on several widths.
    """
    widths = [model.channels * mult for mult in model.channel_mults]
    heads, head_channels = model.heads, model.head_channels
    has_attention = levels_with_attention(model, image_size)
    if head_channels is None and heads > 1:
        attended = {width for width, has in zip(widths, has_attention, strict=True) if has} | {widths[-1]}
        if len(attended) > 1:
            raise NoCounterpartError(
                f"diffusers' UNet2DModel gives every head the same width, and here {heads} heads share "
                f"{' and '.join(map(str, sorted(attended)))} channels: nothing but model.head_channels can be exported"
            )
        head_channels = attended.pop() // heads
    down = ["Attn" if has else "Resnet" if model.resample_in_blocks else "" for has in has_attention]
    resampling = "resnet" if model.resample_in_blocks else "conv"
    ends = {"": "Block2D", "Attn": "Block2D", "Resnet": "sampleBlock2D"}
    return {
        "_class_name": "UNet2DModel",
        **_DEFAULTS,
        **_CONVENTIONS[model.conventions],
        "sample_size": image_size.height if image_size.is_square else [*image_size.shape],
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": widths,
        "down_block_types": [f"{kind}Down{ends[kind]}" for kind in down],
        "up_block_types": [f"{kind}Up{ends[kind]}" for kind in reversed(down)],
        "layers_per_block": model.layers_per_level,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": head_channels,
        "norm_num_groups": model.norm_groups,
        "attn_norm_num_groups": model.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "dropout": model.dropout,
        "num_class_embeds": num_classes or None,
    }


def unet_options(config: Mapping[str, Any]) -> Options:
    """Returns the arguments of `UNet` that equal a diffusers `UNet2DModel`: the inverse of `unet2d_config`.

    Raises:
        NoCounterpartError: the configuration is of another network, or has a value without a counterpart.
    """
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise NoCounterpartError(f"it is a {name}, and of diffusers' networks UNet2DModel alone has a counterpart")
    said = _DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in _FIXED.items():
        if said[key] != value:
            raise NoCounterpartError(f"{key}={said[key]!r} has no counterpart: {value!r} alone has")
    for key, known in (
        ("resnet_time_scale_shift", ("default", "scale_shift")),
        ("downsample_type", ("conv", "resnet")),
    ):
        if said[key] not in known:
            raise NoCounterpartError(f"{key}={said[key]!r} has no counterpart: {' and '.join(known)} have")
    conventions = [of for of, values in _CONVENTIONS.items() if values.items() <= said.items()]
    if not conventions:
        choices = ", ".join(f"{key}={said[key]!r}" for key in _CONVENTIONS["ho"])
        raise NoCounterpartError(f"{choices} have no counterpart: those of Ho et al. or diffusers' defaults have")
    try:
        sides, widths = said["sample_size"], [int(width) for width in said["block_out_channels"]]
        # Two numbers are height and width.
        size = ImageSize(*map(int, sides)) if isinstance(sides, list | tuple) else ImageSize.of(sides)
        down = [_level(kind, said["downsample_type"]) for kind in said["down_block_types"]]
        up = [_level(kind, said["upsample_type"]) for kind in said["up_block_types"]][::-1]
        inside = {"in_channels": int(said["in_channels"]), "out_channels": int(said["out_channels"])}
        multiples = [width // widths[0] for width in widths]
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise NoCounterpartError(f"it does not say what it is made of ({type(error).__name__}: {error})") from None
    if [width // widths[0] * widths[0] for width in widths] != widths:
        raise NoCounterpartError(f"block_out_channels={widths} have no counterpart: multiples of the first alone have")
    groups, scale_shift = said.get("attn_norm_num_groups"), said["resnet_time_scale_shift"] == "scale_shift"
    if groups != said["norm_num_groups"] and (groups is not None or scale_shift):
        raise NoCounterpartError(f"attn_norm_num_groups={groups!r} has no counterpart: that of the other norms has")
    # The last level keeps the size, in spite of its name.
    resamples = {level.in_blocks for level in (*down[:-1], *up[1:])}
    attended = [level.has_attention for level in down]
    if len(resamples) > 1 or attended != [level.has_attention for level in up] or len(down) != len(widths):
        kinds = f"down_block_types={said['down_block_types']} with up_block_types={said['up_block_types']}"
        raise NoCounterpartError(f"{kinds} have no counterpart: levels that mirror each other alone have")
    settings = {
        "channels": widths[0],
        "channel_mults": tuple(multiples),
        "attention_sizes": tuple(min(size.shape) // 2**level for level, has in enumerate(attended) if has),
        "layers_per_level": said["layers_per_block"],
        "norm_groups": said["norm_num_groups"],
        "heads": 1,
        "head_channels": said["attention_head_dim"],
        "scale_shift": scale_shift,
        "resample_in_blocks": resamples == {True},
        "dropout": said["dropout"],
        "num_classes": said["num_class_embeds"] or 0,
        "conventions": conventions[0],
    }
    try:
        # A network of a billion layers would be built without end.
        TypeAdapter(UNetConfig).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"][0].lower() + first["msg"][1:]
        raise NoCounterpartError(f"{first['loc'][0]}={first['input']!r:.60} has no counterpart: {why}") from None
    return {"image_size": size, **inside, **settings}


class _Level(NamedTuple):
    """The meaning of a block type of `UNet2DModel`."""

    has_attention: bool
    in_blocks: bool
    """Whether residual blocks change the size."""


def _level(kind: str, resampling: str) -> _Level:
    match = re.fullmatch(r"(|Attn|Resnet)(?:Down|Up)(?:sample)?Block2D", kind)
    if not match:
        raise NoCounterpartError(f"{kind} has no counterpart")
    return _Level(match[1] == "Attn", match[1] == "Resnet" or (match[1] == "Attn" and resampling == "resnet"))


def scheduler_config(diffusion: Diffusion, options: SampleOptions) -> Options:
    """Returns the `scheduler_config.json` of diffusers for a process: DDPM's, DDIM's or that of a rectified flow.

    Raises:
        NoCounterpartError: diffusers has no such process or prediction.
    """
    schedule, timesteps, prediction = diffusion.schedule, diffusion.timesteps, diffusion.prediction
    jumps = diffusion.objective == "consistency"
    if (schedule, prediction) == ("flow", "flow"):
        # Its input of the network is σ times this number, and ours is 1000 σ.
        return {"_class_name": _FLOW, "num_train_timesteps": 1000, "shift": options.shift} | (
            {"stochastic_sampling": True} if jumps else {}
        )
    if schedule == "sigmoid":
        betas = sigmoid_schedule(timesteps).betas.tolist()
        named: Options = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": betas}
    elif schedule in _SCHEDULES:
        name, start, end = _SCHEDULES[schedule]
        named = {"beta_schedule": name, "beta_start": start, "beta_end": end, "trained_betas": None}
    else:
        raise NoCounterpartError(f"diffusion.schedule={schedule} has no counterpart in diffusers' pipelines")
    if prediction not in _PREDICTIONS:
        raise NoCounterpartError(f"diffusion.prediction={prediction} has no counterpart in diffusers' DDIMScheduler")
    kind: Options = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}
    if diffusion.learns_variance:
        kind = {"_class_name": "DDPMScheduler", "variance_type": diffusion.variance}
    elif jumps:
        # At this scale its estimate is that of the network at every timestep but 0.
        kind = {"_class_name": _JUMPS, "timestep_scaling": 1e4, "original_inference_steps": min(50, timesteps)}
    return {
        **kind,
        "num_train_timesteps": timesteps,
        **named,
        "prediction_type": _PREDICTIONS[prediction],
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "clip_sample": options.clip,
        "clip_sample_range": 1.0,
        "steps_offset": 0,
        "timestep_spacing": options.grid if options.grid in ("leading", "linspace") else "trailing",
        "thresholding": False,
    }


def process_options(config: Mapping[str, Any]) -> Options:
    """Returns the settings of the process in a `scheduler_config.json` of diffusers: `schedule`, `timesteps`, ….

    Raises:
        NoCounterpartError: the process or the prediction has no counterpart.
    """
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if kind == _FLOW:
        for key, value in _USUAL_FLOW.items():
            if config.get(key, value) != value:
                raise NoCounterpartError(f"{key}={config[key]!r} has no counterpart: {value!r} alone has")
        jumps = {"objective": "consistency"} if config.get("stochastic_sampling") else {}
        return {"schedule": "flow", "timesteps": 1000, "prediction": "flow"} | _NO_BETAS | jumps
    if not _OF_BETAS.fullmatch(kind):
        raise NoCounterpartError(f"{kind} has no counterpart: schedulers of betas have, such as DDPMScheduler")
    for key, value in _USUAL.items():
        if config.get(key, value) != value:
            raise NoCounterpartError(f"{key}={config[key]!r} has no counterpart: {value!r} alone has")
    schedules = {name: ours for ours, (name, _, _) in _SCHEDULES.items()}
    name, betas = config.get("beta_schedule", "linear"), config.get("trained_betas")
    if name not in schedules:
        raise NoCounterpartError(f"beta_schedule={name!r} has no counterpart: {', '.join(schedules)} have")
    schedule = schedules[name]
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if betas is not None:
        sigmoid = sigmoid_schedule(len(betas)).betas
        if not torch.allclose(torch.tensor(betas, dtype=sigmoid.dtype), sigmoid, rtol=1e-6):
            raise NoCounterpartError(
                "trained_betas have no counterpart but where they are those of the sigmoid schedule"
            )
        schedule = "sigmoid"
    elif schedule != "cosine" and ends != _SCHEDULES[schedule][1:]:
        raise NoCounterpartError(f"beta_start and beta_end {ends} have no counterpart: {_SCHEDULES[schedule][1:]} have")
    variance = str(config.get("variance_type") or "fixed")
    if variance == "learned":
        raise NoCounterpartError("variance_type='learned' has no counterpart: learned_range has")
    variance = variance if variance == "learned_range" else "fixed"
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in predictions:
        raise NoCounterpartError(f"prediction_type={predicted!r} has no counterpart: {', '.join(predictions)} have")
    return {
        "schedule": schedule,
        "timesteps": config.get("num_train_timesteps", 1000),
        "prediction": predictions[predicted],
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "variance": variance,
    } | ({"objective": "consistency"} if kind == _JUMPS else {})


def sample_options(config: Mapping[str, Any]) -> Options:
    """Returns the settings of sampling in a `scheduler_config.json` of diffusers: `clip`, and a DDPM's `variance`."""
    if config.get("_class_name") == _FLOW:
        return {"clip": False, "shift": float(config.get("shift", 1.0))} | (
            _IN_FEW_STEPS if config.get("stochastic_sampling") else {}
        )
    found: Options = {"clip": bool(config.get("clip_sample", True))}
    if config.get("_class_name") == _JUMPS:
        found |= _IN_FEW_STEPS
    if (variance := config.get("variance_type", "fixed_small")) in ("fixed_small", "fixed_large"):
        found["variance"] = variance
    return found


def with_null_class(embeddings: Tensor) -> Tensor:
    """Returns embeddings of classes [n, E] followed by zeros for images without a class: [n + 1, E]."""
    return F.pad(embeddings, (0, 0, 0, 1))


_OF_BETAS = re.compile(
    "(DDPM(Parallel)?|DDIM(Parallel|Inverse)?|PNDM|LMSDiscrete|Euler(Ancestral)?Discrete|HeunDiscrete|KDPM2(Ancestral)?"
    "Discrete|DPMSolver(Multistep|MultistepInverse|Singlestep|SDE)|DEISMultistep|UniPCMultistep|SASolver|LCM)Scheduler"
)
"""Schedulers of diffusers whose process is a table of betas; the others have keys of the same names."""
_FLOW, _JUMPS = "FlowMatchEulerDiscreteScheduler", "LCMScheduler"
_IN_FEW_STEPS: Options = {"sampler": "consistency", "grid": "renoise", "steps": 2}
_USUAL_FLOW: Options = {
    **dict.fromkeys(("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
    **{"invert_sigmas": False, "shift_terminal": None, "num_train_timesteps": 1000},
}
"""Values of a rectified flow's scheduler that alone have a counterpart."""
_NO_BETAS: Options = {"zero_terminal_snr": False, "variance": "fixed"}
_USUAL: Options = {"thresholding": False, "clip_sample_range": 1.0}
PREFIXES = ("ema_model.", "module.", "_orig_mod.", "model.", "unet.")
"""Prefixes of parameter names that wrappers add: DDP, torch.compile, averages, and modules that hold a network."""


def without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters without the wrappers' prefixes; of weights and their averages, the averages alone."""
    named = dict(tensors)
    while prefix := next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in named)), None):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    return named


_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_HO = (
    (r"temb\.dense\.0\.", r"time_embedding.linear_1."),
    (r"temb\.dense\.1\.", r"time_embedding.linear_2."),
    (r"mid\.block_1\.", r"mid_block.resnets.0."),
    (r"mid\.block_2\.", r"mid_block.resnets.1."),
    (r"mid\.attn_1\.", r"mid_block.attentions.0."),
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"(down|up)\.(\d+)\.(down|up)sample\.conv\.", r"\1_blocks.\2.\3samplers.0.conv."),
    (r"norm_out\.", r"conv_norm_out."),
    (r"(.*)\.temb_proj\.", r"\1.time_emb_proj."),
    (r"(.*)\.nin_shortcut\.", r"\1.conv_shortcut."),
    (r"(.*attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(.*attentions\.\d+)\.(q|k|v)\.", r"\1.to_\2."),
    (r"(.*attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Prefixes of names in Ho et al.'s networks and their replacements, in the order of replacement."""


def with_names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a diffusers folder with the present names of the attention."""

    def renamed(name: str) -> str:
        where, _, end = name.rpartition(".")
        parent, _, layer = where.rpartition(".")
        return f"{parent}.{_LEGACY[layer]}.{end}" if ".attentions." in name and layer in _LEGACY else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def from_ho(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a network of Ho et al., as in pesser/pytorch_diffusion, with the names of `UNet`."""
    levels = len({name.split(".")[1] for name in tensors if name.startswith("up.")})

    def renamed(name: str) -> str:
        for pattern, replacement in _HO:
            name = re.sub(f"^{pattern}", replacement, name)
        # They number the levels of the way up by size.
        return re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)

    named = {renamed(name): tensor for name, tensor in tensors.items()}
    # Their projections of the attention are 1×1 convolutions.
    return {
        name: tensor.flatten(1) if ".to_" in name and tensor.ndim == 4 else tensor for name, tensor in named.items()
    }


def ho_options(tensors: Mapping[str, Tensor], image_size: ImageSize | None = None) -> Options:
    """Returns the arguments of `UNet` for tensors of `from_ho`; their shapes determine all but the size of the images.

    Args:
        tensors: with the names of `UNet`.
        image_size: None: the size at which the attention is at 16 pixels, as in all of Ho et al.'s networks.

    Raises:
        NoCounterpartError: the tensors are of another network, or do not determine the size of the images.
    """
    try:
        channels = len(tensors["conv_in.weight"])
        levels = len({name.split(".")[1] for name in tensors if name.startswith("down_blocks.")})
        widths = [len(tensors[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(levels)]
    except KeyError as error:
        raise NoCounterpartError(f"the tensor {error} is not there") from None
    attended = [level for level in range(levels) if f"down_blocks.{level}.attentions.0.to_q.weight" in tensors]
    if image_size is None and not attended:
        raise NoCounterpartError("the tensors do not determine the size of the images: give it")
    size = image_size or ImageSize.of(16 * 2 ** attended[0])
    return {
        "image_size": size,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": len(tensors["conv_out.weight"]),
        "channels": channels,
        "channel_mults": tuple(width // channels for width in widths),
        "attention_sizes": tuple(min(size.shape) // 2**level for level in attended),
        "layers_per_level": len({name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")}),
    }

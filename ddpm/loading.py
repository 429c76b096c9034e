"""The model of a folder of diffusers on disk, from safetensors and JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import interop, networks
from ddpm.catalogue import Conditioning, Diffusion, SampleOptions
from ddpm.device import best_device
from ddpm.model import Model, Sampling
from ddpm.networks.adapter import build_adapted
from ddpm.process import Prediction, make_process
from ddpm.threads import threads_of

MOST_TIMESTEPS = 100_000
"""Limit of the timesteps of a process that is loaded."""
NETWORK_JSON = "network.json"
"""The file that describes a network of a user, in the place of `config.json`."""
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_SCHEDULER, _NAMES = "scheduler_config.json", "id2label.json"
_CONDITION = "condition.json"


def load(
    folder: str | Path, device: str | torch.device | None = None, network: type[torch.nn.Module] | None = None
) -> Model:
    """Loads the model of a diffusers folder on disk: a pipeline of `UNet2DModel` and a scheduler, or the network alone.

    It runs no code from the folder, since it reads weights from safetensors alone. The default sampler is `ddim`. The
    file `id2label.json`, if there is one, names the classes, and `condition.json` has the settings of the condition.

    Args:
        folder: with `unet/config.json`, or `config.json`.
        device: None: the first GPU, if there is one.
        network: the class of a network of a user, for a folder with its `network.json`.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ValueError: the folder is not of diffusers, its network or process has no counterpart here, or it is corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: name one of diffusers, with unet/config.json in it")
    if (root / NETWORK_JSON).is_file():
        return _own_model(root, device, network)
    inner = next((inner for inner in (root / "unet", root) if (inner / _CONFIG).is_file()), None)
    if inner is None:
        raise ValueError(f"{root} is not a diffusers folder: neither unet/config.json nor config.json is in it")
    found = next((path for path in (root / "scheduler" / _SCHEDULER, root / _SCHEDULER) if path.is_file()), None)
    try:
        options = interop.unet_options(_json(inner / _CONFIG))
        scheduler = _json(found) if found else {}
        said = interop.process_options(scheduler)
        conditioning = _conditioning(root)
        shape, labels = _network_shape(options, said["variance"], conditioning.channels), options["num_classes"]
        # `build` counts the images alone.
        options["in_channels"] -= conditioning.channels
        # On "meta" no memory is allocated before the weights are known to fit.
        with torch.device("meta"):
            unet = networks.build("unet", **options, condition_channels=conditioning.channels)
        tensors: dict[str, Tensor] = {}
        for path in _weights(inner):
            tensors |= load_file(path)
        # A network that trained with augmentation has it, and no sample needs it.
        tensors.pop("augmentation_embedding.weight", None)
        tensors = interop.with_names_of_today(tensors)
        # Copies, as a file that is written over later would change these weights.
        weights = {name: each.to(torch.float32, copy=True) for name, each in tensors.items()}
        unet.load_state_dict(weights, assign=True)
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
    device = torch.device(device or best_device())
    steps: dict[str, Any] = {"steps": min(SampleOptions.steps, diffusion.timesteps)}
    return Model(
        network=unet.to(device).eval().requires_grad_(False),
        process=process,
        prediction=Prediction(diffusion.prediction),
        image_shape=shape,
        sampling=Sampling(**steps | interop.sample_options(scheduler)),
        classes=classes,
        null_class=len(classes) < labels,
        diffusion=diffusion,
        conditioning=conditioning,
        threads=threads_of(device),
        source=str(root),
    )


def _own_model(root: Path, device: str | torch.device | None, kind: type[torch.nn.Module] | None) -> Model:
    """Loads the model of a network of a user."""
    from safetensors.torch import load_file

    said = _json(root / NETWORK_JSON)
    if kind is None:
        raise ValueError(
            f"{root} has a network of its own: name its class, as in load(folder, network={said['network']})"
        )
    conditioning = _conditioning(root)
    shape, diffusion, count = tuple(said["image_shape"]), Diffusion(**_tuples(said["diffusion"])), said["num_classes"]
    network = build_adapted(
        kind,
        said["settings"],
        image_shape=shape,
        num_classes=count + said["null_class"],
        out_channels=shape[0] * (1 + diffusion.learns_variance),
        augmentation_labels=said["augmentation_labels"],
        condition_channels=conditioning.channels,
        vector_size=conditioning.vector,
    )
    tensors = {name: each for path in _weights(root) for name, each in load_file(path).items()}
    if differing := tensors.keys() ^ dict(network.named_parameters()).keys():
        raise ValueError(f"{root} cannot be loaded: {kind.__name__} and its weights differ in {min(differing)}")
    # Buffers are no weights: the class makes them.
    network.load_state_dict(tensors, strict=False)
    device = torch.device(device or best_device())
    return Model(
        network=network.to(device).eval().requires_grad_(False),
        process=make_process(diffusion),
        prediction=Prediction(diffusion.prediction, diffusion.sigma_data),
        image_shape=shape,
        sampling=Sampling(**_tuples(said["sampling"])),
        classes=_class_names(root / _NAMES, count + said["null_class"]) if count else (),
        null_class=said["null_class"],
        diffusion=diffusion,
        conditioning=conditioning,
        threads=threads_of(device),
        source=str(root),
    )


def _tuples(said: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}


def _conditioning(root: Path) -> Conditioning:
    return Conditioning(**_json(root / _CONDITION)) if (root / _CONDITION).is_file() else Conditioning()


def _network_shape(options: interop.Options, variance: str, condition_channels: int) -> tuple[int, int, int]:
    """Returns (C, H, W) of the images of a network with these arguments.

    Raises:
        ValueError: its numbers of channels do not fit a diffusion model.
    """
    channels = options["out_channels"] // (2 if variance == "learned_range" else 1)
    if options["in_channels"] - condition_channels not in (channels, 2 * channels):
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

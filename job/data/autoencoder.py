"""The autoencoder of a dataset of latents: diffusers' `AutoencoderKL`, read from JSON and safetensors alone.

BUCKET/datasets/NAME-SIZE/autoencoder/config.json
                                      diffusion_pytorch_model.safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.augment import Latents
from job.data.cache import default_cache_dir
from job.data.shards import AUTOENCODER, DatasetIndex, dataset_key
from job.exits import BadDataError, BadRequestError, how_to_install
from job.store import Store
from job.store.files import os_errors

CONFIG, WEIGHTS = AUTOENCODER
Decoder = Callable[[Tensor], Tensor]
"""Decodes normalised latents [b, C, h, w] to pixels [b, channels, H, W], about in [-1, 1]."""


def latents_of(index: DatasetIndex | None) -> Latents | None:
    """Returns the mean and deviation of a dataset's latents; None for images."""
    return Latents(index.encoding.mean, index.encoding.std) if index and index.encoding else None


def load_decoder(bucket: Store, index: DatasetIndex | None, device: torch.device) -> Decoder | None:
    """Loads the decoder of a dataset's latents, fetched once per machine; None for images.

    Raises:
        BadDataError: the autoencoder is missing, corrupt, or another kind of network.
        BadRequestError: diffusers is not installed.
    """
    if index is None or index.encoding is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    dataset, encoding = bucket.sub(dataset_key(index.name, index.size)), index.encoding
    config = dataset.read(CONFIG).data
    path = default_cache_dir() / "autoencoders" / f"{encoding.hashes[1]}.safetensors"
    if not path.exists():
        dataset.download(WEIGHTS, path)
    with os_errors(path), path.open("rb") as file:
        hashes = hashlib.sha256(config).hexdigest(), hashlib.file_digest(file, "sha256").hexdigest()
    if hashes != encoding.hashes:
        path.unlink(missing_ok=True)
        raise BadDataError(f"{dataset.uri_of(WEIGHTS)} or {CONFIG} differs from the index: restore it, or encode again")
    try:
        network = build_autoencoder(json.loads(config), load_file(path), dataset.uri_of(CONFIG))
    except (SafetensorError, ValueError) as error:
        raise BadDataError(f"{dataset.uri_of(CONFIG)} is not an autoencoder: {error}") from None
    network, latents = network.to(device).eval().requires_grad_(False), Latents(encoding.mean, encoding.std)

    def decode(x: Tensor) -> Tensor:
        pixels: Tensor = network.decode(latents.restored(x.float())).sample  # type: ignore[operator]
        return pixels

    return decode


def build_autoencoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Builds diffusers' network of this configuration, with these weights.

    Raises:
        BadDataError: another kind of network, or weights that do not fit the configuration or are not finite.
        BadRequestError: diffusers is not installed.
    """
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise BadDataError(f"{where} is a {config['_class_name']!s:.60}, and only AutoencoderKL is supported")
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise BadRequestError(f"latents need more than is installed ({error}): {how_to_install('latents')}") from None
    try:
        # A network of a forged configuration would be built for hours before its weights do not fit.
        if (layers := config.get("layers_per_block", 1)) > len(tensors):
            raise ValueError(f"layers_per_block={layers} with {len(tensors)} tensors")
        # On "meta" no memory is allocated before the weights are assigned.
        with torch.device("meta"):
            network = AutoencoderKL.from_config(dict(config))
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise BadDataError(f"{where}: its weights do not fit its configuration ({reason:.200})") from None
    if bad := [name for name, weights in network.named_parameters() if not weights.isfinite().all()]:
        raise BadDataError(f"{where}: the tensor {bad[0]} holds values that are not finite: get the file again")
    return network

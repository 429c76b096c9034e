"""The subjects of the benchmarks: images of noise, and one network that we and the peers run with equal weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ddpm import catalogue
from job.config import RunConfig, draft, parse_sets
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.shards import DatasetIndex
from job.store import open_store

DATASET = "noise"
PRESET = "cifar10"
SIZE = 32

HALF_WIDTH = ("model.channels=64", "model.dropout=0", "train.batch_size=32")
"""Ho et al.'s CIFAR-10 network at half its width, 9 million parameters: a step takes about a second on two cores."""
TINY = ("model.channels=32", "model.channel_mults=1,2", "model.dropout=0", "train.batch_size=4")
"""A network for a quick test of a benchmark."""


def run_config(sets: tuple[str, ...]) -> RunConfig:
    """Returns Ho et al.'s CIFAR-10 configuration with changes, for images of 32 × 32 × 3."""
    return draft(PRESET, {"data.size": SIZE, "data.channels": 3, **parse_sets(sets)})


def write_noise(folder: Path, images: int, size: int) -> None:
    """Fills `folder/all` with PNG files of uniform noise, uint8 [size, size, 3]: a folder in torchvision's layout."""
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(images):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "all" / f"{number:06d}.png", compress_level=1)


def pack_noise(bucket_uri: str, folder: Path, size: int, shard_images: int = (16 << 20) // 12_288) -> DatasetIndex:
    """Packs the files of `write_noise` into `bucket_uri`, as the dataset `noise`."""
    request = PackRequest(str(folder), DATASET, size=size, classes=False)
    return pack(open_store(bucket_uri), request, shard_images=shard_images)


def diffusers_twin(network: nn.Module, config: RunConfig) -> Any:
    """Returns the same network as a diffusers `UNet2DModel` at its defaults: fp32, contiguous, equal weights."""
    from diffusers import UNet2DModel

    model = config.model
    assert isinstance(model, catalogue.UNet)
    size = min(config.image_shape[1:])
    sizes = [size // 2**level for level in range(len(model.channel_mults))]
    attention = ["Attn" if size in model.attention_sizes else "" for size in sizes]
    twin: Any = UNet2DModel(
        sample_size=size,
        block_out_channels=tuple(model.channels * mult for mult in model.channel_mults),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
        layers_per_block=model.layers_per_level,
        norm_num_groups=model.norm_groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=model.dropout,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    twin.load_state_dict(network.state_dict())
    return twin


def compiled(model: nn.Module) -> None:
    """Compiles a network in place on a machine with a GPU; on a CPU that takes minutes."""
    if torch.cuda.is_available():
        model.compile()


def forget_accelerator() -> None:
    """Resets the state of `Accelerator`, so that the next one of this process can have another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

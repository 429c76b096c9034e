"""Writes the bucket that `tests/kept/test_kept.py` reads for ever: `python -m tests.kept.write`, once for each format.

It has a dataset of 24 images at 8 pixels in two classes with some held out, its latents, a run on either of two epochs
with several averages, snapshots, pictures, images of `--count` and scores.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from job.data.shards import DatasetIndex
from tests.job.command_line import ddpm, settings, succeeded

SMALL = {"model__channels": "4", "model__norm_groups": "2", "model__channel_mults": "1,1", "train__batch_size": "8"}
SMALL |= {"model__layers_per_level": "1", "checkpoint__keep_last": "1", "checkpoint__every_epochs": "1"}
SMALL |= {"ema__stds": "0.1", "ema__snapshot_epochs": "1", "log__every_images": "8"}


def write(folder: Path) -> Path:
    """Fills a bucket."""
    bucket, source, autoencoder = (folder / name for name in ("bucket", "images", "autoencoder"))
    for number in range(24):
        path = source / ("dunes", "sea")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns = np.mgrid[0:8, 0:8]
        planes = [rows * 20 + number * 3, columns * 25, (rows + columns) * 8 + 100 * (number % 2)]
        Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)).save(path)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "latent_channels": 2, "norm_num_groups": 2}
    AutoencoderKL(**blocks, **sizes).save_pretrained(autoencoder)

    def run(*words: object) -> None:
        succeeded(ddpm(*words, "--bucket", bucket))

    run("data", "pack", source, "kept", "--size", 8, "--hold-out", "20%")
    run("data", "encode", "kept", "--autoencoder", autoencoder, "--size", 8)
    for name, dataset, size in (("pixels", "kept", "4"), ("latents", "kept-latents", "2")):
        train = ("train", "--dataset", dataset, "--run", name, "--epochs", 2)
        run(*train, *settings(**SMALL, model__attention_sizes=size))
        run("sample", "--run", name, "--seeds", "0-3", "--no-nearest")
    run("sample", "--run", "pixels", "--count", 20)
    run("ema", "--run", "pixels", "--std", 0.2)
    run("evaluate", "--run", "pixels", "--count", 12, "--extractor", "mobilenet")
    # The largest part by far, which is made again where it is not there.
    shutil.rmtree(bucket / "datasets/kept-8/references")
    return bucket


if __name__ == "__main__":
    archive = Path(__file__).with_name(f"format-{DatasetIndex.model_fields['format'].default}.tar.gz")
    if archive.exists():
        sys.exit(f"{archive} is there: what was written once is to be read for ever")
    with TemporaryDirectory() as name:
        bucket = write(Path(name))
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(bucket, "bucket")
    print(f"{archive}: {archive.stat().st_size:,} bytes")

"""Other loaders of images, each used as its manual says: webdataset, torchvision, litData and SPDL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from job.processes.group import usable_cores

BATCH_SIZE_IMAGES = 128
WORKERS = usable_cores()
"""Processes or threads of each peer: one for each core, as ours has decoders; two cores were no faster with more."""
CHUNK_BYTES = "16MB"
"""Size of litData's chunks, and of our shards beside them."""


def installed(*peers: str) -> list[str]:
    """Returns those of the peers that are installed: litData and SPDL come with the extra `bench`."""
    modules = {"webdataset": "webdataset", "ImageFolder": "torchvision", "litData": "litdata", "SPDL": "spdl"}
    return [peer for peer in peers if peer in modules and find_spec(modules[peer])]


def webdataset_epoch(urls: list[str]) -> Any:
    """Reads our shards with webdataset, shuffled within 1,000 images and decoded with PIL; s3:// through boto3."""
    import webdataset
    from torch.utils.data import DataLoader
    from torchvision.transforms import PILToTensor

    # Its own way to S3 is the command line of AWS. The package has a function of the module's name.
    sys.modules["webdataset.gopen"].gopen_schemes["s3"] = _open_s3
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(1000).decode("pil")
    dataset = samples.to_tuple("png").map_tuple(PILToTensor())
    return DataLoader(dataset, BATCH_SIZE_IMAGES, num_workers=WORKERS)


def _open_s3(url: str, *_: object, **__: object) -> Any:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


def image_folder_epoch(folder: Path) -> Iterable[object]:
    """Reads the files before packing with torchvision: shuffled, decoded with PIL."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    dataset = ImageFolder(str(folder), transform=PILToTensor())
    return DataLoader(dataset, BATCH_SIZE_IMAGES, shuffle=True, num_workers=WORKERS)


def litdata_optimize(files: Path, chunks: Path) -> None:
    """Writes the files below a folder as litData's chunks, which keep the PNG, in a process of its own.

    It prints a lot, and changes how all later processes start.
    """
    words = [sys.executable, "-m", "benchmarks.peers", str(files), str(chunks)]
    subprocess.run(words, capture_output=True, check=True, cwd=Path(__file__).parents[1])


def _file(path: str) -> dict[str, bytes]:
    return {"image": Path(path).read_bytes()}


def litdata_epoch(chunks: str, cache: Path) -> Iterator[object]:
    """Reads such chunks with litData: shuffled, decoded with torchvision."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # A server without TLS is not among its settings.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset: Any = StreamingDataset(
        chunks, cache_dir=str(cache), shuffle=True, transform=_decoded, max_cache_size="25GB"
    )
    return iter(StreamingDataLoader(dataset, batch_size=BATCH_SIZE_IMAGES, num_workers=WORKERS))


def _decoded(sample: dict[str, bytes]) -> torch.Tensor:
    from torchvision.io import decode_image

    return decode_image(torch.frombuffer(bytearray(sample["image"]), dtype=torch.uint8))


def spdl_epoch(folder: Path) -> Iterator[object]:
    """Reads the files before packing with SPDL: shuffled, decoded with torchvision, as its own decoder wants FFmpeg."""
    from spdl.pipeline import PipelineBuilder
    from torchvision.io import decode_image

    paths = np.random.default_rng(0).permutation(sorted(map(str, folder.rglob("*.png")))).tolist()
    builder = PipelineBuilder().add_source(paths).pipe(decode_image, concurrency=WORKERS).aggregate(BATCH_SIZE_IMAGES)
    pipeline = builder.pipe(torch.stack).add_sink(4).build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from pipeline


if __name__ == "__main__":
    import litdata

    inputs = sorted(map(str, Path(sys.argv[1]).rglob("*.png")))
    litdata.optimize(fn=_file, inputs=inputs, output_dir=sys.argv[2], chunk_bytes=CHUNK_BYTES, num_workers=WORKERS)

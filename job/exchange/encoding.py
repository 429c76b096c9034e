"""`ddpm data encode`: a dataset of images becomes one of latents, shard by shard, by somebody else's autoencoder.

Of each image mean and log-variance are kept, so that each image number draws anew from them. A shard of latents holds
the images of the shard of the same number, in their order. What vouches for it until the index does is an entry in the
folder `packing`, written after it: the same command goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from job.data import shards
from job.data.cache import ImageCache, default_cache_dir
from job.data.images import codec_versions, encode_latents
from job.data.shard_source import ShardSource
from job.exchange.foreign import opened_autoencoder
from job.exits import BadConfigError, BadDataError, BadRequestError
from job.progress import Progress
from job.sealed import Sealed
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store, open_bucket
from job.store.files import scratch_folder

if TYPE_CHECKING:
    from torch import nn

ENCODED_IMAGES = 16
"""At a time."""


class EncodedShard(Sealed):
    """The entry of a shard: it is in the bucket whole, and this is what its latents add up to."""

    parameters_sha256: str
    shard: shards.Shard
    sums: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    """Of the means, for each channel, over images and places."""
    squares: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    """Of their squares and the variances."""


@dataclass(frozen=True)
class _Work:
    """What is encoded, with what, and where to."""

    source: shards.DatasetIndex
    images: ImageCache
    network: nn.Module
    dataset: Store
    name: str
    channels: int
    size: int
    """Height and width of the latents."""
    config: bytes
    weights_sha256: str
    stop: Stop

    @property
    def parameters_sha256(self) -> str:
        """Of all that decides the latents."""
        what = [self.source.dataset_id, hashlib.sha256(self.config).hexdigest(), self.weights_sha256]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def encode_dataset(bucket_uri: str, dataset: str, size: int | None, autoencoder: str, name: str = "") -> None:
    """Makes a dataset of latents, or goes on where an earlier attempt was interrupted, and says what it is.

    Args:
        bucket_uri: where the dataset lies, and the latents will.
        dataset: its name.
        size: of its images; none: the only one there is.
        autoencoder: a folder of diffusers, a path or a URI.
        name: of the dataset of latents; none: the dataset's own with `-latents`.

    Raises:
        MissingInputError: there is no such dataset, or nothing at `autoencoder`.
        BadDataError: what is there is damaged, or no autoencoder, or its latents are not finite.
        BadConfigError: it does not fit the images.
        BadRequestError: something else lies where the latents would.
        StoppedError: whole shards are saved, and the same command goes on.
    """
    from safetensors.torch import save

    from job.catalog import describe_dataset
    from job.data.autoencoder import CONFIG, WEIGHTS, build_autoencoder

    stop = Stop().install()
    bucket = open_bucket(bucket_uri, stop)
    source_key = shards.find_dataset(bucket, dataset, size)
    source = shards.load_index(bucket, source_key)
    name = shards.validated_dataset_name(name or f"{dataset}-latents")
    if source.encoding:
        raise BadRequestError(f"{dataset} holds latents already, of {source.encoding.source}")
    with opened_autoencoder(autoencoder, bucket.retry.elsewhere()) as (config, tensors):
        network = build_autoencoder(config, tensors, autoencoder)
        latent_size, channels = _fit(config, source, autoencoder)
        weights = save({key: tensor.float().contiguous() for key, tensor in sorted(tensors.items())})
    placed, encoded_by = _placed(network), (_json_bytes(config), hashlib.sha256(weights).hexdigest())
    parts, held_out = [(name, source_key, source)], f"{name}-held-out" if source.held_out else ""
    if held_out:
        held_key = shards.dataset_key(source.held_out, source.size)
        parts.append((held_out, held_key, shards.load_index(bucket, held_key)))
    works = []
    for part, part_key, part_source in parts:
        key = shards.dataset_key(part, latent_size)
        if bucket.exists(f"{key}/{shards.INDEX}"):
            encoding = shards.load_index(bucket, key).encoding
            encoded = (part_source.dataset_id, (hashlib.sha256(encoded_by[0]).hexdigest(), encoded_by[1]))
            # The part that is held out is whole before the rest is.
            if part != held_out or encoding is None or (encoding.source_id, encoding.hashes) != encoded:
                raise _is_there(bucket, key, "is there already")
            continue
        place = ShardSource(bucket, part_key, part_source, default_cache_dir() / part_source.dataset_id, stop=stop)
        shape = (channels, latent_size)
        works.append(_Work(part_source, ImageCache(place), placed, bucket.sub(key), part, *shape, *encoded_by, stop))
    for work in works:
        # An autoencoder that overflows is refused before anything is written.
        _moments(work, np.arange(min(ENCODED_IMAGES, work.source.images)))
        try:
            work.dataset.create(CONFIG, work.config)
            work.dataset.create(WEIGHTS, weights)
        except ObjectExistsError:
            raise _is_there(bucket, shards.dataset_key(work.name, work.size), "is being made by others") from None
    entries = [_shards(work) for work in works]
    # What is learnt says how the latents are normalised; and what is held out is there before it.
    normal = _normal(entries[0], works[0])
    for work, of_work in reversed(list(zip(works, entries, strict=True))):
        index = _index(work, of_work, normal, held_out if work.name == name else "")
        work.dataset.create(shards.INDEX, index.to_json())
        for entry in work.dataset.list(shards.PACKING):
            work.dataset.delete(entry.key)
        work.images.close()
    print(describe_dataset(shards.load_index(bucket, shards.dataset_key(name, latent_size)), bucket))


def _is_there(bucket: Store, key: str, what: str) -> BadRequestError:
    return BadRequestError(
        f"{bucket.uri}/{key} {what}: choose another name with --to, or delete it first: {shards.deleting(bucket, key)}"
    )


def _json_bytes(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _fit(config: dict[str, object], source: shards.DatasetIndex, where: str) -> tuple[int, int]:
    """Height and width of the latents, and their channels.

    Raises:
        BadConfigError: the autoencoder does not take such images.
    """
    channels, widths = config.get("in_channels", 3), config.get("block_out_channels", [64])
    assert isinstance(widths, list | tuple)
    factor = 2 ** (len(widths) - 1)
    if channels != source.channels:
        raise BadConfigError(
            f"{where} encodes {channels} channels, and the images of {source.name} have {source.channels}"
        )
    if source.size % factor or config.get("out_channels", 3) != channels:
        raise BadConfigError(f"{where} halves images {len(widths) - 1} times, and {source.size} pixels cannot be")
    return source.size // factor, int(str(config.get("latent_channels", 4)))


def _placed(network: nn.Module) -> nn.Module:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device).eval().requires_grad_(False)


def _shards(work: _Work) -> list[EncodedShard]:
    """The entries of all shards, which are made unless they are there."""
    entries: list[EncodedShard] = []
    first = 0
    with Progress(f"encoding {work.source.name}", total=work.source.images) as bar:
        for source in work.source.shards:
            key = f"{shards.PACKING}/{source.name.removesuffix('.tar')}.json"
            try:
                entry = EncodedShard.load(work.dataset, key)
            except ObjectMissingError:
                entry = _made(work, source, range(first, first + source.images), bar)
                work.dataset.create(key, entry.to_json())
            if entry.parameters_sha256 != work.parameters_sha256:
                raise BadRequestError(
                    f"{work.dataset.uri_of(key)} is of other images, or by another autoencoder: choose another name "
                    "with --to, or delete what lies there"
                )
            entries.append(entry)
            first += source.images
            bar.update(first)
    return entries


def _made(work: _Work, source: shards.Shard, numbers: range, bar: Progress) -> EncodedShard:
    """Encodes and uploads a shard."""
    with scratch_folder("encode") as folder:
        entry = _encoded(work, folder / source.name, numbers, bar)
        for path in (folder / source.name, folder / entry.shard.offsets_name):
            # Of an attempt that was killed before it could say so; rounding may differ on another machine.
            work.dataset.delete(path.name)
            work.dataset.upload(path, path.name)
    return entry


def _encoded(work: _Work, path: Path, numbers: range, bar: Progress) -> EncodedShard:
    """Writes the latents of images to a shard and its table beside it; what they add up to."""
    writer = shards.ShardWriter(path)
    sums, squares = np.zeros(work.channels), np.zeros(work.channels)
    for start in range(0, len(numbers), ENCODED_IMAGES):
        work.stop.check(f"while encoding {work.source.name}", "the same command goes on behind the last shard")
        some = np.array(numbers[start : start + ENCODED_IMAGES])
        moments = _moments(work, some)
        labels = work.images.labels(some).tolist()
        for image, one, label in zip(some.tolist(), moments, labels, strict=True):
            writer.add(f"{image:09d}", encode_latents(one), label, "npy")
        mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
        sums += mean.sum(axis=(0, 2, 3))
        squares += (mean**2 + np.exp(log_variance)).sum(axis=(0, 2, 3))
        bar.update(int(some[-1]) + 1)
    shard, offsets = writer.finish()
    (path.parent / shard.offsets_name).write_bytes(offsets)
    return EncodedShard(
        parameters_sha256=work.parameters_sha256,
        shard=shard,
        sums=tuple(sums.tolist()),
        squares=tuple(squares.tolist()),
    )


def _moments(work: _Work, numbers: np.ndarray) -> np.ndarray:
    """Returns mean and log-variance of the latents of images, float16 [n, 2 C, h, w].

    Raises:
        BadDataError: they are not finite.
    """
    import torch

    device = next(work.network.parameters()).device
    with torch.inference_mode():
        pixels = torch.from_numpy(work.images.read(numbers)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = work.network.encode(pixels).latent_dist  # type: ignore[operator]
        moments: np.ndarray = torch.cat([found.mean, found.logvar], dim=1).half().cpu().numpy()
    if (bad := numbers[~np.isfinite(moments).all(axis=(1, 2, 3))]).size:
        raise BadDataError(
            f"image {bad[0]} of {work.source.name}: its latents are not finite in half precision, so "
            "the weights of the autoencoder are damaged or too large: take another one"
        )
    return moments


def _normal(entries: list[EncodedShard], work: _Work) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, over all images, places, and what is drawn of each."""
    count = work.source.images * work.size**2
    mean = np.sum([entry.sums for entry in entries], axis=0) / count
    variance = np.sum([entry.squares for entry in entries], axis=0) / count - mean**2
    if not (np.isfinite(variance) & (variance > 0)).all():
        raise BadDataError(f"the latents of {work.source.name} have channels without a finite deviation above 0")
    return mean.tolist(), np.sqrt(variance).tolist()


def _index(
    work: _Work, entries: list[EncodedShard], normal: tuple[list[float], list[float]], held_out: str
) -> shards.DatasetIndex:
    source, (mean, std) = work.source, normal
    encoding = shards.Encoding(
        source=source.name,
        source_id=source.dataset_id,
        size=source.size,
        channels=source.channels,
        mean=tuple(mean),
        std=tuple(std),
        hashes=(hashlib.sha256(work.config).hexdigest(), work.weights_sha256),
    )
    return shards.DatasetIndex(
        name=work.name,
        size=work.size,
        channels=work.channels,
        dtype="float16",
        encoding=encoding,
        classes=source.classes,
        crop=source.crop,
        resize_filter=source.resize_filter,
        licence=source.licence,
        source=source.source,
        source_sha256=source.source_sha256,
        held_out=held_out,
        hold_out=source.hold_out,
        codecs=codec_versions(),
        shards=tuple(entry.shard for entry in entries),
    )

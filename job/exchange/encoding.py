"""`ddpm data encode`: packs a dataset of images as one of latents, by the autoencoder of a diffusers pipeline.

The latents keep mean and log-variance of each image, so that each image number draws anew from them. A shard of latents
holds the images of the shard of the same number, in their order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm.image_size import ImageSize
from job.coordination.pieces import Advance, Made, PieceRecord
from job.data import shards
from job.data.cache import ImageCache, default_cache_dir
from job.data.images import codec_versions, encode_latents
from job.data.pack_request import EncodeRequest
from job.data.publishing import Packing, check_absent, make_dataset
from job.data.shard_source import ShardSource
from job.exchange.other_programs import opened_autoencoder
from job.exits import BadConfigError, BadDataError, BadRequestError
from job.stop import Stop
from job.store import Store
from job.store.files import scratch_folder

if TYPE_CHECKING:
    from torch import nn

ENCODED_IMAGES = 16
"""Images per batch."""
_KEPT = {"classes", "crop", "resize_filter", "licence", "source", "source_sha256", "hold_out"}
"""What the index of latents has from that of the images."""


@dataclass(frozen=True)
class _Encoder:
    """The autoencoder on its device, and the shape of its latents."""

    network: nn.Module
    channels: int
    size: ImageSize
    """The size of the latents."""
    config: bytes
    weights: bytes

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 of configuration and weights."""
        return hashlib.sha256(self.config).hexdigest(), hashlib.sha256(self.weights).hexdigest()


def encode_dataset(bucket: Store, request: EncodeRequest, stop: Stop) -> shards.DatasetIndex | None:
    """Makes or resumes a dataset of latents, after that of its held-out part.

    Args:
        bucket: the bucket of the dataset and its latents.
        request: the options of the command.
        stop: checked at each batch.

    Returns:
        The index in the bucket, or None while other machines still make pieces.

    Raises:
        MissingInputError: no such dataset, or nothing at `autoencoder`.
        BadDataError: the autoencoder is damaged or of another kind, or its latents are not finite.
        BadConfigError: the autoencoder does not fit the images.
        BadRequestError: the folder of the latents holds something else.
        StoppedError: whole shards are saved, and the same command resumes.
    """
    source = shards.load_index(bucket, shards.find_dataset(bucket, request.name, request.size))
    if source.encoding:
        raise BadRequestError(f"{request.name} holds latents already, of {source.encoding.source}")
    encoder = _load_encoder(request.autoencoder, bucket, source)
    if not request.slice:
        check_absent(bucket, shards.dataset_key(request.to, encoder.size))
    parts, made = [(source, request.to)], None
    if source.held_out:
        held_out = shards.load_index(bucket, shards.dataset_key(source.held_out, source.size))
        parts.insert(0, (held_out, f"{request.to}-held-out"))
    with scratch_folder("encode") as folder:
        for index, name in parts:
            key, on_disk = shards.dataset_key(index.name, index.size), default_cache_dir() / index.dataset_id
            with closing(ImageCache(ShardSource(bucket, key, index, on_disk, stop=stop))) as images:
                made = make_dataset(bucket, _Encoding(images, name, encoder, folder, stop), request.slice, stop)
    return made


def _load_encoder(where: str, bucket: Store, source: shards.DatasetIndex) -> _Encoder:
    """Loads the autoencoder.

    Raises:
        BadConfigError: it does not fit the images.
    """
    import torch
    from safetensors.torch import save

    from job.data.autoencoder import build_autoencoder

    with opened_autoencoder(where, bucket.retry.elsewhere()) as (config, tensors):
        network = build_autoencoder(config, tensors, where)
        weights = save({key: tensor.float().contiguous() for key, tensor in sorted(tensors.items())})
    whole: Any = network.config
    halvings = len(whole.block_out_channels) - 1
    if (whole.in_channels, whole.out_channels) != (source.channels, source.channels):
        raise BadConfigError(
            f"{where} encodes {whole.in_channels} channels to decode {whole.out_channels}, and the images of "
            f"{source.name} have {source.channels}"
        )
    if any(side % 2**halvings for side in source.size.shape):
        raise BadConfigError(f"{where} halves images {halvings} times, and {source.size} pixels cannot be")
    size = ImageSize(*(side // 2**halvings for side in source.size.shape))
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    config_bytes = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return _Encoder(network, whole.latent_channels, size, config_bytes, weights)


class _Encoding(Packing):
    """Images of a dataset, encoded; a piece is a shard."""

    # Rounding may differ between machines.
    equal_bytes = False

    def __init__(self, images: ImageCache, name: str, encoder: _Encoder, folder: Path, stop: Stop) -> None:
        """Encodes the first images: an autoencoder that overflows must fail before anything is written."""
        self._images, self._name, self._encoder, self._folder, self._stop = images, name, encoder, folder, stop
        source = self._source = images.index
        self.key, self.where = shards.dataset_key(name, encoder.size), f"{source.name}-{source.size}"
        self.title, self.sizes = f"encoding {source.name}", source.shards.images.tolist()
        self._held_out = f"{name}-held-out" if source.held_out else ""
        self.held_out_key = self._held_out and shards.dataset_key(self._held_out, encoder.size)
        decisive = json.dumps([source.dataset_id, *encoder.hashes])
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()
        self._moments(np.arange(min(ENCODED_IMAGES, source.images)))

    def resume(self, records: Sequence[PieceRecord]) -> None:
        """Needs nothing; see `Packing`."""

    def made(self, number: int, advance: Advance) -> Made:
        """Writes the latents of a shard's images to a shard; its facts hold the sums for the normalisation."""
        first, last = (int(self._source.shards.images[:end].sum()) for end in (number, number + 1))
        sums, squares = np.zeros(self._encoder.channels), np.zeros(self._encoder.channels)
        writer = shards.ShardWriter(self._folder / shards.shard_name(number))
        for start in range(first, last, ENCODED_IMAGES):
            self._stop.check(f"while {self.title}", "the same command goes on behind the last shard")
            some = np.arange(start, min(start + ENCODED_IMAGES, last))
            moments = self._moments(some)
            labels = self._images.labels(some).tolist()
            for image, one, label in zip(some.tolist(), moments, labels, strict=True):
                writer.add(f"{image:09d}", encode_latents(one), label, "npy")
            mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
            sums += mean.sum(axis=(0, 2, 3))
            squares += (mean**2 + np.exp(log_variance)).sum(axis=(0, 2, 3))
            advance(len(some))
        shard, offsets = writer.finish()
        # A shard that a killed machine left, and that was rounded otherwise, must not replace this one.
        shard = shard.model_copy(update={"name": shards.shard_name(number, shard.sha256)})
        facts = {"shard": shard.model_dump(), "sums": sums.tolist(), "squares": squares.tolist()}
        return Made({shard.name: writer.path, shard.offsets_name: offsets}, facts)

    def _moments(self, numbers: np.ndarray) -> np.ndarray:
        """Returns mean and log-variance of the latents of images, float16 [n, 2 C, h, w].

        Raises:
            BadDataError: they are not finite.
        """
        import torch

        network = self._encoder.network
        device = next(network.parameters()).device
        with torch.inference_mode():
            pixels = torch.from_numpy(self._images.read(numbers)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            found = network.encode(pixels).latent_dist  # type: ignore[operator]
            moments: np.ndarray = torch.cat([found.mean, found.logvar], dim=1).half().cpu().numpy()
        if (bad := numbers[~np.isfinite(moments).all(axis=(1, 2, 3))]).size:
            raise BadDataError(
                f"image {bad[0]} of {self._source.name}: its latents are not finite in half precision, so "
                "the weights of the autoencoder are damaged or too large: take another one"
            )
        return moments

    def publish(self, dataset: Store, records: Sequence[PieceRecord]) -> None:
        """Copies the autoencoder, and creates the index; see `Packing`."""
        facts = [record.facts for record in records]
        source, encoder = self._source, self._encoder
        mean, std = self._normal(facts)
        encoding = shards.Encoding(
            source=source.name,
            source_id=source.dataset_id,
            size=source.size,
            channels=source.channels,
            mean=mean,
            std=std,
            hashes=encoder.hashes,
        )
        index = shards.DatasetIndex(
            **source.model_dump(include=_KEPT),
            name=self._name,
            size=encoder.size,
            channels=encoder.channels,
            dtype="float16",
            encoding=encoding,
            held_out=self._held_out,
            codecs=codec_versions(),
            fingerprint=self.fingerprint,
            shards=shards.Shards.of([shards.Shard.model_validate(each["shard"]) for each in facts]),
        )
        for key, content in zip(shards.AUTOENCODER, (encoder.config, encoder.weights), strict=True):
            dataset.create(key, content)
        dataset.create(shards.INDEX, index.to_json())
        named = {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
        for entry in dataset.list():
            if entry.key.startswith("shard-") and entry.key not in named:
                dataset.delete(entry.key)

    def _normal(self, facts: list[dict[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and deviation of each channel, over all images, places and draws of latents."""
        count = self._source.images * math.prod(self._encoder.size.shape)
        mean = np.sum([each["sums"] for each in facts], axis=0) / count
        variance = np.sum([each["squares"] for each in facts], axis=0) / count - mean**2
        if not (np.isfinite(variance) & (variance > 0)).all():
            raise BadDataError(f"the latents of {self._source.name} have channels without a finite deviation above 0")
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())

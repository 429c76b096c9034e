"""Datasets of latents: `ddpm data encode` packs one of images as one, and a run decodes its samples.

BUCKET/datasets/NAME-SIZE/autoencoder/config.json
                                      diffusion_pytorch_model.safetensors

The autoencoder is diffusers' `AutoencoderKL`, read from JSON and safetensors alone. The latents keep mean and
log-variance of each image, so that each image number draws anew from them. A shard of latents holds the images of the
shard of the same number, in their order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ddpm.augment import Latents, in_unit_range
from ddpm.device import best_device
from ddpm.image_size import ImageSize
from ddpm.memory import Fitting
from job.coordination.pieces import Advance, Made, PieceRecord
from job.data import shards
from job.data.codecs import codec_versions, encode_npy
from job.data.making import Packing, check_absent, make_dataset
from job.data.pack_request import EncodeRequest
from job.data.reading.cache import ImageCache
from job.exits import BadConfigError, BadDataError, BadRequestError, needs_extra
from job.stop import Stop
from job.store import Retry, Store
from job.store.files import default_cache_dir, os_errors, scratch_folder

ENCODED_IMAGES = 16
"""Images per batch."""
CONFIG, WEIGHTS = shards.AUTOENCODER
_KEPT = {
    *("classes", "crop", "resize_filter", "licence", "source", "hold_out"),
    *("vector_names", "vector_mean", "vector_std"),
}
"""The fields that the index of latents takes from that of the images."""

Decoder = Callable[[Tensor], Tensor]
"""Decodes normalised latents [b, C, h, w] to pixels [b, channels, H, W], about in [-1, 1]."""
Opened = Callable[[str, Retry], AbstractContextManager[tuple[dict[str, Any], Mapping[str, Tensor]]]]
"""Opens the autoencoder at a path or URI: its configuration and weights."""


def latents_of(index: shards.DatasetIndex | None) -> Latents | None:
    """Returns the mean and deviation of a dataset's latents; None for images."""
    return Latents(index.encoding.mean, index.encoding.std) if index and index.encoding else None


def load_decoder(bucket: Store, index: shards.DatasetIndex | None, device: torch.device) -> Decoder | None:
    """Loads the decoder of a dataset's latents, fetched once per machine; None for images.

    Raises:
        BadDataError: the autoencoder is missing, corrupt, or another kind of network.
        BadRequestError: diffusers is not installed.
    """
    if index is None or index.encoding is None:
        return None
    dataset, encoding = bucket.sub(index.key), index.encoding
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
        network = _build_autoencoder(json.loads(config), load_file(path), dataset.uri_of(CONFIG))
    except (SafetensorError, ValueError) as error:
        raise BadDataError(f"{dataset.uri_of(CONFIG)} is not an autoencoder: {error}") from None
    network, latents = network.to(device), Latents(encoding.mean, encoding.std)

    def decode(x: Tensor) -> Tensor:
        pixels: Tensor = network.decode(latents.restored(x.float())).sample  # type: ignore[operator]
        return pixels

    return decode


def _build_autoencoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Builds diffusers' network of this configuration, with these weights.

    Raises:
        BadDataError: another kind of network, or weights that do not fit the configuration or are not finite.
        BadRequestError: diffusers is not installed.
    """
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise BadDataError(f"{where} is a {config['_class_name']!s:.60}, and only AutoencoderKL is supported")
    with needs_extra("latents", "the autoencoder"):
        from diffusers import AutoencoderKL
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
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Encoder:
    """The autoencoder on its device, and the shape of its latents."""

    network: nn.Module
    channels: int
    size: ImageSize
    """The size of the latents."""
    files: tuple[bytes, bytes]
    """The content of each object of `AUTOENCODER`."""


def encode_dataset(bucket: Store, request: EncodeRequest, opened: Opened, stop: Stop) -> shards.DatasetIndex | None:
    """Makes or resumes a dataset of latents, after that of its held-out part.

    Args:
        bucket: the bucket of the dataset and its latents.
        request: the options of the command.
        opened: opens the autoencoder, `job.exchange.other_programs.opened_autoencoder`.
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
    with opened(request.autoencoder, bucket.retry.elsewhere()) as found:
        encoder = _encoder(*found, source, request.autoencoder)
    check_absent(bucket, shards.dataset_key(request.to, encoder.size), unless=request.slice)
    parts, made = [(source, request.to)], None
    if source.held_out:
        held_out = shards.load_index(bucket, shards.dataset_key(source.held_out, source.size))
        parts.insert(0, (held_out, f"{request.to}-held-out"))
    with scratch_folder("encode") as folder:
        for index, name in parts:
            with closing(ImageCache(bucket, index, stop=stop)) as images:
                made = make_dataset(bucket, _Encoding(images, name, encoder, folder, stop), request.slice, stop)
    return made


def _encoder(
    config: dict[str, Any], tensors: Mapping[str, Tensor], source: shards.DatasetIndex, where: str
) -> _Encoder:
    """Returns the autoencoder for the images of a dataset.

    Raises:
        BadConfigError: it does not fit them.
    """
    network = _build_autoencoder(config, tensors, where).to(best_device())
    whole: Any = network.config
    halvings = len(whole.block_out_channels) - 1
    if (whole.in_channels, whole.out_channels) != (source.channels, source.channels):
        raise BadConfigError(
            f"{where} encodes {whole.in_channels} channels to decode {whole.out_channels}, and the images of "
            f"{source.name} have {source.channels}"
        )
    if any(side % 2**halvings for side in source.size.shape):
        raise BadConfigError(f"{where} halves images {halvings} times, and {source.size} pixels cannot be")
    if source.condition_channels:
        raise BadConfigError(f"{source.name} has conditions in pixels, which latents do not take: pack it without them")
    if source.bits != 8:
        raise BadConfigError(f"{source.name} has {source.bits} bits, and autoencoders know 8: pack it with --bits 8")
    size = ImageSize(*(side // 2**halvings for side in source.size.shape))
    weights = save({key: tensor.float().contiguous() for key, tensor in sorted(tensors.items())})
    files = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), weights
    return _Encoder(network, whole.latent_channels, size, files)


class _Encoding(Packing):
    """Images of a dataset, encoded; a piece is a shard."""

    # Rounding may differ between machines.
    equal_bytes = False

    def __init__(self, images: ImageCache, name: str, encoder: _Encoder, folder: Path, stop: Stop) -> None:
        """Encodes the first images: an autoencoder that overflows must fail before anything is written."""
        self._images, self._name, self._encoder, self._folder, self._stop = images, name, encoder, folder, stop
        self._fitting = Fitting()
        source = self._source = images.index
        self.key, self.where = shards.dataset_key(name, encoder.size), f"{source.name}-{source.size}"
        self.title, self.sizes = f"encoding {source.name}", source.shards.images.tolist()
        self._held_out = f"{name}-held-out" if source.held_out else ""
        self.held_out_key = self._held_out and shards.dataset_key(self._held_out, encoder.size)
        config, weights = (hashlib.sha256(content).hexdigest() for content in encoder.files)
        self._hashes = config, weights
        self.fingerprint = hashlib.sha256(json.dumps([source.dataset_id, config, weights]).encode()).hexdigest()
        self._fitting.in_parts(self._moments, np.arange(min(ENCODED_IMAGES, source.images)))

    def made(self, number: int, advance: Advance) -> Made:
        """Writes the latents of a shard's images to a shard; its facts hold the sums for the normalisation."""
        first, last = self._images.starts[number : number + 2].tolist()
        sums, squares = np.zeros(self._encoder.channels), np.zeros(self._encoder.channels)
        writer = shards.ShardWriter(self._folder / shards.shard_name(number))
        for start in range(first, last, ENCODED_IMAGES):
            self._stop.check(f"while {self.title}", "the same command goes on behind the last shard")
            some = np.arange(start, min(start + ENCODED_IMAGES, last))
            moments = np.concatenate(self._fitting.in_parts(self._moments, some))
            labels, vectors = self._images.labels(some).tolist(), self._images.numbers(some).tolist()
            for image, one, label, vector in zip(some.tolist(), moments, labels, vectors, strict=True):
                numbers = dict(zip(self._source.vector_names, vector, strict=True))
                writer.add(f"{image:09d}", encode_npy(one), label, "npy", numbers)
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
        network = self._encoder.network
        device = next(network.parameters()).device
        with torch.inference_mode():
            pixels = in_unit_range(torch.from_numpy(self._images.read(numbers)).to(device).permute(0, 3, 1, 2))
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
        # Mean and variance of each channel, over all images, places and draws of latents.
        count = source.images * math.prod(encoder.size.shape)
        mean = np.sum([each["sums"] for each in facts], axis=0) / count
        variance = np.sum([each["squares"] for each in facts], axis=0) / count - mean**2
        if not (np.isfinite(variance) & (variance > 0)).all():
            raise BadDataError(f"the latents of {source.name} have channels without a finite deviation above 0")
        encoding = shards.Encoding(
            source=source.name,
            source_id=source.dataset_id,
            size=source.size,
            channels=source.channels,
            mean=tuple(mean.tolist()),
            std=tuple(np.sqrt(variance).tolist()),
            hashes=self._hashes,
        )
        index = shards.DatasetIndex(
            **source.model_dump(include=_KEPT),
            name=self._name,
            size=encoder.size,
            channels=encoder.channels,
            encoding=encoding,
            held_out=self._held_out,
            codecs=codec_versions(),
            fingerprint=self.fingerprint,
            shards=shards.Shards.of([shards.Shard.model_validate(each["shard"]) for each in facts]),
        )
        for key, content in zip(shards.AUTOENCODER, encoder.files, strict=True):
            dataset.create(key, content)
        dataset.create(shards.INDEX, index.to_json())
        named = {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
        for entry in dataset.list():
            if entry.key.startswith("shard-") and entry.key not in named:
                dataset.delete(entry.key)

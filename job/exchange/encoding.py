"""`ddpm data encode`: turns a dataset of images into one of latents, by the autoencoder of a diffusers pipeline.

The latents keep mean and log-variance of each image, so that each image number draws anew from them. A shard of latents
holds the images of the shard of the same number, in their order; each is a piece of work (`job.pieces`).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm.image_size import ImageSize
from job.data import shards
from job.data.cache import ImageCache, default_cache_dir
from job.data.images import codec_versions, encode_latents
from job.data.pack_request import EncodeRequest
from job.data.shard_source import ShardSource
from job.data.shards import AUTOENCODER
from job.exchange.other_programs import opened_autoencoder
from job.exits import BadConfigError, BadDataError, BadRequestError
from job.pieces import Advance, Made, OtherWorkError, Pieces, Slice
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store
from job.store.files import scratch_folder

if TYPE_CHECKING:
    from torch import nn

ENCODED_IMAGES = 16
"""Images per batch."""


@dataclass(frozen=True)
class _Part:
    """A dataset of images to encode, and the folder of its latents."""

    source: shards.DatasetIndex
    images: ImageCache
    name: str
    bucket: Store
    key: str

    @property
    def dataset(self) -> Store:
        """The folder of the latents."""
        return self.bucket.sub(self.key)


@dataclass(frozen=True)
class _Encoder:
    """The autoencoder on its device, and the shape of its latents."""

    network: nn.Module
    channels: int
    size: ImageSize
    """The size of the latents."""
    config: bytes
    weights: bytes
    stop: Stop

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 of configuration and weights."""
        return hashlib.sha256(self.config).hexdigest(), hashlib.sha256(self.weights).hexdigest()

    def fingerprint(self, source: shards.DatasetIndex) -> str:
        """Returns the SHA-256 of everything that decides the latents of a dataset."""
        return hashlib.sha256(json.dumps([source.dataset_id, *self.hashes]).encode()).hexdigest()


def encode_dataset(bucket: Store, request: EncodeRequest, stop: Stop) -> shards.DatasetIndex | None:
    """Makes or resumes a dataset of latents.

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
    source_key = shards.find_dataset(bucket, request.name, request.size)
    source = shards.load_index(bucket, source_key)
    if source.encoding:
        raise BadRequestError(f"{request.name} holds latents already, of {source.encoding.source}")
    encoder = _load_encoder(request.autoencoder, bucket, source, stop)
    parts = [_part(bucket, source, request.to, encoder)]
    if source.held_out:
        held_source = shards.load_index(bucket, shards.dataset_key(source.held_out, source.size))
        parts.insert(0, _part(bucket, held_source, f"{request.to}-held-out", encoder))
    # A run on the latents looks for the held-out part, so that part is finished first.
    todo = [part for part in parts if not _is_made(part, encoder)]
    if parts[-1] not in todo:
        if not request.slice:
            raise _is_there(parts[-1], "is there already")
        todo = []
    for part in todo:
        # An autoencoder that overflows must fail before anything is written.
        _moments(encoder, part, np.arange(min(ENCODED_IMAGES, part.source.images)))
        try:
            part.dataset.create(AUTOENCODER[0], encoder.config)
            part.dataset.create(AUTOENCODER[1], encoder.weights)
        except ObjectExistsError:
            raise _is_there(part, "is being made by others") from None
    made = [_pieces(part, encoder, request.slice) for part in todo]
    try:
        for part, pieces in zip(todo, made, strict=True):
            title = f"encoding {part.source.name}"
            pieces.make_missing(partial(_encoded, part, encoder), title, stop=stop)
    except OtherWorkError as error:
        raise BadRequestError(f"{error}: it is of other images, or by another autoencoder") from None
    if any(pieces.missing() for pieces in made):
        return None
    _publish(todo, made, encoder, f"{request.to}-held-out" if source.held_out else "")
    return shards.load_index(bucket, parts[-1].key)


def _load_encoder(where: str, bucket: Store, source: shards.DatasetIndex, stop: Stop) -> _Encoder:
    import torch
    from safetensors.torch import save

    from job.data.autoencoder import build_autoencoder

    with opened_autoencoder(where, bucket.retry.elsewhere()) as (config, tensors):
        network = build_autoencoder(config, tensors, where)
        size, channels = _fit(config, source, where)
        weights = save({key: tensor.float().contiguous() for key, tensor in sorted(tensors.items())})
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    config_bytes = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return _Encoder(network, channels, size, config_bytes, weights=weights, stop=stop)


def _part(bucket: Store, source: shards.DatasetIndex, name: str, encoder: _Encoder) -> _Part:
    key = shards.dataset_key(source.name, source.size)
    place = ShardSource(bucket, key, source, default_cache_dir() / source.dataset_id, stop=encoder.stop)
    return _Part(source, ImageCache(place), name, bucket, shards.dataset_key(name, encoder.size))


def _is_made(part: _Part, encoder: _Encoder) -> bool:
    """Returns whether the latents of a part are finished.

    Raises:
        BadRequestError: the folder holds other latents.
    """
    if not part.dataset.exists(shards.INDEX):
        return False
    encoding = shards.load_index(part.bucket, part.key).encoding
    if encoding is None or (encoding.source_id, encoding.hashes) != (part.source.dataset_id, encoder.hashes):
        raise _is_there(part, "is there already")
    return True


def _pieces(part: _Part, encoder: _Encoder, slice_text: str) -> Pieces:
    """Returns the pieces: a shard of latents for each shard of images."""
    sizes = part.source.shards.images.tolist()
    share = Slice.parse(slice_text)
    return Pieces(part.dataset, encoder.fingerprint(part.source), sizes, share=share, result=shards.INDEX)


def _is_there(part: _Part, what: str) -> BadRequestError:
    delete = shards.deleting(part.bucket, part.key)
    return BadRequestError(f"{part.dataset.uri} {what}: choose another name with --to, or delete it first: {delete}")


def _fit(config: dict[str, object], source: shards.DatasetIndex, where: str) -> tuple[ImageSize, int]:
    """Returns the size of the latents, and their channels.

    Raises:
        BadConfigError: the autoencoder does not fit the images.
    """
    channels, widths = config.get("in_channels", 3), config.get("block_out_channels", [64])
    assert isinstance(widths, list | tuple)
    factor = 2 ** (len(widths) - 1)
    if channels != source.channels:
        raise BadConfigError(
            f"{where} encodes {channels} channels, and the images of {source.name} have {source.channels}"
        )
    if any(side % factor for side in source.size.shape) or config.get("out_channels", 3) != channels:
        raise BadConfigError(f"{where} halves images {len(widths) - 1} times, and {source.size} pixels cannot be")
    return ImageSize(*(side // factor for side in source.size.shape)), int(str(config.get("latent_channels", 4)))


def _encoded(part: _Part, encoder: _Encoder, number: int, advance: Advance) -> Made:
    """Writes the latents of a shard's images to a shard; its facts hold the sums for the normalisation."""
    first, last = (int(part.source.shards.images[:stop].sum()) for stop in (number, number + 1))
    numbers = range(first, last)
    sums, squares = np.zeros(encoder.channels), np.zeros(encoder.channels)
    with scratch_folder("encode") as folder:
        writer = shards.ShardWriter(folder / shards.shard_name(number))
        for start in range(0, len(numbers), ENCODED_IMAGES):
            encoder.stop.check(f"while encoding {part.source.name}", "the same command goes on behind the last shard")
            some = np.array(numbers[start : start + ENCODED_IMAGES])
            moments = _moments(encoder, part, some)
            labels = part.images.labels(some).tolist()
            for image, one, label in zip(some.tolist(), moments, labels, strict=True):
                writer.add(f"{image:09d}", encode_latents(one), label, "npy")
            mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
            sums += mean.sum(axis=(0, 2, 3))
            squares += (mean**2 + np.exp(log_variance)).sum(axis=(0, 2, 3))
            advance(len(some))
        shard, offsets = writer.finish()
        # Rounding may differ between machines: a shard that a killed machine left must not replace this one.
        shard = shard.model_copy(update={"name": shards.shard_name(number, shard.sha256)})
        files = {shard.name: writer.path.read_bytes(), shard.offsets_name: offsets}
    return Made(files, {"shard": shard.model_dump(), "sums": sums.tolist(), "squares": squares.tolist()})


def _moments(encoder: _Encoder, part: _Part, numbers: np.ndarray) -> np.ndarray:
    """Returns mean and log-variance of the latents of images, float16 [n, 2 C, h, w].

    Raises:
        BadDataError: they are not finite.
    """
    import torch

    device = next(encoder.network.parameters()).device
    with torch.inference_mode():
        pixels = torch.from_numpy(part.images.read(numbers)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = encoder.network.encode(pixels).latent_dist  # type: ignore[operator]
        moments: np.ndarray = torch.cat([found.mean, found.logvar], dim=1).half().cpu().numpy()
    if (bad := numbers[~np.isfinite(moments).all(axis=(1, 2, 3))]).size:
        raise BadDataError(
            f"image {bad[0]} of {part.source.name}: its latents are not finite in half precision, so "
            "the weights of the autoencoder are damaged or too large: take another one"
        )
    return moments


def _publish(parts: list[_Part], made: list[Pieces], encoder: _Encoder, held_out: str) -> None:
    """Creates the indices, that of the held-out part first; the training images decide the normalisation of both."""
    try:
        facts = [[record.facts for record in pieces.whole_records(encoder.stop)] for pieces in made]
    except ObjectMissingError:
        if parts and all(part.dataset.exists(shards.INDEX) for part in parts):
            # An equal attempt that was faster has deleted the records.
            return
        raise
    for part, pieces, of_part in zip(parts, made, facts, strict=True):
        mean, std = _normal(facts[-1], parts[-1], encoder)
        index = _index(part, encoder, of_part, mean=mean, std=std, held_out=held_out if part is parts[-1] else "")
        part.dataset.create(shards.INDEX, index.to_json())
        pieces.clear()
        named = {name for shard in index.shards for name in (shard.name, shard.offsets_name)}
        for entry in part.dataset.list():
            if entry.key.startswith("shard-") and entry.key not in named:
                part.dataset.delete(entry.key)
        part.images.close()


def _normal(facts: list[dict[str, Any]], part: _Part, encoder: _Encoder) -> tuple[list[float], list[float]]:
    """Returns mean and deviation of each channel, over all images, places and draws of latents."""
    count = part.source.images * math.prod(encoder.size.shape)
    mean = np.sum([each["sums"] for each in facts], axis=0) / count
    variance = np.sum([each["squares"] for each in facts], axis=0) / count - mean**2
    if not (np.isfinite(variance) & (variance > 0)).all():
        raise BadDataError(f"the latents of {part.source.name} have channels without a finite deviation above 0")
    return mean.tolist(), np.sqrt(variance).tolist()


def _index(
    part: _Part, encoder: _Encoder, facts: list[dict[str, Any]], *, mean: list[float], std: list[float], held_out: str
) -> shards.DatasetIndex:
    source = part.source
    encoding = shards.Encoding(
        source=source.name,
        source_id=source.dataset_id,
        size=source.size,
        channels=source.channels,
        mean=tuple(mean),
        std=tuple(std),
        hashes=encoder.hashes,
    )
    return shards.DatasetIndex(
        name=part.name,
        size=encoder.size,
        channels=encoder.channels,
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
        shards=shards.Shards.of([shards.Shard.model_validate(each["shard"]) for each in facts]),
    )

"""The dataset format: tar shards that webdataset can read, one small offset table per shard, and an index.

    BUCKET/datasets/NAME-SIZE/index.json            written last, once: the dataset exists when the index does
                              shard-00000.tar       key.png (key.npy of latents and of other than 1 or 3 channels)
                                                    and, if there are any, key.cond.png, key.cls and key.json
                              shard-00000.offsets   a record of `offsets_dtype` per image
                              rejects.jsonl         the images that were left out, if any
                              preview.png           some images, by class: for people

The index stays small for any number of images, because the offset tables hold all data per image. Tars can also be
indexed in place: then the index names their URIs, and their images are prepared at each read.

Hashes lead from the index to every image: it holds its own, and those of all other objects; the tables hold one per
image. So an image that is read by range is verified like a whole shard, without reading the longer block that a hash
of a block would require. A checksum such as CRC-32C would not show a change on purpose.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, model_validator

from ddpm.image_size import TEXT, ImageSize
from job.config import Size
from job.coordination.sealed import SHA256_PATTERN, RecordPart, Sealed
from job.exits import BadDataError, BadRequestError, MissingInputError
from job.progress import some_of
from job.store import READ_BYTES, ObjectMissingError, Store

DATASETS = "datasets"
INDEX = "index.json"
REJECTS = "rejects.jsonl"
PREVIEW = "preview.png"
AUTOENCODER = "autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"
"""The objects of the autoencoder of latents."""
REFERENCES = "references"
"""Folder of the features that evaluations compute of the images."""
SHARD_PIXEL_BYTES = 96 << 20
"""Pixels of the images of a shard, which make about 64 MB of PNG."""
OFFSETS_DTYPE = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("label", "<i4"), ("sha256", "V16")])
"""The place of an image's encoded bytes in its tar, its class (-1 without classes), and `image_hash` of the bytes."""
Record = tuple[Any, ...]
"""A row of an offset table; see `offsets_dtype`."""
SHARDS_DTYPE = np.dtype(
    [("number", "<u4"), ("images", "<u4"), ("bytes", "<u8"), ("sha256", "V32"), ("offsets_sha256", "V32")]
)
"""A row of the index's table of shards: see `Shard`."""

_DATASET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_TAR_URI = re.compile(r"(/|(?!file:|http:|ftp:)[a-z][a-z0-9+.-]*://)[^\x00-\x1f\x7f]*[^\x00-\x1f\x7f/]")


def offsets_dtype(numbers: int, has_condition: bool) -> np.dtype[Any]:
    """Returns OFFSETS_DTYPE, with the size of the condition, and a vector of k numbers as float32, if there are any.

    The condition is the next file of the tar behind the image; the hash is over both.
    """
    condition: list[Any] = [("condition_bytes", "<u4")] if has_condition else []
    vector: list[Any] = [("vector", "<f4", (numbers,))] if numbers else []
    return np.dtype([*OFFSETS_DTYPE.descr, *condition, *vector])


def image_hash(encoded: bytes) -> bytes:
    """Returns the first 16 bytes of the SHA-256 of an image's file; a forged image would take 2^128 attempts."""
    return hashlib.sha256(encoded).digest()[:16]


def is_tar_uri(uri: str) -> bool:
    """Returns whether an index may name this URI: an absolute one whose content cannot be changed in transit."""
    return _TAR_URI.fullmatch(uri) is not None


def _of_a_tar(uri: str) -> str:
    if uri and not is_tar_uri(uri):
        raise ValueError("an index may not name this URI")
    return uri


class Shard(RecordPart):
    """One tar file of the dataset."""

    name: str = Field(pattern=r"^shard-\d{5,9}(-[0-9a-f]{8})?\.tar$")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    images: int = Field(gt=0)
    offsets_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    uri: Annotated[str, AfterValidator(_of_a_tar)] = ""
    """URI of a tar that is indexed in place; empty for one beside its table, under `name`."""

    @property
    def number(self) -> int:
        """Returns the number in the shard's name."""
        return int(self.name.removesuffix(".tar").split("-")[1])

    @property
    def offsets_name(self) -> str:
        """Returns the key of the shard's offset table."""
        return self.name.removesuffix(".tar") + ".offsets"


class Shards(RecordPart):
    """The shards of a dataset in one table: a hundred thousand records in JSON would take seconds to read."""

    table: str
    """Rows of SHARDS_DTYPE, in hexadecimal digits."""
    named_by_hash: bool = False
    """Whether the names of the tars end with the beginning of their hash."""
    uris: tuple[Annotated[str, AfterValidator(_of_a_tar)], ...] = ()
    """URIs of tars that are indexed in place, of all or none."""

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Self:
        """Returns the table of these shards."""
        rows = [
            (shard.number, shard.images, shard.bytes, *map(bytes.fromhex, (shard.sha256, shard.offsets_sha256)))
            for shard in shards
        ]
        uris, by_hash = tuple(shard.uri for shard in shards), shards[0].name.count("-") == 2
        table = np.array(rows, SHARDS_DTYPE).tobytes().hex()
        return cls(table=table, named_by_hash=by_hash, uris=uris if any(uris) else ())

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        # An image takes a header and a block of its tar. Readers make room for a table before they read it.
        most = np.minimum(self.bytes // (2 * tarfile.BLOCKSIZE), READ_BYTES // OFFSETS_DTYPE.itemsize)
        if not len(self) or not self.images.all() or (self.images > most).any() or self.bytes.max() >= 1 << 44:
            raise ValueError("the table of shards has impossible sizes")
        numbers = self._rows["number"]
        if numbers.max() >= 10**9 or len(np.unique(numbers)) < len(self):
            raise ValueError("the table of shards has impossible numbers")
        if self.uris and (len(self.uris) != len(self) or not all(self.uris)):
            raise ValueError("some shards lack a URI")
        return self

    @cached_property
    def _rows(self) -> npt.NDArray[np.void]:
        return np.frombuffer(bytes.fromhex(self.table), SHARDS_DTYPE)

    @cached_property
    def images(self) -> npt.NDArray[np.int64]:
        """Returns the images of each shard, int64 [n]."""
        return self._rows["images"].astype(np.int64)

    @cached_property
    def bytes(self) -> npt.NDArray[np.int64]:
        """Returns the size of each tar, int64 [n]."""
        return self._rows["bytes"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Shard:
        row = self._rows[number]
        sha256 = row["sha256"].tobytes().hex()
        return Shard(
            name=shard_name(int(row["number"]), sha256 if self.named_by_hash else ""),
            bytes=int(row["bytes"]),
            sha256=sha256,
            images=int(row["images"]),
            offsets_sha256=row["offsets_sha256"].tobytes().hex(),
            uri=self.uris[number] if self.uris else "",
        )

    def __iter__(self) -> Iterator[Shard]:  # type: ignore[override]
        return map(self.__getitem__, range(len(self)))


class Digests:
    """Size and SHA-256 of a stream."""

    def __init__(self) -> None:
        self.size_bytes, self._sha256 = 0, hashlib.sha256()

    def update(self, data: bytes) -> None:
        """Adds the next bytes."""
        self.size_bytes += len(data)
        self._sha256.update(data)

    def shard(
        self, name: str, records: Sequence[Record], uri: str = "", dtype: np.dtype[Any] = OFFSETS_DTYPE
    ) -> tuple[Shard, bytes]:
        """Returns the index's record of the tar that was streamed, and the table of its images."""
        offsets = np.array(records, dtype).tobytes()
        shard = Shard(
            name=name,
            bytes=self.size_bytes,
            sha256=self._sha256.hexdigest(),
            images=len(records),
            offsets_sha256=hashlib.sha256(offsets).hexdigest(),
            uri=uri,
        )
        return shard, offsets


class ShardWriter:
    """Writes a shard to a local file. Equal images give equal bytes: the headers hold no times and no users."""

    def __init__(self, path: Path) -> None:
        """Opens the file, whose name is the shard's."""
        self.path = path
        self.digests = Digests()
        """Size and hash of the bytes written so far."""
        self._file = path.open("wb")
        self._records: list[Record] = []
        self._dtype = OFFSETS_DTYPE

    def add(
        self,
        key: str,
        encoded: bytes,
        label: int,
        kind: str = "png",
        numbers: Mapping[str, float] | None = None,
        condition: tuple[str, bytes] | None = None,
    ) -> None:
        """Appends `key.png`, or another kind, `key.cls` for a label of 0 or more, and `key.json` for a vector.

        The kind and content of a condition become `key.cond.png`.
        """
        place, files = self.digests.size_bytes + tarfile.BLOCKSIZE, {f"{key}.{kind}": encoded}
        record: Record = place, len(encoded), label, image_hash(encoded + (condition[1] if condition else b""))
        if condition:
            files[f"{key}.cond.{condition[0]}"] = condition[1]
            record = *record, len(condition[1])
        files |= {f"{key}.cls": str(label).encode()} if label >= 0 else {}
        files |= {f"{key}.json": json.dumps(dict(numbers)).encode()} if numbers else {}
        self._records.append((*record, tuple(numbers.values())) if numbers else record)
        self._dtype = offsets_dtype(len(numbers or ()), condition is not None)
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            self._write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))

    def finish(self) -> tuple[Shard, bytes]:
        """Closes the file, and returns its record and its offset table."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.close()
        return self.digests.shard(self.path.name, self._records, dtype=self._dtype)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digests.update(data)


class Encoding(RecordPart):
    """The origin of a dataset of latents: its images, the autoencoder, and the statistics of the latents."""

    source: str
    """Name of the dataset of images; the latents have the same order and shards."""
    source_id: str = Field(pattern=SHA256_PATTERN)
    size: Size
    """The size of the images, in pixels."""
    channels: int = Field(ge=1, le=3)
    """Channels of the images."""
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    """Mean of each channel of the latents, over all images and samples of their distributions."""
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    hashes: tuple[str, str]
    """SHA-256 of each object of `AUTOENCODER`."""


class DatasetIndex(Sealed):
    """The contents and the origin of a dataset, with crop and filter: they change an FID more than most methods do."""

    format: int = Field(default=3, ge=3, le=3)
    name: str
    size: Size = Field(description="in pixels, or of latents")
    channels: int = Field(ge=1, le=256, description="that a network sees")
    condition_channels: int = Field(default=0, ge=0, le=16, description="of the condition image of each image")
    condition_from: str = Field(default="", description="base name of the source of condition images")
    condition_filter: str = Field(default="", description="like `resize_filter`, of condition images")
    condition_range: str = Field(default="", description="LOW,HIGH of condition images, as `pixel_range` of images")
    vector_names: tuple[str, ...] = Field(default=(), description="of the numbers of each image")
    vector_mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    vector_std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    encoding: Encoding | None = Field(default=None, description="of latents: mean and log-variance as float16")
    classes: tuple[str, ...] = ()
    classes_from: Literal["", "labels", "folders"] = Field(default="", description="what named the classes")
    splits: tuple[str, ...] = Field(default=(), description="of the source, if several became this dataset")
    crop: str
    resize_filter: str
    bits: Literal[8, 16] = Field(default=8, description="of a value of images")
    pixel_range: str = Field(default="", description="LOW,HIGH: black and white in integers of more than 8 bits")
    licence: str = ""
    source: str = Field(description="base name of what was packed")
    listing_sha256: str = Field(default="", description="over names, sizes, labels, vectors of the source, if copied")
    held_out: str = Field(default="", description="name of the dataset of the images that were held out")
    hold_out: float = Field(default=0.0, ge=0, le=1, description="the share of the source that was held out")
    rejected_images: int = Field(default=0, ge=0)
    unlabelled_images: int = Field(default=0, ge=0, description="left out, because all others have a label")
    converted: dict[str, int] = Field(
        default={}, description="images by what they had: grey, colour, CMYK, transparent"
    )
    rejects_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$", description="of rejects.jsonl, if any")
    skipped: dict[str, int] = Field(default={}, description="files that were left out, by suffix or as hidden images")
    codecs: str = Field(default="", description="versions of what decoded the images")
    fingerprint: str = Field(default="", description="SHA-256 of all that decides the shards, of packed datasets")
    shards: Shards

    @property
    def key(self) -> str:
        """Returns the dataset's folder in its bucket; see `dataset_key`."""
        return dataset_key(self.name, self.size)

    @property
    def is_conditioned(self) -> bool:
        """Returns whether each image has a condition image or numbers."""
        return bool(self.condition_channels or self.vector_names)

    @property
    def is_foreign(self) -> bool:
        """Returns whether the tars are indexed in place, so that `crop` and `resize_filter` apply at each read."""
        return bool(self.shards.uris)

    @property
    def images(self) -> int:
        """Returns the number of images."""
        return int(self.shards.images.sum())

    @property
    def dtype(self) -> np.dtype[Any]:
        """Returns the type of a value of `image_shape`: uint8 or uint16; of latents float16."""
        return np.dtype("<f2" if self.encoding else "<u2" if self.bits == 16 else "u1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Returns height, width and channels of a decoded image; latents have two moments per channel."""
        return *self.size.shape, self.channels * (2 if self.encoding else 1)

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Returns the shape of a decoded image in bytes, with the channels of its condition behind its own."""
        return *self.size.shape, (self.image_shape[2] + self.condition_channels) * self.dtype.itemsize

    @property
    def decoded_bytes(self) -> int:
        """Returns the size of all decoded images."""
        return self.images * math.prod(self.row_shape)

    @property
    def levels(self) -> tuple[int, int]:
        """Returns the values in the source that are black and white, which images of 16 bits get back."""
        low, _, high = self.pixel_range.partition(",")
        return (int(low), int(high)) if self.bits == 16 else (0, 255)

    def how_shown(self, channels: Sequence[int] = ()) -> str:
        """Returns the window in which 8 bits show 16, and the channels that are shown, if others than one or three."""
        words = ["{:,} to {:,} as black to white".format(*self.levels)] if self.bits == 16 else []
        if channels or (self.channels not in (1, 3) and not self.encoding):
            named = channels or range(1, 4 if self.channels > 2 else 2)
            words.append(f"channel{'s' * (len(named) > 1)} {' '.join(map(str, named))}")
        return ", ".join(words)

    def remarks(self, *, with_classes: bool) -> list[str]:
        """Returns what a person has to know before a run learns from it, of its classes if the run learns them."""
        said = []
        if with_classes and self.classes_from == "folders":
            said.append(
                f"learning {len(self.classes):,} folders of {self.name} as classes: {some_of(self.classes)}; if they "
                "are not classes, start another run with --set model.num_classes=0"
            )
        if self.splits:
            said.append(f"learning {' and '.join(self.splits)} of {self.name} together, which were packed together")
        return said

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> DatasetIndex:
        if not self.encoding and self.channels > 16:
            raise ValueError("images have 1 to 16 channels")
        if self.bits == 16 and not re.fullmatch(r"-?\d{1,10},-?\d{1,10}", self.pixel_range):
            raise ValueError("images of 16 bits have a range")
        if not len(self.vector_names) == len(self.vector_mean) == len(self.vector_std):
            raise ValueError("each number of a vector has a name, a mean and a deviation")
        if self.encoding and {len(self.encoding.mean), len(self.encoding.std)} != {self.channels}:
            raise ValueError("latents have a mean and a deviation for each channel")
        return self

    @property
    def dataset_id(self) -> str:
        """Returns a SHA-256 over everything that a reader sees: equal ids mean equal images in equal order."""
        content = self.model_dump(include={"format", "size", "channels", "classes", "shards"})
        if self.encoding:
            content |= {"encoding": self.encoding.model_dump(exclude={"source"})}
        del content["shards"]["uris"]
        if self.is_foreign:
            content |= {"crop": self.crop, "resize_filter": self.resize_filter}
        if self.pixel_range:
            content |= {"pixel_range": self.pixel_range}
        if self.bits != 8:
            content |= {"bits": self.bits}
        if self.condition_channels:
            content |= {"condition_channels": self.condition_channels}
        if self.vector_names:
            content |= self.model_dump(include={"vector_names", "vector_mean", "vector_std"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_name(number: int, sha256: str = "") -> str:
    """Returns the key of a shard below its dataset, with the beginning of its hash if that is given."""
    return f"shard-{number:05d}{f'-{sha256[:8]}' if sha256 else ''}.tar"


def dataset_key(name: str, size: ImageSize) -> str:
    """Returns the folder of a dataset below the bucket, such as `datasets/celeba-64` or `datasets/celeba-96x64`."""
    return f"{DATASETS}/{validated_dataset_name(name)}-{size}"


def validated_dataset_name(name: str) -> str:
    """Returns `name` if it can be part of a key, a label and an argument.

    Raises:
        BadRequestError: it is not valid.
    """
    if not _DATASET_NAME.fullmatch(name):
        wanted = "use up to 63 lower-case letters, digits, inner '.', '_' and '-'"
        raise BadRequestError(f"{name!r} cannot be a dataset's name: {wanted}")
    return name


def load_index(bucket: Store, key: str) -> DatasetIndex:
    """Reads the index of the dataset at `key` (`datasets/NAME-SIZE`) and checks it against its own hash and place.

    Raises:
        MissingInputError: the dataset does not exist.
        BadDataError: the index is corrupt, or another dataset's.
    """
    where = f"{key}/{INDEX}"
    try:
        index = DatasetIndex.load(bucket, where)
        if (place := f"{DATASETS}/{index.name}-{index.size}") != key:
            raise BadDataError(f"{bucket.uri_of(where)} belongs to {place}")
    except ObjectMissingError:
        raise MissingInputError(f"no dataset at {bucket.uri}/{key}: pack it with `ddpm data pack`") from None
    except BadDataError as error:
        raise BadDataError(f"{error}: restore it, or {deleting(bucket, key)} and pack it again") from None
    return index


def delete(dataset: Store) -> tuple[int, int]:
    """Deletes a dataset, and returns its objects and bytes. The rest after the index never passes for a dataset."""
    entries = list(dataset.list())
    dataset.delete(INDEX)
    for entry in entries:
        dataset.delete(entry.key)
    return len(entries), sum(entry.size_bytes for entry in entries)


def deleting(bucket: Store, key: str) -> str:
    """Returns the command that deletes a dataset, for messages."""
    name, _, size = key.removeprefix(f"{DATASETS}/").rpartition("-")
    return f"`ddpm data delete {name} --size {size} --bucket {shlex.quote(bucket.uri)}`"


class NoDatasetError(MissingInputError):
    """A bucket has no dataset of a name; `size` is the wanted one, None for any."""

    def __init__(self, message: str, size: ImageSize | None) -> None:
        super().__init__(message)
        self.size = size


def find_dataset(bucket: Store, name: str, size: ImageSize | None = None, *, unfinished: bool = False) -> str:
    """Returns the key of the dataset `name`, at `size` or at its only size; `unfinished` includes one without an index.

    Raises:
        MissingInputError: the dataset does not exist; `NoDatasetError` if it does not at any size.
        BadRequestError: it exists at several sizes, and `size` is missing.
    """
    validated_dataset_name(name)
    folders = bucket.folders(DATASETS)
    sizes = sorted(
        ImageSize.of(match[1])
        for folder in folders
        if (match := re.fullmatch(f"{re.escape(name)}-({TEXT})", folder, re.ASCII))
        and (unfinished or bucket.exists(f"{DATASETS}/{folder}/{INDEX}"))
    )
    found = [there for there in sizes if size in (there, None)]
    if len(found) == 1:
        return dataset_key(name, found[0])
    if found:
        raise BadRequestError(
            f"dataset {name!r} lies in {bucket.uri} at sizes {', '.join(map(str, sizes))}: choose one with --size N "
            "(of ddpm train: --set data.size=N)"
        )
    if not sizes and name in folders and (match := re.fullmatch(f"(.+)-({TEXT})", name, re.ASCII)):
        # `ddpm data pack` prints the name of the folder, and people type that.
        typed = f"type {match[1]}, and --size {match[2]} (of ddpm train: --set data.size={match[2]})"
        raise MissingInputError(f"{name} is dataset {match[1]!r} at {match[2]} pixels: {typed}")
    wanted = f"{name!r} at {size} pixels" if size else f"{name!r}"
    if not sizes:
        raise NoDatasetError(f"no dataset {wanted} in {bucket.uri}", size)
    there = ", ".join(f"{name}-{s}" for s in sizes)
    raise MissingInputError(f"no dataset {wanted} in {bucket.uri} (there is {there})")

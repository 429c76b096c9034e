"""A run as commands open it, and its samples: pictures with names and origin, sets in pieces, and their scores.

The name of a picture holds the settings that it was made with, so that other settings do not overwrite it. Its
last comment has its origin and its SHA-256.

A set of many images has a folder, whose name has a hash of all that decides them. Each piece is created before its
record, and `index.json` when all pieces are there. Sampling never overwrites or deletes objects in it, and
`ddpm runs prune` deletes only pieces without a record. Pieces therefore match their records, even if several processes
make the same piece, and a piece that a killed process left without a record is as good as any other.

    RUN/evaluations/epoch-0490-ddim-100-0-5000-inception-1f3a9c02/piece-00012.safetensors   features, until the end
                                                                  scores.json               created once, at the end
    BUCKET/datasets/NAME-SIZE/references/inception-50000-7be2…/piece-00012.safetensors      features of real images

A score without its protocol means nothing: it depends on the images, the resize filter, the network and the counts. One
record therefore holds both, and beside them the score of real images against other real images.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import Literal

from pydantic import Field

from ddpm.catalogue import METRICS, Metric
from job.config import RunConfig
from job.config.schema import SamplerConfig, Section, Size
from job.coordination.pieces import PieceRecord
from job.coordination.sealed import SHA256_PATTERN, NamedObject, RecordPart, Sealed, code_version
from job.data.reading.order import epochs_completed_by
from job.data.shards import DatasetIndex, dataset_key, load_index
from job.exits import BadDataError, MissingInputError
from job.progress import note
from job.runs import records
from job.runs.checkpoints import check_average, choose
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef, ObjectKind
from job.stop import NEVER, Stop
from job.store import Store, open_bucket

LOSS_FIGURE = ObjectKind.FIGURE.key(name="loss", picture="png")
SCORES_FIGURE = ObjectKind.FIGURE.key(name="scores", picture="png")
_PNG_END_BYTES = 12
"""The size of its chunk IEND."""
_ORIGIN = re.compile(
    rb"(?:....tEXtComment\0|!\xfe.)(?P<origin>\{[^{}]*\}) [0-9a-f]{64}(?:....(?=.{12}\Z)|\0)", re.DOTALL
)


@dataclass(frozen=True)
class RunHandle:
    """A run and its dataset. The stores wait for a bucket that does not answer."""

    bucket: Store
    run: Store
    index: DatasetIndex | None
    """None for a run that was imported without a dataset."""
    config: RunConfig
    """With the changes of the last attempt."""
    stored: RunConfig
    """As the run began."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the network; by number if they have no names."""
        count = self.config.model.num_classes or 0
        names = self.index.classes if self.index else self.config.data.classes
        return names if names and count else tuple(map(str, range(count)))

    @property
    def how_sampled(self) -> str:
        """The sampling settings as part of a picture's name: their differences from those as the run began."""
        return self.config.sample.name(self.stored.sample)

    def grid_key(self, images_seen: int) -> str:
        """Returns the key of the sample grid of a moment."""
        return grid_key(self.label(images_seen), self.how_sampled)

    @property
    def sampled_classes(self) -> tuple[str, ...]:
        """The classes that the seeds take in turn."""
        return tuple(self.classes[label] for label in self.config.sample.labels) or self.classes

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pixels: after decoding, for a run on latents."""
        if self.index and (encoding := self.index.encoding):
            return encoding.channels, *encoding.size.shape
        return self.config.image_shape

    @property
    def how_shown(self) -> str:
        """Returns how pictures show images that they cannot hold, for people, after a comma; empty for others."""
        words = self.index.how_shown(self.config.sample.show) if self.index else ""
        return f", {words}" if words else ""

    def pixels(self) -> DatasetIndex | None:
        """Returns the dataset of the pixels: for latents, the dataset that was encoded.

        Raises:
            MissingInputError: the bucket no longer has it.
            BadDataError: it has other images now.
        """
        if self.index is None or (encoding := self.index.encoding) is None:
            return self.index
        index = load_index(self.bucket, dataset_key(encoding.source, encoding.size))
        if index.dataset_id != encoding.source_id:
            raise BadDataError(f"{encoding.source}-{encoding.size} no longer holds the images of {self.index.name}")
        return index

    @property
    def dataset_images(self) -> int:
        """Images of an epoch; without a dataset, more than a run can see."""
        return self.index.images if self.index else MAX_IMAGES_SEEN + 1

    def label(self, images_seen: int) -> str:
        """Returns the label of a moment; see `label_at`."""
        return label_at(images_seen, self.dataset_images, self.config.train.batch_size)

    def chosen(self, checkpoints: str, weights: str) -> list[CheckpointRef]:
        """Returns the checkpoints that a person asked for, now; see `job.runs.checkpoints.choose`.

        Raises:
            MissingInputError: no such checkpoint, or it lacks these weights.
            BadDataError: the run has lost all its checkpoints.
        """
        refs = choose(self.run, checkpoints, self.dataset_images, self.config.train.batch_size)
        for ref in refs if weights not in ("ema", "model") else ():
            check_average(self.run, ref, weights, self.run.uri.rpartition("/")[2])
        return refs


def open_run(bucket_uri: str, name: str, stop: Stop = NEVER, *, with_dataset: bool = True) -> RunHandle:
    """Returns an existing run with its last changes, and its dataset; `stop` ends a wait for the bucket.

    Without `with_dataset` a missing dataset is only a note.

    Raises:
        MissingInputError: no such run, or no such dataset.
        BadDataError: the run's configuration or the dataset's index is damaged.
    """
    bucket = open_bucket(bucket_uri, stop)
    run, stored = records.run_store(bucket, name), records.existing_config(bucket, name)
    config = stored
    try:
        config = records.as_last_changed(run, stored)
    except BadDataError as error:
        note(f"{error}; taking the run as it began")
    index = None
    try:
        index = load_index(bucket, records.dataset_key_of(config)) if config.data.dataset else None
    except (MissingInputError, BadDataError) as error:
        if with_dataset:
            raise
        note(f"going on without the dataset: {error}")
    return RunHandle(bucket, run, index, config, stored)


def put_picture(run: Store, key: str, picture: bytes, ref: CheckpointRef) -> None:
    """Puts a picture with its origin, and replaces an earlier picture of the same key.

    Args:
        run: the run's folder.
        key: of the picture below the run.
        picture: the content of a PNG or GIF.
        ref: the attempt whose weights made it, and their progress.
    """
    run_name = run.uri.rpartition("/")[2]
    origin = {"run": run_name, "fence": ref.fence, "images_seen": ref.images_seen, "code_version": code_version()}
    run.put(key, with_origin(picture, json.dumps(origin)))


def with_origin(picture: bytes, origin: str) -> bytes:
    """Returns a PNG or GIF with a comment: its origin, and the SHA-256 of the origin and of all other bytes.

    Viewers show it. It is a tEXt chunk (W3C, PNG, section 11.3.3), or a comment extension (CompuServe, GIF89a, section
    24) after the global colours, of at most 255 bytes.
    """
    text = f"{origin} {hashlib.sha256(picture + origin.encode()).hexdigest()}".encode()
    if picture.startswith(b"GIF"):
        comment, (flags,) = b"!\xfe" + bytes([len(text)]) + text + b"\0", picture[10:11] or b"\0"
        at = 13 + (3 << (flags & 7) + 1) * (flags >> 7)
    else:
        chunk, at = b"tEXtComment\0" + text, len(picture) - _PNG_END_BYTES
        comment = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return picture[:at] + comment + picture[at:]


def has_origin(picture: bytes) -> bool:
    """Returns whether these are all bytes of what `with_origin` once returned."""
    if (match := _ORIGIN.search(picture)) is None:
        return False
    before = picture[: match.start()] + picture[match.end() :]
    return with_origin(before, match["origin"].decode(errors="replace")) == picture


def label_at(images_seen: int, dataset_images: int, batch_size_images: int) -> str:
    """Returns a moment's label: `epoch-0080` (`epoch-0000` at the start), or `images-000012345` inside an epoch."""
    epochs = epochs_completed_by(images_seen, dataset_images, batch_size_images) if images_seen else (0,)
    return f"epoch-{epochs[-1]:04d}" if epochs else f"images-{images_seen:09d}"


def moment_of(label: str) -> str:
    """Returns a label for people: `epoch 80`, or `12,345 images`."""
    unit, _, number = label.partition("-")
    return f"epoch {int(number):,}" if unit == "epoch" else f"{int(number):,} images"


def title_of(run: Store, moment: str, how: str, seeds: Sequence[int]) -> str:
    """Returns the title of a picture: `celeba · epoch 80 · ddim, 100 steps · seeds 0-63`.

    Args:
        run: the run's folder.
        moment: such as `epoch 80`; see `moment_of`.
        how: the sampler and its settings; see `SamplerConfig.words`.
        seeds: of the images.
    """
    grouped = groupby(enumerate(seeds), lambda pair: pair[1] - pair[0])
    ranges = [[seed for _, seed in pairs] for _, pairs in grouped]
    words = [f"{one[0]}-{one[-1]}" if len(one) > 1 else f"{one[0]}" for one in ranges]
    shown = ", ".join(words[:8]) + f" … ({len(seeds):,} in all)" * (len(words) > 8)
    of_seeds = f"seed{'s' * (len(seeds) > 1)} {shown}"
    return " · ".join((run.uri.rpartition("/")[2], moment, how, of_seeds))


def file_words(numbers: str, comma: str) -> str:
    """Returns a list of numbers as part of a file name, with another `comma`; a long list as its hash."""
    words = "".join(numbers.split()).replace(",", comma)
    # File systems limit names to 255 bytes.
    return words if len(words) <= 80 else hashlib.sha256(words.encode()).hexdigest()[:16]


def grid_key(label: str, how: str) -> str:
    """Returns the key of a sample grid; `how` it was made is a `SamplerConfig.name`."""
    return ObjectKind.PICTURE.key(name=f"{label}-{how}", picture="png")


def denoising_key(label: str, how: str) -> str:
    """Returns the key of the GIF that shows the denoising of a few images."""
    return ObjectKind.PICTURE.key(name=f"denoising-{label}-{how}", picture="gif")


class Editing(Section):
    """The settings of an edit of given images, in the place of new ones."""

    mode: Literal["inpaint", "img2img", "invert", "interpolate"]
    image: str = ""
    """Numbers of images in the dataset such as 3,17, or the SHA-256 of a file."""
    mask: str = ""
    """For `inpaint`: half, centre, or the SHA-256 of a file."""
    resamplings: int = Field(default=0, ge=0, le=1000)
    """For `inpaint`: how often each group of steps is repeated (Lugmayr et al. 2022)."""
    strength: float = Field(default=0.0, ge=0, le=1)
    """For `img2img` and `invert`: the share of the steps that they take."""

    @property
    def name(self) -> str:
        """Returns the edit as part of a picture's name."""
        return self.words.replace(", ", "-").replace(" ", "-")

    @property
    def words(self) -> str:
        """Returns the edit for people."""
        given = {key: file_words(f"{value}", "_") for key, value in self.model_dump(exclude={"mode"}).items() if value}
        short = {key: text[:12] if re.fullmatch(SHA256_PATTERN, text) else text for key, text in given.items()}
        return ", ".join([self.mode, *(f"{key} {text}" for key, text in short.items())])


class SampleSetConfig(SamplerConfig):
    """All settings that decide the images of a set, and the cut into pieces."""

    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    checkpoint_sha256: str = Field(pattern=SHA256_PATTERN)
    worse_sha256: str = ""
    """The hash of the worse checkpoint that autoguidance uses; empty without autoguidance."""
    editing: Editing | None = None
    conditions: str = ""
    """The hash of the condition images and vectors, if the held-out images do not give them."""
    custom_sampler: str = ""
    """`module:function` and the SHA-256 of the module's file, for a sampler of the user."""
    found: tuple[int, ...] = ()
    """The timesteps of the grid `found`."""
    size: Size
    channels: int = Field(ge=1, le=16)
    levels: tuple[int, int] = (0, 255)
    """The values of black and white in the files."""
    bits: Literal[8, 16] = 8
    classes: tuple[str, ...]
    first_seed: int = Field(ge=0)
    count: int = Field(ge=1)
    piece_images: int = Field(ge=1)
    save: Literal["shards", "png"]

    @property
    def pieces(self) -> int:
        """Returns the number of pieces."""
        return ceil(self.count / self.piece_images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it all."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def seeds(self, number: int) -> range:
        """Returns the seeds of a piece."""
        first, end = self.first_seed + number * self.piece_images, self.first_seed + self.count
        return range(first, min(first + self.piece_images, end))


class FoundGrid(Sealed):
    """The timesteps found for a number of steps. The record is created once, so that all pictures use the same ones."""

    numbers: tuple[int, ...]
    """The timesteps of the process, from the most noise to the least."""
    checkpoint: str = Field(pattern=r"^checkpoints/\d{6}-\d{12}$")
    """The checkpoint whose network they were found with."""
    weights: str


def named_piece(record: PieceRecord, config: SampleSetConfig) -> NamedObject:
    """Returns what the index says of a piece; a folder of images has the hash of its `sha256sum *.png`."""
    if config.save == "shards":
        return record.files[0]
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in record.files)
    named = NamedObject.of(record.files[0].key.rpartition("/")[0], lines.encode())
    return named.model_copy(update={"size_bytes": sum(file.size_bytes for file in record.files)})


class SampleSetIndex(Sealed):
    """The list of all pieces in order. It depends on them alone, so that every process writes the same bytes."""

    sample_set: SampleSetConfig
    pieces: tuple[NamedObject, ...]


def score_name(score: str, extractor: str) -> str:
    """Returns the name of a score by its network: `fid` is Inception's alone, and MobileNetV2's is `fd-mobilenet`."""
    name = score.removesuffix("_std")
    metric = METRICS.get(name, Metric(""))
    if extractor == "inception" or metric.of == "likelihood" or name in METRICS["paired"].scores:
        return score
    return f"{metric.elsewhere or name}{score.removeprefix(name)}-{extractor}"


def score_words(values: Mapping[str, float], floor: Mapping[str, float], extractor: str) -> str:
    """Returns scores for people, each beside that of real images, without their deviations."""
    words = []
    for name, value in values.items():
        if not name.endswith("_std"):
            real = f" (real images {floor[name]:.4g})" if name in floor else ""
            words.append(f"{score_name(name, extractor)} {value:.4g}{real}")
    return ", ".join(words)


class Reference(RecordPart):
    """The real images, and the network that extracted their features."""

    dataset: str
    dataset_id: str = Field(pattern=SHA256_PATTERN)
    size: Size
    crop: str
    resize_filter: str
    images: int = Field(ge=1)
    """The number of images, chosen from `of_images` by a fixed order."""
    of_images: int = Field(ge=1)
    view: str = ""
    """How the network saw images that 8 bits in 1 or 3 channels do not hold; see `DatasetIndex.how_shown`."""
    extractor: str
    extractor_sha256: str = Field(pattern=SHA256_PATTERN)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it all."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def __str__(self) -> str:
        which = f"{self.images:,} images" if self.images == self.of_images else f"{self.images:,} of {self.of_images:,}"
        view = f", {self.view}" * bool(self.view)
        return f"{which} of {self.dataset}-{self.size} (crop {self.crop}, {self.resize_filter}{view})"


class Scores(Sealed):
    """The distances between the images of a sample set and real ones."""

    sample_set: SampleSetConfig
    reference: Reference
    values: dict[str, float]
    """The scores by name."""
    floor: dict[str, float]
    """The same scores of real images against other real images."""
    floor_images: tuple[int, int]
    """The numbers of real images on the two sides."""
    bits_per_dim_images: int
    """The number of images behind the score `bpd`, if there is one."""
    held_out: bool
    """Whether these images were held out from training."""
    name: str
    created: str
    code_version: str

    @property
    def ref(self) -> CheckpointRef:
        """Returns the checkpoint that made the images."""
        return CheckpointRef.parse(self.sample_set.checkpoint.partition("/")[2])

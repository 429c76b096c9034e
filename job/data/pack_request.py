"""Requests about datasets, see `job.requests`: what to pack and how, checked as far as possible without the source."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from ddpm.image_size import ImageSize
from job.exits import BadRequestError
from job.options import DatasetName, JobOptions, Option, Size, SliceOption, Targets, option

if TYPE_CHECKING:
    from job.data.images import Recipe

MOST_HELD_OUT = 0.5
UNLABELLED = ("refuse", "drop")
"""The words of `--unlabelled`."""
FIRST_IMAGES = 64
"""How many images of a source tell whether it is grey."""


@dataclass(frozen=True)
class PackRequest(JobOptions):
    """Pack images into a dataset in the bucket.

    SOURCE is a folder, a .zip, a .tar[.gz] or a folder of those; or files of WebDataset, EDM and StyleGAN, Parquet
    and Arrow (Hugging Face), NumPy, TFRecord, LMDB, MNIST or CIFAR, with their labels. The SOURCE landscape-sample
    comes with the program. A NAME with a preset, such as celeba, takes size and crop from it. The same command resumes
    an interrupted one.

    With --hold-out a share of the images, chosen by their names, becomes the dataset NAME-held-out. Runs on NAME never
    learn from it; they log their loss on it as val_loss.

    With --slice several machines pack one dataset: I/N is 0/4, 1/4, 2/4 and 3/4 on four machines.

    Examples:

        ddpm data pack img_align_celeba.zip celeba --bucket gs://my-bucket

        ddpm data pack ~/photos mine --size 64 --hold-out 5%

        ddpm data pack train.zip dogs --size 64 --labels labels.csv:breed
    """

    command = ("data", "pack")
    source: Annotated[str, Option("SOURCE", "Folder, archive or file of images; a path, a URL or a pattern.")]
    """See `open_source`; or the name of the embedded dataset."""
    name: DatasetName
    size: Size = None
    """Here also the pixels of a side of squares; a checked request has an `ImageSize`."""
    _: KW_ONLY
    crop: str = option("--crop CROP", "center[:PIXELS], squash or LEFT,TOP,WIDTH,HEIGHT in pixels.")
    resize_filter: str = option("--filter NAME", "Filter for resizing: lanczos, bicubic, bilinear, box, or nearest.")
    channels: int | None = option(
        "--channels N",
        "3 for colour, 1 for grey, up to 16 for arrays and TIFF. Default: those of the first 64 images.",
        None,
    )
    """None: 1 if the first images are all grey, and then all others must be."""
    bits: int | None = option(
        "--bits 8|16", "Bits of a value. Default: 16 if the first 64 images all have more than 8, else 8.", None
    )
    pixel_range: str = option(
        "--range LOW,HIGH",
        "The values of black and white in images of more than 8 bits, such as 0,4095. Default: those of the file.",
    )
    classes: bool | None = option(
        "--classes/--no-classes",
        "Default: the labels of the source, else folders, unless they are splits or numbers such as 007.",
        None,
    )
    """None for `tars`: if the first image has a label."""
    labels: str = option(
        "--labels FILE[:COLUMN]",
        "Table of labels by file name (.csv, .jsonl, .json, .txt); :COLUMN alone: a label of SOURCE.",
    )
    vector: str = option(
        "--vector FILE:COLUMNS",
        "Numbers of each image, as a condition: columns of a table by file name, such as t.csv:age,angle; :COLUMNS "
        "alone: of SOURCE.",
    )
    condition: str = option(
        "--condition SOURCE",
        "Images of the same places, as conditions: of equal paths but suffixes in another source; :NAME: NAME.png "
        "beside each image as a.NAME.png, or a column.",
    )
    condition_filter: str = option(
        "--condition-filter NAME",
        "Filter of conditions. Default: nearest for palettes and one bit, which are masks, else that of --filter.",
    )
    licence: str = option("--licence TEXT", "Licence of the images, kept as a note.")
    max_bad: int = option("--max-bad N", "Give up after N unreadable images.", 100, min=0)
    min_side: int | None = option(
        "--min-side PIXELS", "Reject images with a shorter side. Default: size/2.", None, min=1
    )
    """None: half of the longer side of `size`, so that nothing is enlarged more than twice."""
    split: str = option(
        "--split NAME",
        "Pack one split of SOURCE, train, test or val, or all of them. Default: train, if there are several.",
    )
    unlabelled: str = option(
        "--unlabelled drop|refuse",
        "If some images have a label and others have none, leave these out, or exit with 65.",
        "refuse",
        choices=UNLABELLED,
    )
    hold_out: str = option("--hold-out SHARE", "Share of the images to hold out, such as 5%.")
    replaces: bool = option("--replace", "Delete a dataset of this name before, unless a run trains on it.", False)
    slice: SliceOption = ""
    tars: tuple[str, ...] = ()
    """In place of a source: tars that stay where they are, as URIs, patterns or folders, see `find_tars`."""
    is_held_out: bool = False
    """Whether this is the part that is held out."""

    def check(self) -> Self:
        """Returns the request with size, crop, filter and licence filled in.

        Raises:
            BadRequestError: a value that means nothing, no size and no preset to take it from, or the name of the
                embedded dataset for other images.
        """
        from job.config import EMBEDDED, PackConfig, pack_config
        from job.data.shards import validated_dataset_name
        from job.data.source.members import ALL, SPLITS

        validated_dataset_name(self.name)
        if self.name == EMBEDDED != self.source:
            raise BadRequestError(f"{EMBEDDED!r} has its own images: give yours another name (make: DATASET=NAME)")
        if self.split not in ("", ALL, *SPLITS):
            raise BadRequestError(f"--split {self.split!r}: it is one of {', '.join(sorted((ALL, *SPLITS)))}")
        if self.replaces and self.slice:
            raise BadRequestError("--replace and --slice: delete the dataset first, by `ddpm data delete`")
        if self.labels and self.classes is False:
            raise BadRequestError("--labels and --no-classes contradict each other: leave one out")
        if self.hold_out_share > MOST_HELD_OUT:
            raise BadRequestError(f"--hold-out {self.hold_out}: at most {MOST_HELD_OUT:.0%}, such as 5%")
        preset = pack_config(self.name) or (PackConfig(size=self.size) if self.size else None)
        if preset is None:
            raise BadRequestError(f"--size is needed: {self.name!r} has no preset to take it from (try --size 64)")
        follow = ("size", "crop", "resize_filter", "licence")
        values = {option: getattr(self, option) or getattr(preset, option) for option in follow}
        checked = replace(self, **values | {"size": ImageSize.of(values["size"])})
        checked.recipe()
        return checked

    @property
    def place(self) -> str:
        """The path or URI of the source."""
        from job.config import EMBEDDED

        return str(resources.files("job") / "datasets" / f"{EMBEDDED}.zip") if self.source == EMBEDDED else self.source

    @property
    def hold_out_share(self) -> float:
        """Share of the images that is held out; 0 for none.

        Raises:
            BadRequestError: `hold_out` is not a percentage.
        """
        match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*", self.hold_out)
        if self.hold_out and not match:
            raise BadRequestError(f"--hold-out {self.hold_out!r}: use a share such as 5% or 0.5%")
        return float(match[1]) / 100 if match else 0.0

    def takes(self, name: str) -> bool:
        """Returns whether an image is in this part: by its name, so that it stays there when others come or go."""
        if not self.hold_out:
            return True
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        return (drawn < self.hold_out_share) == self.is_held_out

    @property
    def key(self) -> str:
        """The dataset's folder; of a request that is checked."""
        from job.data.shards import dataset_key

        assert self.size is not None
        return dataset_key(self.name, self.size)

    @property
    def held_out(self) -> str:
        """Name of the dataset of what is held out; empty if nothing is."""
        return f"{self.name}-held-out" if self.hold_out_share and not self.is_held_out else ""

    def parts(self) -> list[Self]:
        """Returns the parts of a checked request in the order of packing: the held-out part comes first."""
        return [*([replace(self, name=self.held_out, is_held_out=True).check()] if self.held_out else []), self]

    def recipe(self, first_images: Iterable[bytes] = ()) -> "Recipe":
        """Returns how a checked request converts each image of a source that begins with these.

        They are read unless channels, bits and, for 16 bits, the range are chosen.
        """
        from job.data.images import Found, Recipe, found_in

        assert self.size is not None
        min_side = max(self.size.shape) // 2 if self.min_side is None else self.min_side
        is_chosen = self.channels and self.bits and (self.pixel_range or self.bits == 8)
        found = Found() if is_chosen else found_in(first_images)
        channels, bits = self.channels or found.channels, self.bits or found.bits
        # One range for all images: a scale of its own for each would change what a value means.
        pixel_range = self.pixel_range or (found.pixel_range if bits == 16 else "")
        return Recipe(self.size, self.crop, self.resize_filter, channels, min_side, pixel_range, bits)

    def condition_recipe(self, of_images: "Recipe", first_conditions: Iterable[bytes]) -> "Recipe":
        """Returns how conditions that begin with these are converted, beside images of a recipe."""
        from job.data.images import found_in, is_mask

        first = list(first_conditions)
        found = found_in(first)
        usual = "nearest" if first and all(map(is_mask, first)) else of_images.resize_filter
        pixel_range = self.pixel_range or found.pixel_range
        like_images = replace(of_images, resize_filter=self.condition_filter or usual, pixel_range=pixel_range)
        return replace(like_images, channels=found.channels, min_side=1)


@dataclass(frozen=True, kw_only=True)
class IndexRequest(PackRequest):
    """Index WebDataset tars as a dataset, without copying them.

    img2dataset writes such tars. They must not change afterwards: the index holds a hash of each. With --slice several
    machines index one dataset.

    Examples:

        ddpm data index gs://theirs/laion/{00000..00099}.tar laion --size 64 --bucket gs://my-bucket

        ddpm data index ~/laion laion --size 64 --crop center
    """

    command = ("data", "index")
    option_names: ClassVar = (
        "tars name size crop resize_filter channels bits pixel_range classes labels unlabelled licence max_bad "
        "min_side slice stop_after bucket"
    )
    source: str = ""
    tars: Annotated[tuple[str, ...], Option("URI", "Tars, folders of tars or patterns; paths or URLs.")] = field()
    labels: str = option("--labels :KEY", "Key of the label in .json files. Default: label, cls or class.")


@dataclass(frozen=True, kw_only=True)
class EnsureRequest(PackRequest):
    """Pack a dataset if the bucket lacks it.

    This machine does the work, wherever the bucket is. The dataset landscape-sample needs no --source. If the dataset
    is there and SOURCE has other images, labels or classes, the command ends with 64. It cannot compare a SOURCE that
    is gone or on a web server, and says so.

    Example: ddpm data ensure celeba --source img_align_celeba.zip
    """

    command = ("data", "ensure")
    option_names: ClassVar = (
        "name source size channels bits pixel_range classes labels vector condition condition_filter split unlabelled "
        "replaces on targets bucket"
    )
    source: str = option("--source SOURCE", "Images to pack if the dataset is missing, or to compare.")
    on: str = option("--on TARGET", "Target whose bucket to use.")
    targets: Targets = None


@dataclass(frozen=True)
class EncodeRequest(JobOptions):
    """Encode a dataset into latents of an autoencoder.

    The new dataset keeps the mean and log-variance of each image, and the autoencoder. Runs on it decode their samples.
    Encoding uses the GPU if there is one. The same command resumes an interrupted one. With --slice several machines
    share the work.

    Example: ddpm data encode celebahq-256 --autoencoder sd-vae-ft-mse --to celebahq-latents
    """

    command = ("data", "encode")
    name: DatasetName
    _: KW_ONLY
    autoencoder: Annotated[
        str, Option("--autoencoder DIR|URI", "Folder of an AutoencoderKL or of a pipeline of diffusers.")
    ]
    size: Size = None
    """None: the only one of the dataset."""
    to: str = option("--to NAME", "Name of the new dataset. Default: NAME-latents.")
    slice: SliceOption = ""

    def check(self) -> Self:
        """Returns the request with the name of its dataset of latents filled in.

        Raises:
            BadRequestError: an invalid name.
        """
        from job.data.shards import validated_dataset_name

        validated_dataset_name(self.name)
        return replace(self, to=validated_dataset_name(self.to or f"{self.name}-latents"))

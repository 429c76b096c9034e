"""The options of a packing, checked as far as possible without the source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources

from ddpm.image_size import ImageSize
from job.config import EMBEDDED, PackConfig, pack_config
from job.data import shards
from job.data.images import Recipe, are_grey
from job.data.members import ALL, SPLITS
from job.exits import BadRequestError

MOST_HELD_OUT = 0.5
UNLABELLED = ("refuse", "drop")
"""The words of `--unlabelled`."""
FIRST_IMAGES = 64
"""How many images of a source tell whether it is grey."""


@dataclass(frozen=True)
class PackRequest:
    """The source and the options of a dataset; empty options follow the preset of its name, if there is one.

    Attributes:
        source: a local path or a URI, see `open_source`; or `EMBEDDED`.
        name: of the dataset.
        size: of the images, or the pixels of a side of squares.
        crop: see `Recipe`.
        resize_filter: see `Recipe`.
        channels: 3 or 1; None: 1 if the first images are all grey, and then all others must be.
        pixel_range: see `Recipe`.
        classes: True if there must be classes, False for none; None: if there are labels, or folders that look like
            classes; of `tars`, if the first image has a label.
        labels: `FILE[:COLUMN]`, a table of labels by file name; or `:COLUMN`, which of the source's labels is taken.
        licence: a note to keep with the dataset.
        max_bad: how many images may be rejected.
        min_side: reject images with a shorter side under this many pixels; None is half of the longer side of `size`:
            nothing is enlarged more than twice.
        split: pack only this split of the source, one of `SPLITS`, or `ALL`; empty for train if there are several.
        unlabelled: what happens to images without a label among images with one, of `UNLABELLED`.
        hold_out: the share of the images that become a dataset of their own, which no run learns from, such as `5%`.
        is_held_out: whether this is the part that is held out.
        replaces: whether it replaces a dataset of this name.
        tars: instead of `source`: tars that stay where they are, as URIs, patterns or folders, see `find_tars`.
        slice: `I/N`, the share of one of several machines; see `job.pieces`.
    """

    source: str
    name: str
    size: ImageSize | int | None = None
    crop: str = ""
    resize_filter: str = ""
    channels: int | None = None
    pixel_range: str = ""
    classes: bool | None = None
    labels: str = ""
    licence: str = ""
    max_bad: int = 100
    min_side: int | None = None
    split: str = ""
    unlabelled: str = "refuse"
    hold_out: str = ""
    is_held_out: bool = False
    replaces: bool = False
    tars: tuple[str, ...] = ()
    slice: str = ""

    def check(self) -> PackRequest:
        """Returns the request with size, crop, filter and licence filled in.

        Raises:
            BadRequestError: a value that means nothing, no size and no preset to take it from, or the name of the
                embedded dataset for other images.
        """
        shards.validated_dataset_name(self.name)
        if self.name == EMBEDDED != self.source:
            raise BadRequestError(f"{EMBEDDED!r} has its own images: give yours another name (make: DATASET=NAME)")
        if self.split not in ("", ALL, *SPLITS):
            raise BadRequestError(f"--split {self.split!r}: it is one of {', '.join(sorted((ALL, *SPLITS)))}")
        if self.unlabelled not in UNLABELLED:
            raise BadRequestError(f"--unlabelled {self.unlabelled!r}: it is one of {', '.join(UNLABELLED)}")
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
        is_embedded = self.source == EMBEDDED
        return str(resources.files("job") / "datasets" / f"{EMBEDDED}.zip") if is_embedded else self.source

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
        assert isinstance(self.size, ImageSize)
        return shards.dataset_key(self.name, self.size)

    @property
    def held_out(self) -> str:
        """Name of the dataset of what is held out; empty if nothing is."""
        return f"{self.name}-held-out" if self.hold_out_share and not self.is_held_out else ""

    def parts(self) -> list[PackRequest]:
        """Returns the parts of a checked request in the order of packing: the held-out part comes first."""
        return [*([replace(self, name=self.held_out, is_held_out=True).check()] if self.held_out else []), self]

    def recipe(self, first_images: Iterable[bytes] = ()) -> Recipe:
        """Returns how a checked request converts each image of a source that begins with these.

        They are read if no channels are chosen.
        """
        assert isinstance(self.size, ImageSize)
        min_side = max(self.size.shape) // 2 if self.min_side is None else self.min_side
        channels = self.channels or (1 if are_grey(first_images) else 3)
        return Recipe(self.size, self.crop, self.resize_filter, channels, min_side, self.pixel_range)

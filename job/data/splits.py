"""The splits of a dataset: folders and files whose names say train, test or validation, in the spellings people use."""

from __future__ import annotations

import re
from collections.abc import Iterable

ALL = "all"
"""The word for all splits of a source together."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
"""The split that each word names."""

_WORD = "|".join(SPLITS)
# trainA and trainB are CycleGAN's; train2017 is COCO's, seg_train Kaggle's.
_FOLDER = re.compile(
    rf"(?:(?:seg|img|images?|data|dataset)[-_. ]?)?({_WORD})(?:[-_. ]?val)?"
    r"[-_. ]?(?:set|data|split|images?|imgs?|jpe?g|png|tiff?|mini|full|[ab]|\d+)?",
    re.IGNORECASE,
)
# imagenet-train-00000.tar, train-00000-of-00001.parquet
_FILE = re.compile(rf"(?:^|[-_. ])({_WORD})(?=[-_. ]|\d|$)", re.IGNORECASE)
_DATA_FILE = re.compile(
    r"\.(zip|tar|tgz|tar\.gz|parquet|arrow|np[yz]|tfrec(?:ords?)?|bin|lmdb)(\.gz)?$"
    r"|\.tfrecords?-|-\d{5}-of-\d{5}(\.gz)?$|_lmdb$",
    re.IGNORECASE,
)
"""Files that hold many images: a part of an image's name, but never a class."""


def is_data_file(part: str) -> bool:
    """Returns whether a part of an image's name is the file that holds the image and others."""
    return _DATA_FILE.search(part) is not None


def stem_of(part: str) -> str:
    """Returns a part of a name, without the suffix of a data file."""
    return _DATA_FILE.split(part)[0]


def split_of(part: str) -> str:
    """Returns the split that a part of a name stands for: train, test or val; an empty string for none."""
    match = _FILE.search(part) if is_data_file(part) else _FOLDER.fullmatch(part)
    return SPLITS[match[1].lower()] if match else ""


def split_in(parts: Iterable[str]) -> str:
    """Returns the first split among the parts of a name; an empty string for none."""
    return next(filter(None, map(split_of, parts)), "")


def first_split(names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Returns the split of a format that is packed unless a person chooses another, and the others.

    `names` are those of its files. Of several splits it is train; otherwise both results are empty.
    """
    found = {split_in(name.split("/")) for name in names}
    others = tuple(sorted(found - {"train", ""}))
    return ("train", others) if "train" in found and others else ("", ())

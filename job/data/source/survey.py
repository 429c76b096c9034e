"""A survey of a source before it is packed: the number of its images, and their classes.

Classes are never made up. A person decides whether folders named by numbers or splits are classes, and reads which
folders became classes before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from job.data.source import members
from job.data.source.formats import next_step
from job.data.source.members import SUFFIXES, Source, is_data_file, split_of, stem_of
from job.exits import BadDataError, BadRequestError
from job.progress import some_of

_FEW_IMAGES, _MOST_CLASSES = 100, 100_000
_NUMBER = re.compile(r"[\d_. -]+")
_WHOLE = re.compile(r"0|[1-9]\d*")


@dataclass(frozen=True)
class Survey:
    """The result of `survey`.

    Attributes:
        images: number of images, without those that are left out.
        classes: the names of the classes, in the order of their numbers.
        classes_from: `labels` or `folders`; empty without classes.
        splits: the splits that become one dataset, if there are several.
        unlabelled_images: images that are left out, because all others have a label.
        notes: what a person has to know before training.
        sha256: of the names, sizes and labels of all images.
    """

    images: int
    classes: tuple[str, ...]
    classes_from: str
    splits: tuple[str, ...]
    unlabelled_images: int
    notes: tuple[str, ...]
    sha256: str
    _labels: array[int] = field(repr=False)

    def label(self, number: int) -> int | None:
        """Returns the class of image `number` of the source, -1 without classes; None for one that is left out."""
        label = self._labels[number]
        return None if self.classes and label < 0 else label


def survey(
    source: Source,
    classes: bool | None = None,
    drops: bool = False,
    check_stop: Callable[[], object] = bool,
) -> Survey:
    """Counts the images of a source and finds their classes.

    Args:
        source: the chosen split, with its labels.
        classes: True requires classes, False ignores them; None takes labels, or else folders that look like classes.
        drops: whether images without a label are left out, if others have one.
        check_stop: called at each image; raises `StoppedError`.

    Raises:
        BadDataError: the source has no images, or some have a label and others have none.
        BadRequestError: classes are required and missing, or each image has a label of its own.
    """
    digest, shared = hashlib.sha256(), dict[Any, Any]()
    labels, folders, examples = list[str](), list[tuple[str, ...]](), list[str]()
    where, names = source.where, source.classes
    for image in source.images(labelled=True):
        check_stop()
        name, label, folder = image.name, image.label, members.path_parts(image.name)[:-1]
        digest.update(b"%d:%b%d:%b;" % (len(name.encode()), name.encode(), image.size_bytes, label.encode()))
        if not label and len(examples) < 2:
            examples.append(name)
        # Millions of images have few labels and folders.
        labels.append(shared.setdefault(label, label))
        folders.append(shared.setdefault(folder, folder))
    if not labels:
        raise no_images(where, source.skipped)
    known, found = set(labels) - {""}, _Found((), {})
    if classes is not False and known:
        ordered = tuple(dict.fromkeys([*names, *sorted(known, key=_in_order)]))
        found = _Found(ordered, {label: number for number, label in enumerate(ordered)}, are_labels=True)
    elif classes is not False:
        ways = (are_classes, _are_no_splits, bool) if classes else (are_classes,)
        by_name = [class_folders(set(folders), accepts) for accepts in ways]
        found = next((found for found in by_name if found.names), by_name[0])
    if (many := len(found.names)) > _MOST_CLASSES:
        raise BadRequestError(f"{where} has {many:,} classes, more than {_MOST_CLASSES:,}: use --no-classes")
    if classes and not found.names:
        said = "no image has a label, and each would have to lie in one of at least two folders"
        raise BadRequestError(f"{where} has no classes: {said}. --labels FILE names a table of labels")
    numbers = array("i", (found.numbers.get(value, -1) for value in (labels if found.are_labels else folders)))
    count, lacking = len(numbers), numbers.count(-1) if found.names else 0
    if lacking and not drops:
        raise lacking_labels(where, lacking, count, examples)
    if found.are_labels and not names and count > _FEW_IMAGES and len(found.numbers) >= count - lacking:
        raise BadRequestError(f"{where} has another label for each image, so that none is a class: use --no-classes")
    looks = dict[str, str]()
    for name in found.names:
        # Unicode has two forms of ä, and several blanks, which some programs write for others.
        look = " ".join(unicodedata.normalize("NFC", name).replace("\u200b", "").split())
        if (other := looks.setdefault(look, name)) != name:
            raise BadRequestError(f"{where} has two classes that look the same, {other!a} and {name!a}: rename one")
    kept = {folder for folder, number in zip(folders, numbers, strict=True) if number >= 0 or not found.names}
    divided = {part for folder in kept for part in folder if split_of(part)}.difference(found.names)
    splits = tuple(sorted(set(map(split_of, divided))))
    notes = [*found.notes(classes, source.choices)]
    if len(splits) > 1:
        alone = f"`ddpm data pack --split {split_of(max(divided))}` would pack {max(divided)} alone"
        notes.append(f"{some_of(sorted(divided))} are packed together, as one dataset; {alone}")
    if lacking:
        notes.append(f"{lacking:,} of {count:,} images have no label, and are left out")
    return Survey(
        images=count - lacking,
        classes=found.names,
        classes_from=("labels" if found.are_labels else "folders") if found.names else "",
        splits=splits if len(splits) > 1 else (),
        unlabelled_images=lacking,
        notes=tuple(f"{where}: {said}" for said in notes),
        sha256=digest.hexdigest(),
        _labels=numbers,
    )


class Vectors(NamedTuple):
    """The numbers of a source's images: their names, float32 [images, k], and mean and deviation of each, float64 [k].

    The statistics are those of all images, so that a part that is held out has the same.
    """

    names: tuple[str, ...] = ()
    values: np.ndarray = np.empty((0, 0), np.float32)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    sha256: str = ""
    """Of them, and of the survey of their images."""

    def of(self, number: int) -> dict[str, float]:
        """Returns the numbers of an image of the source by name."""
        return dict(zip(self.names, self.values[number].tolist(), strict=True)) if self.names else {}


def vectors_in(
    columns: Iterable[tuple[str, Source]], found: Survey, check_stop: Callable[[], object] = bool
) -> Vectors:
    """Reads the vector of each image that a survey found.

    Args:
        columns: the name of each column, with the source whose labels are its numbers.
        found: the survey.
        check_stop: called at each image; raises `StoppedError`.

    Raises:
        BadDataError: an image has no number, or more or fewer than others.
        BadRequestError: a number is the same for all images.
    """
    names, read = list[str](), list[np.ndarray]()
    for column, source in columns:
        rows = list[list[str]]()
        for number, image in enumerate(source.images(labelled=True)):
            check_stop()
            if found.label(number) is None:
                rows.append([])
                continue
            rows.append(image.label.split())
            width = next(filter(None, map(len, rows)), 0)
            if not rows[-1] or len(rows[-1]) != width:
                lacking = f"{len(rows[-1])} numbers {column!r}, and others {width}" if rows[-1] else f"no {column!r}"
                said = f"{image.name!r} has {lacking}: each image needs all, or is to be left out"
                raise BadDataError(f"{source.where}: {said}")
        names += [column] if width == 1 else [f"{column}.{place}" for place in range(width)]
        read.append(np.array([row or ["0"] * width for row in rows], np.float64))
    values = np.concatenate(read, axis=1)
    kept = values[[found.label(number) is not None for number in range(len(values))]]
    # Exactly rounded, so that all machines find the same.
    mean = [math.fsum(of_one) / len(kept) for of_one in kept.T]
    std = [math.sqrt(math.fsum(square) / len(kept)) for square in (kept.T - np.array(mean)[:, None]) ** 2]
    for name, deviation, value in zip(names, std, mean, strict=True):
        if not deviation:
            raise BadRequestError(f"--vector: {name!r} is {value:g} for all images, which tells nothing: leave it out")
    values = values.astype(np.float32)
    named = json.dumps([found.sha256, names]).encode() + values.tobytes()
    return Vectors(tuple(names), values, tuple(mean), tuple(std), hashlib.sha256(named).hexdigest())


class Pairs(NamedTuple):
    """The images of a source that have a condition: their paths without suffixes, and SHA-256 of the conditions."""

    stems: set[str]
    sha256: str
    lonely: int
    """The number of images without one."""


def condition_pairs(source: Source, conditions: Source, check_stop: Callable[[], object] = bool) -> Pairs:
    """Finds the condition of each image, by its path without the suffix.

    Raises:
        BadRequestError: no image has one, two share one, or they come in another order.
    """
    images, others, digest = list[str](), list[str](), hashlib.sha256()
    for image in source.images():
        check_stop()
        images.append(path_stem(image.name))
    for other in conditions.images():
        check_stop()
        others.append(path_stem(other.name))
        digest.update(b"%d:%b%d;" % (len(other.name.encode()), other.name.encode(), other.size_bytes))
    both = {*images} & {*others}
    ours, theirs = ([stem for stem in each if stem in both] for each in (images, others))
    if not both:
        there = f", but {others[0]!r}" if others else ""
        raise BadRequestError(f"--condition {conditions.where} has no image {images[0]!r}{there}: names must be equal")
    if several := [each for each in (ours, theirs) if len(each) > len(both)]:
        twice, _ = Counter(several[0]).most_common(1)[0]
        raise BadRequestError(f"--condition {conditions.where}: there are several images {twice!r}: rename all but one")
    if ours != theirs:
        said = f"has another order than {source.where}: put both into folders"
        raise BadRequestError(f"--condition {conditions.where} {said}")
    return Pairs(both, digest.hexdigest(), len(images) - len(ours))


def path_stem(name: str) -> str:
    """Returns a path without its suffix."""
    return name.rpartition(".")[0]


def lacking_labels(where: str, lacking: int, images: int, examples: Sequence[str]) -> BadDataError:
    """Returns the error that `lacking` of all `images` have no label, though others have one."""
    said = f"{where}: {lacking:,} of {images:,} images have no label, such as {some_of(examples[:2])}"
    return BadDataError(f"{said}: label them, leave them out with --unlabelled drop, or use --no-classes")


def no_images(where: str, skipped: Iterable[str] = ()) -> BadDataError:
    """Returns the error that a source is empty; files with these suffixes were skipped."""
    suffixes = f"none of its names ends in {', '.join(sorted(SUFFIXES))}"
    return BadDataError(f"{where} holds no images: {next(filter(None, map(next_step, skipped)), suffixes)}")


@dataclass(frozen=True)
class _Found:
    """The classes of a source.

    Attributes:
        names: of the classes.
        numbers: the number of the class of each label or folder.
        are_labels: whether the format has labels.
        passed: the folders that are not taken for classes.
    """

    names: tuple[str, ...]
    numbers: Mapping[Any, int]
    are_labels: bool = False
    passed: tuple[str, ...] = ()

    def notes(self, asked: bool | None, unchosen: Sequence[str]) -> Iterator[str]:
        """Yields what a person has to know, who asked for classes, for none, or for neither."""
        if self.names and self.are_labels:
            yield f"its labels name {len(self.names):,} classes that the network will learn: {some_of(self.names)}"
        elif self.names:
            said = f"{len(self.names):,} folders became classes that the network will learn: {some_of(self.names)}"
            yield f"{said}; use --no-classes if they are not classes"
        elif asked is None:
            if self.passed:
                why = f"the folders {some_of(self.passed)} are not taken for classes; use --classes if they are classes"
            else:
                why = (
                    "it is packed without classes: its images have neither labels nor folders of classes that hold all"
                )
            there = [f"--labels {words}" for words in unchosen]
            yield f"{why}; {some_of(there)} would take labels" if there else why


def class_folders(folders: set[tuple[str, ...]], accepts: Callable[[set[str]], bool]) -> _Found:
    """Returns the first level of folders in which images differ and whose names are accepted as those of classes."""
    inner, passed = {folder: folder for folder in folders}, tuple[str, ...]()
    while True:
        levels = enumerate(zip(*inner.values(), strict=False))
        depth = next((number for number, level in levels if len(set(level)) > 1), min(map(len, inner.values())))
        if any(len(folder) == depth for folder in inner.values()):
            return _Found((), {}, passed=passed)
        first = {folder[depth] for folder in inner.values()}
        if accepts(first):
            names = tuple(sorted(set(map(stem_of, first)), key=_in_order))
            return _Found(names, {folder: names.index(stem_of(there[depth])) for folder, there in inner.items()})
        if not all(map(split_of, first)):
            passed = passed or tuple(sorted(first))
        inner = {folder: (*there[:depth], "", *there[depth + 1 :]) for folder, there in inner.items()}


def _in_order(name: str) -> tuple[int, str]:
    """Returns the key by which classes are sorted: names, then numbers."""
    return int(name) if name.isdecimal() else -1, name


def are_classes(names: set[str]) -> bool:
    """Returns whether names look like classes: neither splits, files of many images, dates nor numbers such as 007."""
    are_numbers = all(is_data_file(name) or _NUMBER.fullmatch(name) for name in names)
    return _are_no_splits(names) and (not are_numbers or all(map(_WHOLE.fullmatch, names)))


def _are_no_splits(names: set[str]) -> bool:
    # Of many classes one may be that of trains.
    return 2 * sum(map(bool, map(split_of, names))) < len(names)

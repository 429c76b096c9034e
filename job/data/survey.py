"""The number of images in a source, and their classes, from their names alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from job.data.members import SUFFIXES, path_parts
from job.data.sources import SPLITS
from job.exits import BadDataError, BadRequestError


@dataclass(frozen=True)
class Survey:
    """The result of `survey`."""

    images: int
    classes: tuple[str, ...]
    depth: int
    """Number of folders above those that name the classes."""
    note: str = ""
    """Why images have no classes, or which splits become one dataset; for people."""

    def label(self, name: str) -> int:
        """Returns the class of an image; -1 without classes."""
        return self.classes.index(path_parts(name)[self.depth]) if self.classes else -1


def survey(names: Iterable[str], where: str, classes: bool | None = None) -> Survey:
    """Counts the images and finds their classes: the first folders in which they differ, unless these are splits.

    Args:
        names: relative paths of all images.
        where: the source, for messages.
        classes: True requires classes, False ignores them; None takes them if each image lies in one of several.

    Raises:
        BadDataError: the source has no images.
        BadRequestError: classes are required and missing.
    """
    images, folders = 0, set()
    for name in names:
        images += 1
        folders.add(path_parts(name)[:-1])
    if not images:
        raise no_images(where)
    found, depth = _class_folders(folders)
    if classes and not found:
        raise BadRequestError(f"{where} has no classes: each image would have to lie in one of at least two folders")
    notes, divided = [], {part for folder in folders for part in folder if part.lower() in SPLITS}
    if len(splits := divided.difference(found)) > 1:
        named = f"{' and '.join(sorted(splits))} are packed together, as one dataset"
        notes.append(f"{where}: {named}; `ddpm data pack --split {max(splits).lower()}` would pack {max(splits)} alone")
    inner = {tuple(part for part in folder if part not in splits) for folder in folders}
    if classes is None and not found and len([folder for folder in inner if folder]) > 1:
        notes.append(f"{where}: some images lie beside the folders of others, so the folders are not taken for classes")
    return Survey(images, () if classes is False else found, depth, "\n".join(notes))


def no_images(where: str) -> BadDataError:
    """Returns the error that a source is empty."""
    return BadDataError(f"{where} holds no images: none of its names ends in {', '.join(sorted(SUFFIXES))}")


def _class_folders(folders: set[tuple[str, ...]]) -> tuple[tuple[str, ...], int]:
    """Returns the names of the folders that are classes, and the number of folders above them."""
    while True:
        levels = enumerate(zip(*folders, strict=False))
        depth = next((number for number, level in levels if len(set(level)) > 1), min(map(len, folders)))
        if any(len(folder) == depth for folder in folders):
            return (), 0
        first = {folder[depth] for folder in folders}
        if not all(name.lower() in SPLITS for name in first):
            return tuple(sorted(first)), depth
        folders = {(*folder[:depth], "", *folder[depth + 1 :]) for folder in folders}

"""The files beside a source's images that say what the images are: the labels of StyleGAN and EDM, COCO's objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from job.data import members
from job.data.labels import json_of, labels_of_pairs, pairs_in, sidecars, text_of, with_sidecars
from job.data.members import Files, Member, Source, is_data_file
from job.exits import BadRequestError
from job.progress import printable

DATASET_JSON = "dataset.json"
"""The table of labels that StyleGAN's and EDM's `dataset_tool.py` writes (Karras et al. 2022)."""

_COCO = re.compile(r"(?:.*/)?annotations/(?:instances|captions|person_keypoints|panoptic|stuff)_.*\.json")


def labelled_beside(source: Source, files: Files, column: str | None) -> Source:
    """Returns the images of a source with the labels of a `dataset.json`, else those in a `.cls` beside each image.

    A `.json` beside each image is read if a person names a key of it: of images elsewhere it costs a request each.

    Raises:
        BadRequestError: the images are COCO's, which have no classes, or several files name labels, and `column` is
            not None.
    """
    if others := list(filter(is_data_file, files.names)):
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        said = f"packing its images, and not those in {printable(others[0])}{more}: name these to pack them"
        source = replace(source, note="; ".join(filter(None, (source.note, said))))
    source = replace(source, beside=files)
    if column is None:
        return source
    if any(map(_COCO.fullmatch, files.names)):
        raise BadRequestError(
            f"{files.where} is COCO: an image shows several objects, and has no class. Pack one folder of images, such "
            "as train2017, or add --split train --no-classes"
        )
    tables = [name for name in files.names if name.rpartition("/")[2] == DATASET_JSON]
    # A person who names a column means another one than the only one here.
    if column or not tables:
        return _labelled_by_sidecars(source, files, column)
    with members.refusing(f"{files.where}: {tables[0]}"):
        found = json_of(text_of(files.read(tables[0])))
        if not isinstance(found, dict) or not found.get("labels"):
            return _labelled_by_sidecars(source, files, column)
        if len(tables) > 1:
            said = f"{files.where} has several tables of labels, {tables[0]}, {tables[1]} …"
            raise BadRequestError(f"{said}: pack one of their folders, or use --no-classes")
        folder = tables[0].removesuffix(DATASET_JSON)
        table = labels_of_pairs(tables[0], [(folder + name, label) for name, label in pairs_in(found)])

    def listed() -> Iterator[Member]:
        return (member for member in source.listed() if member.name != tables[0])

    return replace(source, listed=listed, table=table)


def _labelled_by_sidecars(source: Source, files: Files, column: str) -> Source:
    suffixes = sidecars(column)[:1]
    if not any(name.lower().endswith(suffixes) for name in files.names):
        return source
    return replace(
        source, with_labels=partial(with_sidecars, source.where, source.listed, suffixes, column, adjacent=False)
    )

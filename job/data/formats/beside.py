"""The files beside a source's images that say what the images are: the labels of StyleGAN and EDM, COCO's objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from job.data import members
from job.data.labels import table_in
from job.data.members import Member
from job.data.source import Files, Source
from job.data.splits import is_data_file
from job.exits import BadRequestError
from job.progress import printable

DATASET_JSON = "dataset.json"
"""The table of labels that StyleGAN's and EDM's `dataset_tool.py` writes (Karras et al. 2022)."""

_TABLES = (".csv", ".tsv", ".jsonl")
_COCO = re.compile(r"(?:.*/)?annotations/(?:instances|captions|person_keypoints|panoptic|stuff)_.*\.json")


def labelled_beside(source: Source, files: Files, column: str | None) -> Source:
    """Returns the images of a source with the labels of a `dataset.json`, if there is one.

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
        return replace(source, unchosen=tuple(f"{name}:COLUMN" for name in files.names if name.endswith(_TABLES)))
    with members.refusing(f"{files.where}: {tables[0]}"):
        content = files.read(tables[0])
        found = members.parsed_json(content)
        if not isinstance(found, dict) or not found.get("labels"):
            return source
        if len(tables) > 1:
            said = f"{files.where} has several tables of labels, {tables[0]}, {tables[1]} …"
            raise BadRequestError(f"{said}: pack one of their folders, or use --no-classes")
        table = table_in(tables[0], content)

    def listed() -> Iterator[Member]:
        others = (member for member in source.listed() if member.name != tables[0])
        return (replace(member, label=table.of(member.name)) for member in others)

    return replace(source, listed=listed)

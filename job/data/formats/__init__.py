"""Formats that keep many images in a file, and how each is recognised by the names of its files.

A reader returns a `Source` whose members have their labels, or None if it sees no files of its format. It imports the
library of its format late, and reads nothing that could execute code.
"""

from __future__ import annotations

from collections.abc import Callable

from job.data.formats.arrays import array_source
from job.data.formats.binary import cifar_source, idx_source
from job.data.formats.lsun import lsun_source
from job.data.formats.tables import table_source
from job.data.formats.tfrecords import tfrecord_source
from job.data.members import Files, Source

_READERS: tuple[Callable[[Files, str | None], Source | None], ...] = (
    idx_source,
    cifar_source,
    lsun_source,
    tfrecord_source,
    table_source,
    # Other formats may have statistics in an .npz beside them.
    array_source,
)


def recognised(files: Files, column: str | None) -> Source | None:
    """Returns the images of a format that is not a folder or an archive; None if the names say nothing.

    Args:
        files: the files of the place.
        column: the label to take where a format has several; empty for the usual one, None for no labels.

    Raises:
        BadRequestError: there are several labels, or a library is missing.
    """
    return next(filter(None, (reader(files, column) for reader in _READERS)), None)

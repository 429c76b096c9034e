"""The keys of a dataset's images: the names of their files in the tars, up to the first dot.

The offset tables tell where an image lies, and the tar header before it holds the name. A packed dataset has ascending
keys, the numbers of the images in its source; tars that are indexed in place have any. A name that does not fit the
plain header is cut.
"""

from __future__ import annotations

import tarfile
from bisect import bisect_left
from itertools import pairwise

import numpy as np

from job.data.labels import SAMPLE_KEY
from job.data.order import Int64s
from job.data.shard_source import ShardSource
from job.exits import BadDataError, MissingInputError, did_you_mean
from job.progress import Progress, printable


def keys_of(source: ShardSource, indices: Int64s) -> list[str]:
    """Returns the keys of the images `indices`, int64 [b], each from one read of 512 bytes.

    Raises:
        BadDataError: a tar in the bucket is damaged.
    """
    return [_keys(source, range(index, index + 1))[0] for index in indices.tolist()]


def find_image(source: ShardSource, key: str) -> int:
    """Returns the index of the image with a key: of a packed dataset by bisection, else by reading all headers.

    Raises:
        MissingInputError: no image has it; the message has a key that is like it.
        BadDataError: a tar in the bucket is damaged.
    """
    if not source.index.is_foreign:
        index = bisect_left(range(source.index.images - 1), key, key=lambda one: _keys(source, range(one, one + 1))[0])
        (found,) = keys_of(source, np.array([index]))
        if found == key:
            return index
        hint = f": the nearest one is {found!r}"
    else:
        known = list[str]()
        with Progress("reading names", total=source.index.images) as bar:
            for first, last in pairwise(source.starts.tolist()):
                known += _keys(source, range(first, last))
                if key in known[first:]:
                    return known.index(key, first)
                bar.update(last)
        hint = did_you_mean(key, known)
    raise MissingInputError(f"no image of {source.index.name}-{source.index.size} has the key {key!r}{hint}")


def _keys(source: ShardSource, indices: range) -> list[str]:
    """Returns the keys of consecutive images of one shard."""
    keys = list[str]()
    shard = int(np.searchsorted(source.starts, indices.start, side="right")) - 1
    with source.open_unverified(shard) as file:
        for offset in source.records(np.array(indices))["offset"].tolist():
            try:
                file.seek(offset - tarfile.BLOCKSIZE)
                name = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
            except (tarfile.HeaderError, ValueError):
                where = f"{source.uri(shard)} has no file at byte {offset}"
                raise BadDataError(f"{where}, where its index says one: {source.remedy}") from None
            match = SAMPLE_KEY.fullmatch(name)
            keys.append(printable(match[1] if match else name))
    return keys

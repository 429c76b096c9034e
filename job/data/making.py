"""Makes a dataset in a bucket of pieces of work, however often it is interrupted.

Each shard is a piece (`job.coordination.pieces`). The index, created once all pieces are there, makes the dataset
exist.
"""

from __future__ import annotations

import abc
import uuid
from collections.abc import Sequence
from contextlib import suppress

from job.coordination.pieces import RECORDS, WHOLE, Advance, Made, OtherWorkError, PieceRecord, Pieces, Slice
from job.data import shards
from job.exits import BadRequestError
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store


class Packing(abc.ABC):
    """A source, and how its pieces become the shards of a dataset.

    Attributes:
        key: the dataset's folder in the bucket.
        where: the source, for messages.
        title: of the progress bar.
        unit: of the sizes.
        sizes: the size of each piece.
        fingerprint: SHA-256 of all that decides the shards.
        held_out_key: a dataset that must be there first, since a run on this one looks for it; empty for none.
        equal_bytes: whether every machine makes the same bytes.
    """

    key = where = title = fingerprint = held_out_key = ""
    unit = "images"
    sizes: Sequence[float] = ()
    equal_bytes = True

    @abc.abstractmethod
    def made(self, number: int, advance: Advance) -> Made:
        """Makes a piece."""

    @abc.abstractmethod
    def publish(self, dataset: Store, records: Sequence[PieceRecord]) -> None:
        """Creates the index, which makes the dataset exist, and deletes shards that it does not name."""


def make_dataset(bucket: Store, packing: Packing, slice_text: str, stop: Stop) -> shards.DatasetIndex | None:
    """Makes a dataset, or resumes it.

    Returns:
        The index as it lies in the bucket, or None while other machines are still making pieces.

    Raises:
        BadRequestError: something else lies there already.
        BadDataError: a piece was damaged; the same command makes it again.
        StoppedError: `stop` said so; whole pieces are saved.
    """
    dataset, share = bucket.sub(packing.key), Slice.parse(slice_text)
    way = f"choose another name, or {shards.deleting(bucket, packing.key)} and type this command again"
    pieces = Pieces(
        dataset,
        packing.fingerprint,
        packing.sizes,
        share=share,
        result=shards.INDEX,
        equal_bytes=packing.equal_bytes,
    )
    try:
        if made := _made(bucket, packing):
            return made
        dataset.check_writable(f"{RECORDS}/{uuid.uuid4().hex}")
        pieces.make_missing(packing.made, packing.title, unit=packing.unit, stop=stop)
        if packing.held_out_key and not existing_index(bucket, packing.held_out_key):
            return None
        # Without a record: others are still making pieces, or have created the index and cleared up.
        with suppress(ObjectMissingError):
            packing.publish(dataset, pieces.whole_records(stop))
        if made := _made(bucket, packing):
            pieces.clear()
        elif share == WHOLE:
            raise BadRequestError(f"{dataset.uri} was deleted meanwhile: {way}")
        return made
    except OtherWorkError:
        raise BadRequestError(
            f"{dataset.uri} holds shards of other images than {packing.where} has now, or with other parameters: {way}"
        ) from None
    except ObjectExistsError as error:
        raise BadRequestError(f"{error}: another process packs something else there: {way}") from None


def existing_index(bucket: Store, key: str) -> shards.DatasetIndex | None:
    """Returns the index of a dataset; None if it is missing."""
    return shards.load_index(bucket, key) if bucket.exists(f"{key}/{shards.INDEX}") else None


def check_absent(bucket: Store, key: str, unless: object) -> None:
    """Checks that the bucket lacks a dataset, `unless` this process is one of several, or is to replace it.

    Raises:
        BadRequestError: it is there.
    """
    if not unless and (there := existing_index(bucket, key)):
        raise BadRequestError(
            f"{bucket.uri}/{key} is there already: {there.images:,} images of {there.source}, crop "
            f"{there.crop}. Choose another name, or delete it first: {shards.deleting(bucket, key)}"
        )


def _made(bucket: Store, packing: Packing) -> shards.DatasetIndex | None:
    """Returns the index of a dataset that is finished.

    Raises:
        OtherWorkError: it was made of something else.
    """
    index = existing_index(bucket, packing.key)
    if index and index.fingerprint != packing.fingerprint:
        raise OtherWorkError(packing.key)
    return index

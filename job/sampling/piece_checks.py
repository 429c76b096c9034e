"""Verifying batches of drawn images: each piece against its record, the records against the index. See `pieces`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from job.exits import BadDataError, BadRequestError
from job.runs.provenance import picture_problems
from job.sampling.names import SAMPLES
from job.sampling.pieces import (
    DRAWING,
    GRID,
    INDEX,
    READERS,
    RECORDS,
    Batch,
    Opening,
    PieceEntry,
    PieceRecord,
    piece_entry,
    record_key,
)
from job.store import ObjectMissingError, Store

_PIECE = re.compile(r"piece-(\d{5})(\.tar|/\d{9,18}\.png)")

Check = Callable[[], list[str]]
Compare = Callable[[str, str, int | None, str], list[str]]
"""What is wrong with the object at a key, of which another has the SHA-256 and the size in bytes."""


class BatchChecks:
    """The batches of a run.

    Attributes:
        problems: a line for each bad object that was found so far.
        leftovers: keys of pieces that killed processes left without a record.
    """

    def __init__(self, run: Store, keys: set[str], compare: Compare, attempt_ids: Mapping[int, str]) -> None:
        """Looks at nothing yet.

        Args:
            run: the run's folder.
            keys: of the run's objects.
            compare: looks at one that a record names.
            attempt_ids: see `picture_problems`.
        """
        self._run, self._compare, self._attempt_ids = run, compare, attempt_ids
        self._folders: dict[str, set[str]] = {}
        for key in keys:
            if folder := batch_of(key):
                self._folders.setdefault(folder, set()).add(key.removeprefix(f"{folder}/"))
        self.problems: list[str] = []
        self.leftovers: set[str] = set()

    def checks(self) -> Iterator[Check]:
        """What is left to be done; records and indices have been looked at when it ends."""
        for folder, keys in self._folders.items():
            yield from self._checks(folder, keys)

    def _checks(self, folder: str, keys: set[str]) -> Iterator[Check]:
        store = self._run.sub(folder)
        try:
            batch = Batch(store, Opening.load(store, DRAWING).drawing)
        except BadDataError as error:
            # Without it nobody knows what the others should be.
            self.problems.append(str(error))
            return
        except ObjectMissingError:
            self.problems.append(f"{store.uri_of(DRAWING)} is missing, though there are images of it")
            return
        known = {DRAWING, INDEX, GRID}
        entries: dict[int, PieceEntry] = {}
        unreadable: set[int] = set()
        for number, record in _records(batch, keys):
            known.add(key := record_key(number))
            if isinstance(record, str):
                self.problems.append(record)
                unreadable.add(number)
                continue
            entries[number] = piece_entry(record)
            for file in record.files:
                known.add(file.name)
                yield partial(self._compare, f"{folder}/{file.name}", file.sha256, file.bytes, f"{folder}/{key}")
        if GRID in keys:
            yield partial(picture_problems, self._run, f"{folder}/{GRID}", self._attempt_ids)
        self._look_at_index(batch, keys, entries)
        without_record = uncommitted(keys)
        self.leftovers |= {f"{folder}/{key}" for key in without_record}
        for key in keys - known - without_record:
            if (match := _PIECE.fullmatch(key)) and int(match[1]) in unreadable:
                # What is wrong is its record, which has been named.
                continue
            if not key.startswith(f"{RECORDS}/"):
                self.problems.append(f"{store.uri_of(key)} is no part of the run: move it elsewhere, or delete it")

    def _look_at_index(self, batch: Batch, keys: set[str], entries: dict[int, PieceEntry]) -> None:
        store = batch.store
        try:
            index = batch.index()
        except (BadDataError, BadRequestError) as error:
            self.problems.append(str(error))
            return
        if index is None:
            return
        for key in (GRID, *(record_key(number) for number in range(batch.drawing.pieces))):
            if key not in keys:
                self.problems.append(f"{store.uri_of(key)} is missing, though {INDEX} says that everything is there")
        if any(index.pieces[number] != entry for number, entry in entries.items()):
            self.problems.append(f"{store.uri_of(INDEX)} does not say what the records of its pieces say")


def _records(batch: Batch, keys: set[str]) -> Iterator[tuple[int, PieceRecord | str]]:
    """The records that are there, by number, or what is wrong with them."""

    def load(number: int) -> PieceRecord | str:
        try:
            return batch.load(number)
        except (BadDataError, BadRequestError) as error:
            return str(error)

    numbers = [number for number in range(batch.drawing.pieces) if record_key(number) in keys]
    with ThreadPoolExecutor(READERS) as pool:
        yield from zip(numbers, pool.map(load, numbers), strict=True)


def uncommitted(keys: Iterable[str]) -> set[str]:
    """Of the keys of a batch's folder, those of pieces without a record: whoever made them was killed, or is at it."""
    keys = set(keys)
    return {key for key in keys if (match := _PIECE.fullmatch(key)) and record_key(int(match[1])) not in keys}


def record_of(key: str) -> str:
    """Within the folder of its batch, the record of the piece that an object of a run is of, or is a part of."""
    match = _PIECE.fullmatch(key.removeprefix(f"{batch_of(key)}/"))
    assert match is not None, key
    return record_key(int(match[1]))


def batch_of(key: str) -> str:
    """The folder of the batch that an object of a run belongs to; nothing if it belongs to none."""
    parts = key.split("/")
    return "/".join(parts[:2]) if parts[0] == SAMPLES and len(parts) > 2 else ""

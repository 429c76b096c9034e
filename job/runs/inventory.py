"""The inventory of a run for its verification: its objects, its sound records, and the problems found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from job.exits import BadDataError
from job.pieces import PieceRecord
from job.processes.lease import LEASE_KEY, LeaseRecord
from job.runs.checkpoints import Average, Latest, Manifest
from job.runs.drawings import BatchIndex, DrawingRecord, FoundGrid, Provenance
from job.runs.layout import ObjectKind, located
from job.runs.readers import Reader
from job.runs.records import Attempt, Status, no_such_run, run_store
from job.runs.scores import Scores
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

PARALLEL_READS = 16
"""Small objects that are read at a time."""

RECORD_TYPES: dict[ObjectKind | None, type[Sealed]] = {
    ObjectKind.ATTEMPT: Attempt,
    ObjectKind.LEASE: LeaseRecord,
    ObjectKind.STATUS: Status,
    ObjectKind.LATEST: Latest,
    ObjectKind.MANIFEST: Manifest,
    ObjectKind.AVERAGE: Average,
    ObjectKind.READER: Reader,
    ObjectKind.PROVENANCE: Provenance,
    ObjectKind.FOUND_GRID: FoundGrid,
    ObjectKind.SCORES: Scores,
    ObjectKind.DRAWING: DrawingRecord,
    ObjectKind.RECORD: PieceRecord,
    ObjectKind.INDEX: BatchIndex,
}
"""Records, which carry their own hash. The hash of any other object, but for the configuration, is in one of these."""

SealedRecord = TypeVar("SealedRecord", bound=Sealed)


class Inventory:
    """One listing of a run. While it is checked, objects may be deleted, replaced or added.

    Attributes:
        bucket: of the run.
        run: the run's folder.
        sizes: of the objects in bytes, by key.
        places: the kinds of the objects and the other fields of their keys, by key.
        records: the sound ones, by key.
        problems: the first one of each object, by key.
    """

    def __init__(self, bucket: Store, name: str) -> None:
        """Lists the run and reads its records.

        Raises:
            MissingInputError: the bucket lacks the run.
        """
        self.bucket, self.run = bucket, run_store(bucket, name)
        self.sizes = {entry.key: entry.size_bytes for entry in self.run.list()}
        # A deleted run leaves its lease.
        if not self.sizes.keys() - {LEASE_KEY}:
            raise no_such_run(bucket, name)
        self.places = {key: located(key) for key in self.sizes}
        self.records: dict[str, Sealed] = {}
        self.problems: dict[str, str] = {}
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            list(pool.map(self._load, self.keys(*RECORD_TYPES)))

    def _load(self, key: str) -> None:
        with suppress(ObjectMissingError):
            try:
                self.records[key] = RECORD_TYPES[self.places[key].kind].load(self.run, key)
            except BadDataError as error:
                self.problems[key] = str(error)

    def keys(self, *kinds: ObjectKind | None) -> list[str]:
        """Returns the keys of the objects of these kinds."""
        return [key for key, place in self.places.items() if place.kind in kinds]

    def all(self, kind: type[SealedRecord]) -> dict[str, SealedRecord]:
        """Returns the sound records of a type, by key."""
        return {key: record for key, record in self.records.items() if isinstance(record, kind)}

    def bad(self, key: str, what: str) -> None:
        """Adds a problem of an object, unless it has one already."""
        self.problems.setdefault(key, f"{self.run.uri_of(key)} {what}")

    def missing(self, key: str, why: str) -> None:
        """Adds the problem that an object is missing, if it is."""
        if key not in self.sizes:
            self.bad(key, f"is missing, though {why}")

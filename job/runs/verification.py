"""Verification of a run: every object of its folder against its own hash, or against the hash in another object.

Records and pictures carry their own hash. Manifests hold the hashes of tensors and metrics, and records of pieces those
of images. Verification also reports objects that no record names: harmless leftovers of killed attempts, and objects
that are not part of the run. The page has no hash: `ddpm report` makes it again from the rest.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from job.exits import BadDataError
from job.pieces import PieceRecord
from job.processes.lease import LEASE_KEY, MAX_FENCE, LeaseRecord
from job.progress import Progress
from job.runs import records
from job.runs.checkpoints import LATEST_KEY, AverageRecord, Latest, Manifest, lost_manifest, sha256_of
from job.runs.layout import PICTURES, Located, ObjectKind, located
from job.runs.records import CONFIG_KEY, Attempt, Status
from job.runs.retention import Reader, leftovers
from job.runs.samples import FoundGrid, SampleSetIndex, SampleSetRecord, Scores, has_origin
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

PARALLEL_READS = 16
"""Small objects that are read at a time."""
HASHERS = 4

RECORD_TYPES: dict[ObjectKind | None, type[Sealed]] = {
    ObjectKind.ATTEMPT: Attempt,
    ObjectKind.LEASE: LeaseRecord,
    ObjectKind.STATUS: Status,
    ObjectKind.LATEST: Latest,
    ObjectKind.MANIFEST: Manifest,
    ObjectKind.AVERAGE: AverageRecord,
    ObjectKind.READER: Reader,
    ObjectKind.FOUND_GRID: FoundGrid,
    ObjectKind.SCORES: Scores,
    ObjectKind.SAMPLE_SET: SampleSetRecord,
    ObjectKind.RECORD: PieceRecord,
    ObjectKind.INDEX: SampleSetIndex,
}
"""Records, which carry their own hash."""


@dataclass(frozen=True)
class Findings:
    """The result of a verification."""

    problems: list[str]
    """A line for each bad object: its URI and the problem."""
    objects: int
    size_bytes: int
    leftovers: dict[str, int]
    """Sizes in bytes of the objects that killed attempts left, by key."""


@dataclass
class _Listing:
    """One listing of a run. While it is checked, objects may be deleted, replaced or added."""

    run: Store
    places: dict[str, Located]
    records: dict[str, Sealed] = field(default_factory=dict)
    """The sound ones, by key."""
    problems: dict[str, str] = field(default_factory=dict)
    """The first one of each object, by key."""

    def load(self, key: str) -> None:
        """Loads a record, unless it has gone since."""
        with suppress(ObjectMissingError):
            try:
                self.records[key] = RECORD_TYPES[self.places[key].kind].load(self.run, key)
            except BadDataError as error:
                self.problems[key] = str(error)

    def bad(self, key: str, what: str) -> None:
        """Adds a problem of an object, unless it has one already."""
        self.problems.setdefault(key, f"{self.run.uri_of(key)} {what}")


def verify_run(bucket: Store, name: str) -> Findings:
    """Checks every object of a run, also while it trains.

    Raises:
        MissingInputError: the bucket lacks the run.
    """
    run = records.run_store(bucket, name)
    sizes = {entry.key: entry.size_bytes for entry in run.list()}
    # A deleted run leaves its lease.
    if not sizes.keys() - {LEASE_KEY}:
        raise records.no_such_run(bucket, name)
    listing = _Listing(run, {key: located(key) for key in sizes})
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        list(pool.map(listing.load, [key for key, place in listing.places.items() if place.kind in RECORD_TYPES]))
    _check_config(listing)
    manifests = [place.checkpoint for place in listing.places.values() if place.kind is ObjectKind.MANIFEST]
    if lost := lost_manifest(run, manifests):
        listing.problems[LATEST_KEY] = lost
    named = {key: (by, sha256) for by in listing.records for key, sha256 in _named_by(listing, by).items()}
    left = leftovers(run, listing.places, MAX_FENCE + 1)
    for key, place in listing.places.items():
        if place.kind is None:
            listing.bad(key, "is not part of the run: move it elsewhere, or delete it")
    hashed = {key: ("", "") for key, place in listing.places.items() if place.kind in PICTURES} | named
    bar = Progress(f"verifying {name}", total=len(hashed), unit="objects")
    with bar, ThreadPoolExecutor(HASHERS) as pool:
        for done, _ in enumerate(pool.map(lambda key: _check_object(listing, key, *hashed[key]), hashed), 1):
            bar.update(done)
    size_bytes = sum(sizes.values())
    return Findings(
        sorted(listing.problems.values()), len(sizes), size_bytes, {key: sizes[key] for key in sorted(left)}
    )


def _check_config(listing: _Listing) -> None:
    """Reports a configuration that is damaged or missing, and changes of the last attempt that are invalid."""
    run, config = listing.run, None
    try:
        if (config := records.load_config(run)) is not None:
            records.as_last_changed(run, config)
    except BadDataError as error:
        key = ObjectKind.ATTEMPT.key(fence=records.attempt_fences(run)[-1]) if config else CONFIG_KEY
        listing.problems.setdefault(key, str(error))
        return
    # A new attempt takes the lease and measures the bucket before it stores the configuration.
    if config is None and {place.kind for place in listing.places.values()} - {ObjectKind.LEASE, ObjectKind.PROBE}:
        listing.bad(CONFIG_KEY, "is missing, though there are other objects of the run")


def _named_by(listing: _Listing, by: str) -> dict[str, str]:
    """Returns the objects that must be there by a record, with their SHA-256; an empty one if it does not say."""
    record, folder = listing.records[by], listing.places[by].folder
    named: dict[str, str] = {}
    match record:
        case Attempt(previous=int(previous)):
            named = {ObjectKind.ATTEMPT.key(fence=previous): ""}
        case Manifest():
            named = record.objects
        case AverageRecord():
            named = {file.key: file.sha256 for file in record.files}
        case PieceRecord():
            named = {file.key: file.sha256 for file in record.files} | {ObjectKind.SAMPLE_SET.key(folder=folder): ""}
        case SampleSetIndex():
            pieces = (ObjectKind.RECORD.key(folder=folder, piece=number) for number in range(len(record.pieces)))
            named = dict.fromkeys((ObjectKind.GRID.key(folder=folder), *pieces), "")
    if isinstance(record, Manifest | Status):
        named = named | {ObjectKind.ATTEMPT.key(fence=record.fence): ""}
    return named


def _check_object(listing: _Listing, key: str, by: str, sha256: str) -> None:
    """Reports an object that is missing, or whose bytes differ from those of its hash, in itself or in `by`."""
    run, kind = listing.run, located(key).kind
    try:
        if kind in PICTURES:
            is_whole = has_origin(run.read(key).data)
        elif sha256:
            with run.open(key) as file:
                is_whole = sha256_of(file) == sha256
        else:
            is_whole = key in listing.places or run.exists(key)
    except ObjectMissingError:
        is_whole = False
    # An object may have been deleted by the rules since it was listed, with the one that names it.
    if is_whole or (by and not run.exists(by)) or (not by and not run.exists(key)):
        return
    if not run.exists(key):
        listing.bad(key, f"is missing, though {by} names it")
    else:
        listing.bad(key, f"is corrupt, or another program wrote it: its SHA-256 is not the one in {by or 'itself'}")

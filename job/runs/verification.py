"""Verifying a run: every object of its folder against the hash that it carries itself, or that another has of it.

`layout` says what each object is. Records carry their own hash; tensors and metrics have it in manifests, pieces of
images in their records, pictures in the record of where they come from. What nothing names is told as well: what killed
attempts left behind, which harms nobody, and what is no part of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from job.config import RunConfig
from job.data.shards import load_index
from job.exits import BadDataError, JobError, MissingInputError
from job.runs import records
from job.runs.checkpoints import LATEST, PARALLEL_READS, Latest, Manifest, load_manifest, lost_manifest, manifest_key
from job.runs.layout import MAX_IMAGES_SEEN, PICTURES, SAMPLES, CheckpointRef, Kind, Located, located
from job.runs.lease import LEASE, LeaseRecord
from job.runs.pictures import LOSS_FIGURE, Provenance, denoising_key, label_of, run_grid_key
from job.runs.pieces import BatchIndex, Opening, PieceRecord, piece_entry
from job.runs.records import CONFIG, STATUS, Attempt, Status, attempt_key
from job.runs.retention import Reader, Retention, leftovers
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

BLOCK_BYTES = 4 << 20
HASHERS = 4

RECORD_TYPES: dict[Kind, type[Sealed]] = {
    Kind.ATTEMPT: Attempt,
    Kind.LEASE: LeaseRecord,
    Kind.STATUS: Status,
    Kind.LATEST: Latest,
    Kind.MANIFEST: Manifest,
    Kind.READER: Reader,
    Kind.PROVENANCE: Provenance,
    Kind.DRAWING: Opening,
    Kind.RECORD: PieceRecord,
    Kind.INDEX: BatchIndex,
}
"""What carries its own hash. Of all else, but for the configuration, one of these has it."""

SealedRecord = TypeVar("SealedRecord", bound=Sealed)


@dataclass
class Findings:
    """What came of it."""

    problems: list[str] = field(default_factory=list)
    """A line for each bad object: its URI and what is wrong with it."""
    objects: int = 0
    size_bytes: int = 0
    leftovers: dict[str, int] = field(default_factory=dict)
    """Sizes in bytes of what killed attempts left behind, by key."""


def verify_run(bucket: Store, name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Checks every object of a run, also while it trains.

    Args:
        bucket: where it lies.
        name: of the run.
        progress: called with the objects checked so far and in all.

    Raises:
        MissingInputError: there is no such run.
    """
    return _Verification(bucket, name, progress).findings()


def checkpoint_problems(run: Store, ref: CheckpointRef) -> list[str]:
    """What is wrong with one checkpoint: a line for each bad object; none if it can be restored."""
    try:
        names = _named_by(load_manifest(run, ref))
    except (BadDataError, ObjectMissingError) as error:
        return [str(error)]
    return _differing(run, names)


class _Named(NamedTuple):
    """What one object says about another."""

    by: str
    sha256s: Collection[str]
    """One for all but pictures, which may be drawn anew."""
    size_bytes: int | None = None


def _named_by(manifest: Manifest) -> dict[str, _Named]:
    by = manifest_key(manifest.ref)
    names = {f"{manifest.ref.key}/{file.name}": _Named(by, [file.sha256], file.bytes) for file in manifest.files}
    for segment in manifest.metric_segments:
        names[segment.key] = _Named(by, [segment.sha256])
        names[segment.events_key] = _Named(by, [segment.events_sha256])
    return names


def _differing(
    run: Store, names: Mapping[str, _Named], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """A line for each object that is not what another says; for `progress` see `verify_run`."""
    owners = {sha256: key for key, name in names.items() for sha256 in name.sha256s}

    def problem(key: str) -> str:
        name, uri, digest, size_bytes = names[key], run.uri_of(key), hashlib.sha256(), 0
        try:
            with run.open(key) as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size_bytes += len(block)
        except ObjectMissingError:
            # What was retired since it was listed is not missed.
            return f"{uri} is missing, though {name.by} names it" if run.exists(name.by) else ""
        sha256 = digest.hexdigest()
        # A picture may have been drawn anew since the run was listed.
        if sha256 in name.sha256s or run.exists(Kind.PROVENANCE.key(of=key, sha256=sha256)):
            return ""
        if owner := owners.get(sha256):
            return f"{uri} holds what belongs to {owner}"
        if not name.sha256s:
            return f"{uri} is rotten, or was put there by something else: nothing in {name.by} has its SHA-256"
        if name.size_bytes not in (None, size_bytes):
            return f"{uri} has {size_bytes:,} bytes instead of {name.size_bytes:,}"
        return f"{uri} is rotten: its SHA-256 is not the one in {name.by}" if size_bytes else f"{uri} is empty"

    problems = []
    with ThreadPoolExecutor(HASHERS) as pool:
        for done, found in enumerate(pool.map(problem, names), 1):
            problems.append(found)
            progress(done, len(names))
    return [*filter(None, problems)]


class _Verification:
    """One look at a run. What is listed once may be retired, written over or joined by more while it is checked."""

    def __init__(self, bucket: Store, name: str, progress: Callable[[int, int], None]) -> None:
        self._bucket, self._progress, self._run = bucket, progress, records.run_store(bucket, name)
        self._sizes = {entry.key: entry.size_bytes for entry in self._run.list()}
        # A lease alone is what is left of a run that was deleted.
        if not self._sizes.keys() - {LEASE}:
            raise MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")
        self._places = {key: place for key in self._sizes if (place := located(key))}
        self._records: dict[str, Sealed] = {}
        """Those that are sound, in their place and this run's."""
        self._problems: list[str] = []
        self._missed: dict[str, str] = {}

    def findings(self) -> Findings:
        """Checks everything; in the order in which one thing is needed to judge the next."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            self._problems += filter(None, pool.map(self._load, self._keys(*RECORD_TYPES)))
        config = self._look_at_config()
        self._look_at_attempts()
        self._look_at_batches()
        manifests, readers = self._all(Manifest).values(), self._all(Reader)
        refs = [self._places[key].checkpoint for key in self._keys(Kind.MANIFEST)]
        named_metrics = self._names(manifests).keys() if len(manifests) == len(refs) else None
        over = [key for key, reader in readers.items() if reader.is_over]
        left = leftovers(self._places, 10**6, named_metrics, over)
        self._look_for_lost(config, refs, left)
        names = self._names(manifests)
        self._look_for_strangers(self._sizes.keys() - names.keys() - left.keys())
        self._problems += _differing(self._run, names, self._progress)
        return Findings(
            sorted([*self._problems, *self._missed.values()]),
            len(self._sizes),
            sum(self._sizes.values()),
            {key: self._sizes[key] for key in sorted(left)},
        )

    def _keys(self, *kinds: Kind) -> list[str]:
        return [key for key, place in self._places.items() if place.kind in kinds]

    def _all(self, kind: type[SealedRecord]) -> dict[str, SealedRecord]:
        return {key: record for key, record in self._records.items() if isinstance(record, kind)}

    def _bad(self, key: str, what: str) -> None:
        self._problems.append(f"{self._run.uri_of(key)} {what}")

    def _missing(self, key: str, why: str) -> None:
        if key not in self._sizes:
            self._missed.setdefault(key, f"{self._run.uri_of(key)} is missing, though {why}")

    def _load(self, key: str) -> str:
        """Loads a record; what is wrong with it, or nothing."""
        place = self._places[key]
        try:
            record = RECORD_TYPES[place.kind].load(self._run, key)
        except ObjectMissingError:
            return ""
        except BadDataError as error:
            return str(error)
        if not _is_in_place(record, place):
            return f"{self._run.uri_of(key)} is not in its place: it was written for another"
        self._records[key] = record
        return ""

    def _look_at_config(self) -> RunConfig | None:
        """The configuration with what was changed later, if that is known."""
        try:
            config = records.load_config(self._run)
        except BadDataError as error:
            self._problems.append(str(error))
            return None
        if config is None:
            # An attempt that begins takes the lease and measures the bucket first.
            if len(self._keys(Kind.LEASE, Kind.PROBE)) < len(self._sizes):
                self._missing(CONFIG, "there are other objects of the run")
            return None
        sha256 = hashlib.sha256(self._run.read(CONFIG).data).hexdigest()
        for key, attempt in self._all(Attempt).items():
            if attempt.config_file_sha256 != sha256:
                self._bad(key, "is another run's: it is about another configuration")
                del self._records[key]
        # Without what was changed later nobody knows which checkpoints are to be there; the damage has been told.
        with suppress(BadDataError):
            return records.as_last_changed(self._run, config)
        return None

    def _look_at_attempts(self) -> None:
        """Attempts against each other, and what says by which it was written against that attempt."""
        attempts = {attempt.fence: attempt for attempt in self._all(Attempt).values()}
        for key, record in list(self._records.items()):
            match record:
                case Attempt(previous=int(previous)):
                    self._missing(attempt_key(previous), f"attempt {record.fence} came after it")
                case Manifest() | Status() | Provenance():
                    self._missing(attempt_key(record.fence), f"{key} is of this attempt")
                    known = attempts.get(record.fence)
                    if known and record.attempt not in ("", known.id):
                        self._bad(key, f"is another run's: attempt {known.fence} of this one did not write it")
                        del self._records[key]
                case LeaseRecord():
                    known = attempts.get(record.fence)
                    if known and record.holder != known.holder:
                        self._bad(key, f"is another run's: attempt {known.fence} of this one did not hold it")

    def _look_at_batches(self) -> None:
        """Records of pieces against what is drawn, and the index against the records."""
        pieces: dict[str, dict[int, PieceRecord]] = {}
        for key, record in self._all(PieceRecord).items():
            pieces.setdefault(self._places[key].batch, {})[record.number] = record
        for batch in {place.batch for place in self._places.values() if place.batch}:
            drawing_key, index_key = Kind.DRAWING.key(batch=batch), Kind.INDEX.key(batch=batch)
            self._missing(drawing_key, "there are images of it")
            opening, index = self._records.get(drawing_key), self._records.get(index_key)
            for number, record in pieces.get(batch, {}).items():
                if isinstance(opening, Opening) and record.drawing != opening.drawing:
                    self._bad(
                        Kind.RECORD.key(batch=batch, piece=number), f"is about another drawing than {drawing_key}"
                    )
            if isinstance(index, BatchIndex):
                entries = {number: piece_entry(record) for number, record in pieces.get(batch, {}).items()}
                if any(entry != index.pieces[number] for number, entry in entries.items()):
                    self._bad(index_key, "does not say what the records of its pieces say")
                recorded = [Kind.RECORD.key(batch=batch, piece=number) for number in range(len(index.pieces))]
                for key in (Kind.GRID.key(batch=batch), *recorded):
                    self._missing(key, f"{index_key} says that everything is there")

    def _names(self, manifests: Iterable[Manifest]) -> dict[str, _Named]:
        """What manifests, records of pieces and records of where pictures come from say about other objects."""
        names: dict[str, _Named] = {}
        for manifest in manifests:
            names |= _named_by(manifest)
        for by, record in self._all(PieceRecord).items():
            folder = f"{SAMPLES}/{self._places[by].batch}"
            names |= {f"{folder}/{file.name}": _Named(by, [file.sha256], file.bytes) for file in record.files}
        drawn: dict[str, list[str]] = {}
        for place in self._places.values():
            drawn.setdefault(place.of, []).append(place.sha256)
        for key in self._keys(*PICTURES):
            names[key] = _Named(f"{Kind.PROVENANCE.folder}/{key}", drawn.get(key, []))
        return names

    def _look_for_strangers(self, unnamed: Iterable[str]) -> None:
        """What is no part of a run, or lies beside objects of something whole that does not name it."""
        whole: set[object] = {manifest.ref for manifest in self._all(Manifest).values()}
        whole |= {(self._places[key].batch, record.number) for key, record in self._all(PieceRecord).items()}
        for key in unnamed:
            place = self._places.get(key)
            if (
                place is None
                or (place.kind is Kind.TENSORS and place.checkpoint in whole)
                or (place.kind in (Kind.PIECE, Kind.IMAGE) and (place.batch, place.piece) in whole)
            ):
                self._bad(key, "is no part of the run: move it elsewhere, or delete it")

    def _look_for_lost(self, config: RunConfig | None, refs: list[CheckpointRef], left: Iterable[str]) -> None:
        """What a run like this one must have.

        An attempt commits in order, so a checkpoint before another of the same attempt was there, and so was one whose
        metrics another names. If the run's rules would not have retired it, somebody else deleted its manifest.
        A finished run has its last pictures; others may be deleted by whoever likes.
        """
        if self._keys(Kind.ATTEMPT):
            self._missing(LEASE, "there were attempts")
        if refs:
            self._missing(STATUS, "there are checkpoints")
        # Whoever was killed after the very first one had not said so yet.
        if len(refs) > 1:
            self._missing(LATEST, "there are checkpoints")
        # One that is rotten has been told.
        with suppress(BadDataError):
            if lost := lost_manifest(self._run, refs):
                self._problems.append(lost)
        if config is None:
            return
        # Without its dataset nobody knows where the run's epochs end.
        dataset_images = MAX_IMAGES_SEEN + 1
        with suppress(JobError):
            dataset_images = load_index(self._bucket, records.dataset_key_of(config)).images
        retention = Retention.of(config, dataset_images)
        committed = {segment.name for manifest in self._all(Manifest).values() for segment in manifest.metric_segments}
        for ref in {self._places[key].checkpoint for key in left if self._places[key].kind is Kind.TENSORS}:
            came_later = [other for other in refs if other.fence == ref.fence and other > ref]
            if (came_later or str(ref) in committed) and ref not in retention.retire([*refs, ref]):
                self._missing(manifest_key(ref), "its files are there, and the run's rules keep it")
        status = self._records.get(STATUS)
        if isinstance(status, Status) and status.state == "finished" and dataset_images <= MAX_IMAGES_SEEN:
            label = label_of(status.images_seen, dataset_images, config.train.batch_size)
            for key in (run_grid_key(config, dataset_images, status.images_seen), denoising_key(label), LOSS_FIGURE):
                self._missing(key, "the run is finished")


def _is_in_place(record: Sealed, place: Located) -> bool:
    match record:
        case Attempt():
            return record.fence == place.fence
        case Manifest():
            return record.ref == place.checkpoint
        case Reader():
            return record.checkpoint == place.checkpoint.key
        case Provenance():
            return (record.key, record.picture_sha256) == (place.of, place.sha256)
        case PieceRecord():
            return record.number == place.piece
    return True

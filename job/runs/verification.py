"""Verifying a run: every object of its folder against the hash that it carries itself, or that another has of it.

`layout` says what each object is. Records carry their own hash; tensors and metrics have it in manifests, pieces of
images in their records, pictures in the record of where they come from. What nothing names is told as well: what killed
attempts left behind, which harms nobody, and what is no part of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from job.config import Drawing, RunConfig
from job.exits import BadDataError
from job.progress import Progress
from job.runs import records, samples
from job.runs.checkpoints import LATEST_KEY, Average, Latest, Manifest, lost_manifest, sha256_of
from job.runs.layout import MAX_IMAGES_SEEN, OF_CHECKPOINT, PICTURES, SAMPLES, ObjectKind, located
from job.runs.lease import LEASE_KEY, LeaseRecord
from job.runs.readers import Reader
from job.runs.records import CONFIG_KEY, STATUS_KEY, Attempt, Status
from job.runs.retention import Retention, leftovers
from job.runs.samples import BatchIndex, FoundGrid, Opening, PieceRecord, Provenance
from job.runs.scores import Scores
from job.sealed import Sealed, author_of
from job.store import ObjectMissingError, Store

HASHERS = 4
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
    ObjectKind.DRAWING: Opening,
    ObjectKind.RECORD: PieceRecord,
    ObjectKind.INDEX: BatchIndex,
}
"""What carries its own hash. Of all else, but for the configuration, one of these has it."""

SealedRecord = TypeVar("SealedRecord", bound=Sealed)


@dataclass(frozen=True)
class Findings:
    """What came of it."""

    problems: list[str]
    """A line for each bad object: its URI and what is wrong with it."""
    objects: int
    size_bytes: int
    leftovers: dict[str, int]
    """Sizes in bytes of what killed attempts left behind, by key."""


def verify_run(bucket: Store, name: str) -> Findings:
    """Checks every object of a run, also while it trains.

    Raises:
        MissingInputError: there is no such run.
    """
    return _Verification(bucket, name).findings()


class _Named(NamedTuple):
    """What one object says about another."""

    by: str
    sha256s: list[str]
    """One for all but pictures, which may be drawn anew."""


class _Verification:
    """One look at a run. What is listed once may be retired, written over or joined by more while it is checked."""

    def __init__(self, bucket: Store, name: str) -> None:
        self._bucket, self._name, self._run = bucket, name, records.run_store(bucket, name)
        self._sizes = {entry.key: entry.size_bytes for entry in self._run.list()}
        # A lease alone is what is left of a run that was deleted.
        if not self._sizes.keys() - {LEASE_KEY}:
            raise records.no_such_run(bucket, name)
        self._places = {key: located(key) for key in self._sizes}
        self._records: dict[str, Sealed] = {}
        """Those that are sound, in their place and this run's."""
        self._own = Drawing()  # type: ignore[call-arg]
        """How the run drew when it began."""
        self._problems: dict[str, str] = {}
        """By key, the first that was found."""

    def findings(self) -> Findings:
        """Checks everything; in the order in which one thing is needed to judge the next."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            list(pool.map(self._load, self._keys(*RECORD_TYPES)))
        config = self._look_at_config()
        self._look_at_attempts()
        self._look_at_page()
        self._look_at_batches()
        left = leftovers(self._run, self._places, 10**6)
        self._look_for_lost(config, left)
        names = self._names()
        self._look_for_strangers(self._sizes.keys() - names.keys() - left.keys())
        bar = Progress(f"verifying {self._name}", total=len(names), unit="objects")
        with bar, ThreadPoolExecutor(HASHERS) as pool:
            for done, _ in enumerate(pool.map(self._compare, names, names.values()), 1):
                bar.update(done)
        return Findings(
            sorted(self._problems.values()),
            len(self._sizes),
            sum(self._sizes.values()),
            {key: self._sizes[key] for key in sorted(left)},
        )

    def _keys(self, *kinds: ObjectKind | None) -> list[str]:
        return [key for key, place in self._places.items() if place.kind in kinds]

    def _all(self, kind: type[SealedRecord]) -> dict[str, SealedRecord]:
        return {key: record for key, record in self._records.items() if isinstance(record, kind)}

    def _bad(self, key: str, what: str) -> None:
        self._problems.setdefault(key, f"{self._run.uri_of(key)} {what}")

    def _missing(self, key: str, why: str) -> None:
        if key not in self._sizes:
            self._bad(key, f"is missing, though {why}")

    def _foreign(self, key: str, why: str) -> None:
        self._bad(key, f"is another run's: {why}")
        del self._records[key]

    def _load(self, key: str) -> None:
        with suppress(ObjectMissingError):
            try:
                self._records[key] = RECORD_TYPES[self._places[key].kind].load(self._run, key)
            except BadDataError as error:
                self._problems[key] = str(error)

    def _compare(self, key: str, named: _Named) -> None:
        """Compares an object with what others say about it."""
        (by, sha256s), run = named, self._run
        try:
            with run.open(key) as file:
                sha256 = sha256_of(file)
        except ObjectMissingError:
            # What was retired since it was listed is not missed.
            if run.exists(by):
                self._bad(key, f"is missing, though {by} names it")
            return
        # A picture may have been drawn anew since the run was listed.
        if sha256 not in sha256s and not run.exists(ObjectKind.PROVENANCE.key(of=key, sha256=sha256)):
            self._bad(key, f"is rotten, or was put there by something else: nothing in {by} has its SHA-256")

    def _look_at_config(self) -> RunConfig | None:
        """The configuration with what was changed later, if that is known."""
        try:
            config = records.load_config(self._run)
        except BadDataError as error:
            self._problems[CONFIG_KEY] = str(error)
            return None
        if config is None:
            # An attempt that begins takes the lease and measures the bucket first.
            if len(self._keys(ObjectKind.LEASE, ObjectKind.PROBE)) < len(self._sizes):
                self._missing(CONFIG_KEY, "there are other objects of the run")
            return None
        self._own = config.sample
        sha256 = records.hash_of_config(self._run)
        for key, attempt in self._all(Attempt).items():
            if attempt.config_sha256 != sha256:
                self._foreign(key, "it is about another configuration")
        try:
            return records.as_last_changed(self._run, config)
        except BadDataError as error:
            # Without what was changed later nobody knows which checkpoints are to be there.
            self._problems.setdefault(max(self._keys(ObjectKind.ATTEMPT)), str(error))
            return None

    def _look_at_attempts(self) -> None:
        """Attempts against each other, and what says by which it was written against that attempt."""
        ids = {attempt.fence: attempt.id for attempt in self._all(Attempt).values()}
        for key, record in list(self._records.items()):
            match record:
                case Attempt(previous=int(previous)):
                    self._missing(ObjectKind.ATTEMPT.key(fence=previous), f"attempt {record.fence} came after it")
                case Manifest() | Average() | Status() | Provenance():
                    self._missing(ObjectKind.ATTEMPT.key(fence=record.fence), f"{key} is of this attempt")
                    if record.attempt not in ("", ids.get(record.fence, record.attempt)):
                        self._foreign(key, f"attempt {record.fence} of this one did not write it")
                case LeaseRecord() if record.holder != ids.get(record.fence, record.holder):
                    self._foreign(key, f"attempt {record.fence} of this one did not hold it")

    def _look_at_page(self) -> None:
        """It vouches for nothing, and says itself who wrote it."""
        ids = {str(attempt.fence): attempt.id for attempt in self._all(Attempt).values()}
        for key in self._keys(ObjectKind.PAGE):
            with suppress(ObjectMissingError):
                author = author_of(self._run.read(key).data)
                fence, _, attempt = (author or "").partition("/")
                if author is None:
                    self._bad(key, "is rotten: it does not match its own SHA-256; `ddpm report` writes it anew")
                elif attempt != ids.get(fence, attempt):
                    self._bad(key, f"is another run's: attempt {fence} of this one did not write it")

    def _look_at_batches(self) -> None:
        """Records of pieces against what is drawn, and the index against the records."""
        for key, record in self._all(PieceRecord).items():
            batch = self._places[key].batch
            drawing_key, index_key = ObjectKind.DRAWING.key(batch=batch), ObjectKind.INDEX.key(batch=batch)
            opening, index = self._records.get(drawing_key), self._records.get(index_key)
            if isinstance(opening, Opening) and record.drawing != opening.drawing:
                self._bad(key, f"is about another drawing than {drawing_key}")
            if isinstance(index, BatchIndex) and record.in_index not in index.pieces[record.number : record.number + 1]:
                self._bad(index_key, "does not say what the records of its pieces say")
        for key, index in self._all(BatchIndex).items():
            batch = self._places[key].batch
            recorded = [ObjectKind.RECORD.key(batch=batch, piece=number) for number in range(len(index.pieces))]
            for other in (ObjectKind.GRID.key(batch=batch), *recorded):
                self._missing(other, f"{key} says that everything is there")
        drawn = (place for place in self._places.values() if place.kind and place.kind.folder == SAMPLES)
        for batch in {place.batch for place in drawn if place.batch}:
            self._missing(ObjectKind.DRAWING.key(batch=batch), "there are images of it")

    def _names(self) -> dict[str, _Named]:
        """What manifests, records of pieces and records of where pictures come from say about other objects."""
        names: dict[str, _Named] = {}
        for by, manifest in self._all(Manifest).items():
            names |= {key: _Named(by, [sha256]) for key, sha256 in manifest.objects.items()}
        for by, record in (self._all(PieceRecord) | self._all(Average)).items():
            names |= {file.key: _Named(by, [file.sha256]) for file in record.files}
        names |= {key: _Named(f"{ObjectKind.PROVENANCE.folder}/{key}", []) for key in self._keys(*PICTURES)}
        for place in self._places.values():
            if place.of in names:
                names[place.of].sha256s.append(place.sha256)
        return names

    def _look_for_strangers(self, unnamed: Iterable[str]) -> None:
        """What is no part of a run, or lies beside objects of something whole that does not name it."""
        for key in unnamed:
            place, by = self._places[key], ""
            if place.kind in OF_CHECKPOINT:
                by = place.checkpoint.manifest_key
            elif place.kind is ObjectKind.AVERAGE_TENSORS:
                by = ObjectKind.AVERAGE.key(checkpoint=place.checkpoint, group=place.group)
            elif place.kind in (ObjectKind.PIECE, ObjectKind.IMAGE):
                by = ObjectKind.RECORD.key(batch=place.batch, piece=place.piece)
            if place.kind is None or by in self._records:
                self._bad(key, "is no part of the run: move it elsewhere, or delete it")

    def _look_for_lost(self, config: RunConfig | None, left: Iterable[str]) -> None:
        """What a run like this one must have.

        An attempt commits in order, so a checkpoint before another of the same attempt was there, and so was one whose
        metrics another names. If the run's rules would not have retired it, somebody else deleted its manifest.
        A finished run has its last pictures; others may be deleted by whoever likes.
        """
        refs = [self._places[key].checkpoint for key in self._keys(ObjectKind.MANIFEST)]
        if self._keys(ObjectKind.ATTEMPT):
            self._missing(LEASE_KEY, "there were attempts")
        if refs:
            self._missing(STATUS_KEY, "there are checkpoints")
        # Whoever was killed after the very first one had not said so yet.
        if len(refs) > 1:
            self._missing(LATEST_KEY, "there are checkpoints")
        if lost := lost_manifest(self._run, refs):
            self._problems[LATEST_KEY] = lost
        if config is None:
            return
        dataset_images = records.dataset_images_of(self._bucket, config)
        retention = Retention(config, dataset_images)
        committed = {located(key).checkpoint for manifest in self._all(Manifest).values() for key in manifest.objects}
        for ref in {self._places[key].checkpoint for key in left if self._places[key].kind in OF_CHECKPOINT}:
            came_later = [other for other in refs if other.fence == ref.fence and other > ref]
            if (came_later or ref in committed) and ref not in retention.retire([*refs, ref]):
                self._missing(ref.manifest_key, "its files are there, and the run's rules keep it")
        status = self._records.get(STATUS_KEY)
        if isinstance(status, Status) and status.state == "finished" and dataset_images <= MAX_IMAGES_SEEN:
            images_seen, batch_size = status.images_seen, config.train.batch_size
            label, how = samples.label_of(images_seen, dataset_images, batch_size), config.sample.name(self._own)
            for key in (samples.grid_key(label, how), samples.denoising_key(label, how), samples.LOSS_FIGURE):
                self._missing(key, "the run is finished")

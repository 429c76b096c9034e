"""`ddpm runs verify`, `prune` and `delete`, `ddpm data delete`: every object of a run, and what of it may go.

Verification checks each object against its own hash, or against the hash in another object. Records and pictures carry
their own hash. Manifests hold the hashes of tensors and metrics, and records of pieces those of images. It also reports
objects that no record names: harmless leftovers of killed attempts, and objects that are not part of the run. The page
has no hash: `ddpm report` makes it again from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, TypeVar

from ddpm.image_size import ImageSize
from job.config import RunConfig
from job.coordination.lease import LEASE_KEY, MAX_FENCE, Lease, LeaseRecord, load_lease
from job.coordination.pieces import PieceRecord
from job.coordination.sealed import Sealed
from job.data import shards
from job.exits import BadDataError, BadRequestError, JobError, LostRunError
from job.printing import print_json
from job.progress import Progress, note, say
from job.runs import records
from job.runs.checkpoints import (
    LATEST_KEY,
    AverageRecord,
    Latest,
    Manifest,
    list_checkpoints,
    lost_manifest,
    newest_good,
    sha256_of,
)
from job.runs.layout import PICTURES, CheckpointRef, Located, ObjectKind, located
from job.runs.metric_rows import read_rows
from job.runs.records import CONFIG_KEY, Attempt, ImagesThatFit, Status
from job.runs.retention import (
    READING_SECONDS,
    Named,
    Reader,
    Retention,
    being_read,
    best_images_seen,
    delete_checkpoint,
    leftovers,
)
from job.runs.run import FoundGrid, SampleSetIndex, Scores, has_origin
from job.stop import NEVER, Stop
from job.store import Entry, ObjectMissingError, Store, open_store
from job.verbs.run_listing import run_names

T = TypeVar("T")

PARALLEL_READS = 16
"""Small objects that are read at a time."""
HASHERS = 4

RECORD_TYPES: dict[ObjectKind | None, type[Sealed]] = {
    ObjectKind.ATTEMPT: Attempt,
    ObjectKind.LEASE: LeaseRecord,
    ObjectKind.STATUS: Status,
    ObjectKind.LATEST: Latest,
    ObjectKind.FITTING: ImagesThatFit,
    ObjectKind.MANIFEST: Manifest,
    ObjectKind.AVERAGE: AverageRecord,
    ObjectKind.READER: Reader,
    ObjectKind.FOUND_GRID: FoundGrid,
    ObjectKind.SCORES: Scores,
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
    by_manifest: Named = {one.ref: set(one.objects) for one in listing.records.values() if isinstance(one, Manifest)}
    left = leftovers(run, listing.places, CheckpointRef(MAX_FENCE + 1, 0), by_manifest, being_read(run))
    for key, place in listing.places.items():
        if place.kind is None:
            listing.bad(key, "is not part of the run: move it elsewhere, or delete it")
    hashed = {key: ("", "") for key, place in listing.places.items() if place.kind in PICTURES} | named
    bar = Progress(f"verifying {name}", total=len(hashed), unit="objects")
    with bar, ThreadPoolExecutor(HASHERS) as pool:
        for done, _ in enumerate(pool.map(lambda key: _check_object(listing, key, *hashed[key]), hashed), 1):
            bar.update(done)
    left_bytes = {key: sizes[key] for key in sorted(left)}
    return Findings(sorted(listing.problems.values()), len(sizes), sum(sizes.values()), left_bytes)


def _check_config(listing: _Listing) -> None:
    """Reports a configuration that is damaged or missing, and changes of the last attempt that are invalid."""
    run, config = listing.run, None
    try:
        if (config := records.load_config(run)) is not None:
            records.as_last_changed(run, config)
            if sha256 := config.flat().get("model.sha256"):
                # As if the configuration were a record that names the file.
                key = ObjectKind.NETWORK.value
                _check_object(listing, key, CONFIG_KEY, sha256)
    except BadDataError as error:
        key = ObjectKind.ATTEMPT.key(fence=records.attempt_fences(run)[-1]) if config else CONFIG_KEY
        listing.problems.setdefault(key, str(error))


def _named_by(listing: _Listing, by: str) -> dict[str, str]:
    """Returns the objects that must be there by a record, with their SHA-256; an empty one if it does not say."""
    record, folder = listing.records[by], listing.places[by].folder
    match record:
        case Attempt(previous=int(fence)) | Status(fence=fence):
            return {ObjectKind.ATTEMPT.key(fence=fence): ""}
        case Manifest(fence=fence):
            return record.objects | {ObjectKind.ATTEMPT.key(fence=fence): ""}
        case AverageRecord() | PieceRecord():
            return {file.key: file.sha256 for file in record.files}
        case SampleSetIndex():
            pieces = (ObjectKind.RECORD.key(folder=folder, piece=number) for number in range(len(record.pieces)))
            return dict.fromkeys((ObjectKind.GRID.key(folder=folder), *pieces), "")
    return {}


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


def verify_named_run(bucket_uri: str, name: str, *, as_json: bool = False) -> None:
    """Checks every object of a run and prints a line for each bad one.

    Raises:
        MissingInputError: the bucket lacks the run.
        BadDataError: the run has bad objects.
    """
    bucket = open_store(bucket_uri)
    findings, uri = verify_run(bucket, name), records.run_store(bucket, name).uri
    checked = f"{findings.objects:,} objects, {findings.size_bytes:,} bytes"
    if as_json:
        print_json({"uri": uri, **asdict(findings)})
    else:
        for problem in findings.problems:
            print(problem)
        if findings.leftovers:
            left = f"{len(findings.leftovers):,} objects, {sum(findings.leftovers.values()):,} bytes"
            print(f"{uri}: killed attempts left {left}, which are harmless: `ddpm runs prune {name}` deletes them")
    if count := len(findings.problems):
        raise BadDataError(f"{uri}: {count:,} problem{'s' * (count > 1)} in {checked}; each is named above")
    if not as_json:
        print(f"{uri}: {checked}: all as they were written")


class Removal(NamedTuple):
    """A checkpoint or an object to delete."""

    key: str
    size_bytes: int
    why: str
    ref: CheckpointRef | None = None

    def __str__(self) -> str:
        return f"{self.key}  {self.size_bytes:,} bytes  {self.why}"


def prune_run(bucket_uri: str, name: str, *, keep_last: int | None, dry_run: bool) -> None:
    """Deletes what the run's rules do not keep, as training does, and prints a line for each removal.

    Args:
        bucket_uri: where the run lies.
        name: of the run.
        keep_last: how many of the newest checkpoints stay, instead of the run's `checkpoint.keep_last`.
        dry_run: only print, and do not take the lease.

    Raises:
        MissingInputError: the bucket lacks the run, or the dataset whose epochs its rules count.
        BadDataError: none of its checkpoints verifies; nothing was deleted.
        LostRunError: an attempt trains it.
        StoppedError: a signal came; the same command deletes the rest.
    """
    bucket, stop = open_store(bucket_uri), Stop().install()
    run = records.run_store(bucket, name)
    config = records.as_last_changed(run, records.existing_config(bucket, name))
    if keep_last is not None:
        config = config.updated({"checkpoint.keep_last": keep_last})
    # Before the lease is taken: an attempt that was suspended may wake and commit what it has uploaded.
    fence = _fence_at_work(run)
    if dry_run:
        found = _removals(bucket, run, config, fence)
        print(*found, sep="\n", end="\n" * bool(found))
    else:
        with closing(Lease.take(run, records.highest_fence(run), 0.0, stop, note)) as lease:
            with lease.unless_lost():
                found = _removals(bucket, run, config, fence)
            for removal in _while_leased("pruning", found, lease, stop):
                if _remove(run, removal):
                    say(str(removal))
            run.sweep()
    total_bytes, what = sum(removal.size_bytes for removal in found), "would go" if dry_run else "deleted"
    print(f"{run.uri}: {total_bytes:,} bytes {what}" if found else f"{run.uri}: there is nothing to prune")


def _fence_at_work(run: Store) -> int:
    """Returns the fence from which on attempts may still run: the highest, unless that attempt is certainly over.

    A holder of a higher fence is a command: it may have taken the lease of a silent attempt, which may wake.
    """
    highest = records.highest_fence(run)
    with suppress(BadDataError, ObjectMissingError):
        lease = load_lease(run)
        if lease.fence <= highest and (lease.released or lease.process.certainly_dead()):
            return highest + 1
    return highest


def _removals(bucket: Store, run: Store, config: RunConfig, fence: int) -> list[Removal]:
    """Lists the removals in their order, and deletes nothing. Attempts before `fence` are over.

    Raises:
        MissingInputError: the run's rules count epochs of a dataset that is missing.
        BadDataError: none of its checkpoints verifies.
    """
    sizes, keep = {entry.key: entry.size_bytes for entry in run.list()}, config.checkpoint
    why, dataset_images = f"not among the last {keep.keep_last}", records.dataset_images_of(bucket, config)
    if keep.keep_every_epochs or keep.keep_epochs:
        dataset_images = shards.load_index(bucket, records.dataset_key_of(config)).images
        why += ", nor of an epoch to keep"
    found, read = list[Removal](), being_read(run)
    if old := Retention(config, dataset_images).retire(list_checkpoints(run)):
        newest = newest_good(run)
        stays = read | ({newest.ref} if newest else set())
        best = best_images_seen(config, read_rows(run, newest.metrics)) if newest else -1
        for ref in old:
            if ref not in stays and ref.images_seen != best:
                size_bytes = sum(size for key, size in sizes.items() if key.startswith(f"{ref.key}/"))
                found.append(Removal(ref.key, size_bytes, why, ref))
    places = {key: located(key) for key in sizes}
    for key, who in leftovers(run, places, CheckpointRef(fence, 0), {}, read).items():
        # A sampler marks its checkpoint as being read before it makes its first piece.
        if not (read and places[key].folder):
            found.append(Removal(key, sizes[key], f"left behind by {who}"))
    return found


def _remove(run: Store, removal: Removal) -> bool:
    """Deletes an object or a checkpoint, and returns whether it did: a piece in use by a sampler stays.

    Samplers have no lease, but a mark that they read. Under this mark they look for a piece's record, and they create
    the record after everything that it names.
    """
    place = located(removal.key)
    if place.folder and (being_read(run) or run.exists(ObjectKind.RECORD.key(folder=place.folder, piece=place.piece))):
        return False
    if removal.ref is None:
        run.delete(removal.key)
    else:
        delete_checkpoint(run, removal.ref)
    return True


def delete_run(bucket_uri: str, name: str, *, certain: bool) -> None:
    """Deletes a run, or the rest of one whose deletion was stopped, and prints its size.

    Raises:
        BadRequestError: not `certain`; the message says how much would be deleted.
        MissingInputError: the bucket has no such run.
        LostRunError: a process trains it, or samples from it.
        StoppedError: a signal came; the same command deletes the rest.
    """
    bucket, stop = open_store(bucket_uri), Stop().install()
    run = records.run_store(bucket, name)
    entries = [entry for entry in run.list() if entry.key != LEASE_KEY]
    if not entries:
        raise records.no_such_run(bucket, name)
    size_bytes = _deletable(run, entries, "its checkpoints and pictures among them", certain)
    # An object with the last fence must not stop the deletion, which removes it.
    floor = min(records.highest_fence(run), MAX_FENCE - 1)
    with closing(Lease.take(run, floor, 0.0, stop, note)) as lease:
        if read := being_read(run):
            raise LostRunError(
                f"a process samples from {run.uri}/{max(read).key}: wait until it ends, or stop it. The mark of one "
                f"that was killed on another machine lasts up to {READING_SECONDS / 60:g} minutes, or until {run.uri}/"
                f"{ObjectKind.READER.folder} is deleted"
            )
        # Listed again, because the previous holder of the lease may have written since.
        keys = sorted((entry.key for entry in run.list() if entry.key != LEASE_KEY), key=_deletion_order)
        for key in _while_leased("deleting", keys, lease, stop):
            run.delete(key)
    print(f"deleted {run.uri}: {len(keys):,} objects, {size_bytes:,} bytes")


def delete_dataset(bucket_uri: str, name: str, size: ImageSize | None, certain: bool) -> None:
    """Deletes a dataset, also an unfinished one.

    Raises:
        BadRequestError: not `certain`; the message says how much would be deleted. Or `size` chooses none of several.
        LostRunError: a process trains on it.
        MissingInputError: the bucket has no such dataset.
    """
    bucket = open_store(bucket_uri)
    key = shards.find_dataset(bucket, name, size, unfinished=True)
    dataset = bucket.sub(key)
    _deletable(dataset, [*dataset.list()], "and runs may need them to go on", certain)
    check_unused(bucket, key)
    count, size_bytes = shards.delete(dataset)
    print(f"deleted {dataset.uri}: {count:,} objects, {size_bytes:,} bytes")


def _deletable(folder: Store, entries: Sequence[Entry], loss: str, certain: bool) -> int:
    """Returns the bytes of the objects to delete; raises `BadRequestError` unless a person is `certain`."""
    size_bytes = sum(entry.size_bytes for entry in entries)
    if not certain:
        said = f"{folder.uri} has {len(entries):,} objects of {size_bytes:,} bytes, {loss}"
        raise BadRequestError(f"{said}: add --yes to delete them for good")
    return size_bytes


def check_unused(bucket: Store, dataset: str) -> None:
    """Checks that no process trains on the dataset at this key.

    Raises:
        LostRunError: one does.
    """
    users = []
    for name in run_names(bucket):
        # A run whose records are damaged cannot be trained.
        with suppress(JobError):
            run, config = records.run_store(bucket, name), records.existing_config(bucket, name)
            if records.dataset_key_of(config) == dataset and not load_lease(run).released:
                users.append(run)
    for run in users:
        Lease.take(run, records.highest_fence(run), 0.0, NEVER, note).close()


def _deletion_order(key: str) -> int:
    """Sorts keys so that a half-deleted run never looks like a whole one.

    The configuration goes first, because no attempt can resume without it, and the records of attempts last, as the
    proof that there was a run. The lease stays: without it a new run would begin with the fences of the old one, of
    which a sleeping attempt may wake.
    """
    order: dict[ObjectKind | None, int] = {ObjectKind.CONFIG: 0, ObjectKind.MANIFEST: 1, ObjectKind.ATTEMPT: 3}
    return order.get(located(key).kind, 2)


def _while_leased(title: str, objects: Sequence[T], lease: Lease, stop: Stop) -> Iterator[T]:
    """Yields objects one by one, each after it has confirmed the lease and checked for a stop request."""
    with Progress(title, total=len(objects), unit="objects") as bar:
        for number, one in enumerate(objects):
            stop.check(f"after {number:,} of {len(objects):,} objects")
            lease.confirm()
            yield one
            bar.update(number + 1)

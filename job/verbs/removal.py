"""`ddpm runs prune`, `ddpm runs delete`, `ddpm data delete`: what a run's rules do not keep, a run, a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import NamedTuple, TypeVar

from ddpm.image_size import ImageSize
from job.config import RunConfig
from job.data import shards
from job.exits import BadDataError, BadRequestError, JobError, LostRunError
from job.processes.lease import LEASE_KEY, MAX_FENCE, Lease, load_lease
from job.progress import Progress, note, say
from job.runs import records
from job.runs.checkpoints import list_checkpoints, newest_good
from job.runs.layout import CheckpointRef, ObjectKind, located
from job.runs.metric_rows import read_rows
from job.runs.retention import READING_SECONDS, Retention, being_read, best_images_seen, delete_checkpoint, leftovers
from job.stop import NEVER, Stop
from job.store import ObjectMissingError, Store, open_store
from job.verbs.run_listing import run_names

T = TypeVar("T")


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
    if dry_run:
        found = _removals(bucket, run, config, _fence_at_work(run))
        for removal in found:
            print(removal)
    else:
        # Before the lease is taken: an attempt that was suspended may wake and commit what it has uploaded.
        fence = _fence_at_work(run)
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
        with newest_good(run, note) as newest:
            stays = read | ({newest.manifest.ref} if newest else set())
            best = best_images_seen(config, read_rows(run, newest.manifest.metrics, note)) if newest else -1
        for ref in old:
            if ref not in stays and ref.images_seen != best:
                size_bytes = sum(size for key, size in sizes.items() if key.startswith(f"{ref.key}/"))
                found.append(Removal(ref.key, size_bytes, why, ref))
    places = {key: located(key) for key in sizes}
    for key, who in leftovers(run, places, fence).items():
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
    size_bytes = sum(entry.size_bytes for entry in entries)
    if not certain:
        raise BadRequestError(
            f"{run.uri} has {len(entries):,} objects of {size_bytes:,} bytes, its checkpoints and pictures among them: "
            "add --yes to delete them for good"
        )
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
    if not certain:
        sizes = [entry.size_bytes for entry in dataset.list()]
        raise BadRequestError(
            f"{dataset.uri} has {len(sizes):,} objects of {sum(sizes):,} bytes, and runs may need them to go on: "
            "add --yes to delete them for good"
        )
    check_unused(bucket, key)
    count, size_bytes = shards.delete(dataset)
    print(f"deleted {dataset.uri}: {count:,} objects, {size_bytes:,} bytes")


def check_unused(bucket: Store, dataset: str) -> None:
    """Checks that no process trains on the dataset at this key.

    Raises:
        LostRunError: one does.
    """
    for name in run_names(bucket):
        run, uses = records.run_store(bucket, name), False
        # A run whose records are damaged cannot be trained.
        with suppress(JobError):
            key = records.dataset_key_of(records.existing_config(bucket, name))
            uses = key == dataset and not load_lease(run).released
        if uses:
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

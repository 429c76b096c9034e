"""What stays in a run's folder and what goes: old checkpoints, what dead attempts left half-done, and all of a run.

Training retires and sweeps as it goes; `ddpm runs prune` does the same at once, and `delete` takes a whole run, while
nobody trains it. A checkpoint that somebody reads stays, and so does the newest that verifies, whatever the rules say.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ddpm.epochs import epochs_completed_by
from job.config import RunConfig
from job.data.shards import load_index
from job.exits import BadDataError, BadRequestError, LostRunError, NoPermissionError
from job.processes.process_identity import ProcessIdentity
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoints import list_checkpoints, load_manifest, newest_good
from job.runs.layout import CHECKPOINTS, MAX_FENCE, CheckpointRef, Located, ObjectKind, located, places_in
from job.runs.lease import LEASE_KEY, Lease, load_lease
from job.runs.metrics import Row, read_rows
from job.runs.scores import score_name
from job.stop import Stop
from job.store import ObjectMissingError, Store, open_store

T = TypeVar("T")
READING_SECONDS = 900.0
"""A reader that was killed on another machine holds its checkpoint no longer than this; it covers clocks that differ by
minutes, and a step of sampling, after which it is said again."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last few, and those of certain epochs."""

    config: RunConfig
    dataset_images: int
    """From this follows which epochs a checkpoint ends."""
    best_images_seen: int = -1
    """By the checkpoint with the best score, if that one stays."""

    def keeps(self, images_seen: int) -> bool:
        """Whether this is the best so far, or the end of an epoch whose checkpoint is never retired.

        An epoch ends with the first batch at or after its last image.
        """
        every, chosen = self.config.checkpoint.keep_every_epochs, self.config.checkpoint.keep_epochs
        epochs = epochs_completed_by(images_seen, self.dataset_images, self.config.train.batch_size)
        is_chosen = any(epoch in chosen or (every and epoch % every == 0) for epoch in epochs)
        return is_chosen or images_seen == self.best_images_seen

    def takes_snapshot(self, images_seen: int) -> bool:
        """Whether a checkpoint of this moment has a snapshot of the averages, and is therefore always made."""
        every, batch_size = self.config.ema.snapshot_epochs, self.config.train.batch_size
        epochs = epochs_completed_by(images_seen, self.dataset_images, batch_size)
        return any(every and epoch % every == 0 for epoch in epochs)

    def needs(self, images_seen: int) -> bool:
        """Whether a checkpoint of this moment must not be left out, however long the bucket takes."""
        return self.keeps(images_seen) or self.takes_snapshot(images_seen)

    def retire(self, refs: Iterable[CheckpointRef]) -> list[CheckpointRef]:
        """Those of the checkpoints that may go, oldest first; never the newest."""
        return [ref for ref in sorted(refs)[: -self.config.checkpoint.keep_last] if not self.keeps(ref.images_seen)]


def best_images_seen(config: RunConfig, rows: Iterable[Row]) -> int:
    """Of the row of the metrics with the best score, if its checkpoint is to stay; else -1."""
    score = score_name(config.evaluate.metrics[0], config.evaluate.extractor)
    scored = [(row[score], row["images_seen"]) for row in rows if row.get(score) is not None]
    return min(scored)[1] if scored and config.checkpoint.keep_best else -1


class Reader(records.RunRecord):
    """Somebody who reads a checkpoint."""

    checkpoint: str
    until: float
    """Seconds since 1970; minutes of difference between clocks do no harm. Who says so longer was killed."""
    process: ProcessIdentity | None = None

    def is_at(self, place: Located) -> bool:
        """In one of the places of its checkpoint."""
        return self.checkpoint == place.checkpoint.key


@contextmanager
def reading(run: Store, *refs: CheckpointRef) -> Iterator[Callable[[], None]]:
    """Keeps checkpoints from being retired, and their run from being deleted, meanwhile.

    Yields a function to be called now and then by whoever takes longer than `READING_SECONDS`. Who may not write in the
    bucket reads all the same, and may find that it was retired.
    """
    keys = {ref: ObjectKind.READER.key(checkpoint=ref, unique=uuid.uuid4().hex) for ref in refs}
    may_write, said_at = True, float("-inf")

    def renew() -> None:
        nonlocal said_at, may_write
        if not may_write or time.monotonic() - said_at <= READING_SECONDS / 4:
            return
        try:
            until, process = time.time() + READING_SECONDS, ProcessIdentity.of_this_process()
            for ref, key in keys.items():
                run.put(key, Reader(checkpoint=ref.key, until=until, process=process).to_json())
            said_at = time.monotonic()
        except NoPermissionError:
            may_write = False

    renew()
    try:
        yield renew
    finally:
        for key in keys.values() if may_write else ():
            run.delete(key)


@contextmanager
def reading_chosen(
    run: Store, choose: Callable[[], Sequence[CheckpointRef]]
) -> Iterator[tuple[Sequence[CheckpointRef], Callable[[], None]]]:
    """Chooses checkpoints and marks them as being read; yields them, and the function that `reading` yields.

    A run that trains may retire one before its mark is written: then it chooses again.
    """
    while True:
        with reading(run, *(refs := choose())) as renew:
            if all(run.exists(ref.manifest_key) for ref in refs):
                yield refs, renew
                return


def being_read(run: Store) -> set[CheckpointRef]:
    """The checkpoints that somebody reads. A word that is rotten, too old, or of a dead process, holds nothing."""
    refs = set()
    for key, place in places_in(run, ObjectKind.READER.folder).items():
        with suppress(BadDataError, ObjectMissingError):
            reader = Reader.load(run, key)
            is_dead = reader.process is not None and reader.process.certainly_dead()
            if reader.until > time.time() and not is_dead:
                refs.add(place.checkpoint)
    return refs


def delete_checkpoint(run: Store, ref: CheckpointRef) -> None:
    """Retires a checkpoint: the manifest first, so that nobody takes the rest for whole.

    The files of one that somebody began to read meanwhile are left behind, for a later sweep.
    """
    run.delete(ref.manifest_key)
    if ref not in being_read(run):
        for entry in run.list(ref.key):
            run.delete(entry.key)


def leftovers(run: Store, places: Mapping[str, Located], fence: int) -> dict[str, str]:
    """Keys of what killed processes left behind, and who left it; it harms nobody.

    Args:
        run: the run's folder.
        places: the objects in question, and all manifests and records of pieces among them.
        fence: attempts from this one on may still be at work.
    """
    committed = {place.checkpoint for place in places.values() if place.kind is ObjectKind.MANIFEST}
    recorded = {(place.batch, place.piece) for place in places.values() if place.kind is ObjectKind.RECORD}
    made = {(place.checkpoint, place.group) for place in places.values() if place.kind is ObjectKind.AVERAGE}
    read, left = being_read(run), dict[str, str]()
    try:
        named: Collection[str] = {key for ref in list_checkpoints(run) for key in load_manifest(run, ref).objects}
    except (BadDataError, ObjectMissingError):
        # A damaged manifest may name any.
        named = places
    for key, place in places.items():
        is_old = place.checkpoint.fence < fence
        match place.kind:
            case ObjectKind.TENSORS | ObjectKind.PIPELINE if is_old and place.checkpoint not in committed:
                left[key] = "an attempt that is over"
            case ObjectKind.METRICS | ObjectKind.EVENTS | ObjectKind.SNAPSHOT if is_old and key not in named:
                left[key] = "an attempt that is over"
            case ObjectKind.AVERAGE | ObjectKind.AVERAGE_TENSORS if place.checkpoint not in read and (
                place.checkpoint not in committed or (place.checkpoint, place.group) not in made
            ):
                left[key] = "`ddpm ema` that was stopped"
            case ObjectKind.PIECE | ObjectKind.IMAGE if (place.batch, place.piece) not in recorded:
                left[key] = "sampling that was stopped"
            case ObjectKind.FEATURES:
                left[key] = "an evaluation that was stopped"
            case ObjectKind.READER if place.checkpoint not in read:
                left[key] = "a reader that was killed"
            case ObjectKind.PROBE:
                left[key] = "a measurement"
    return left


def sweep(run: Store, lease: Lease) -> None:
    """Deletes what attempts before the holder of `lease` left behind.

    They are over, for they cannot commit any more: files without a manifest, metrics that were logged again by the
    attempt that computed them again.
    """
    kinds = (ObjectKind.TENSORS, ObjectKind.METRICS, ObjectKind.EVENTS, ObjectKind.SNAPSHOT, ObjectKind.READER)
    for key in leftovers(run, places_in(run, *(kind.folder for kind in kinds)), lease.fence):
        lease.confirm()
        run.delete(key)
    run.sub(CHECKPOINTS).sweep()


class Removal(NamedTuple):
    """A checkpoint or an object that is to go."""

    key: str
    size_bytes: int
    why: str
    ref: CheckpointRef | None = None

    def __str__(self) -> str:
        return f"{self.key}  {self.size_bytes:,} bytes  {self.why}"


def prune_run(bucket_uri: str, name: str, *, keep_last: int | None, dry_run: bool) -> None:
    """Deletes what the run's rules do not keep, and prints a line for each removal; with `dry_run` only prints.

    It is what training retires as it goes, at once and for a run that is over.

    Args:
        bucket_uri: where the run lies.
        name: of the run.
        keep_last: how many of the newest checkpoints stay, instead of the run's `checkpoint.keep_last`.
        dry_run: write, take and delete nothing.

    Raises:
        MissingInputError: there is no such run, or not the dataset whose epochs its rules speak of.
        BadDataError: none of its checkpoints verifies; nothing was deleted.
        LostRunError: somebody trains it.
        StoppedError: a signal came; what is left goes with the same command.
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
        with closing(Lease.take(run, records.highest_fence(run), 0.0, stop, note)) as lease:
            found = _removals(bucket, run, config, lease.fence)
            for removal in _while_held("pruning", found, lease, stop):
                if _remove(run, removal):
                    print(removal)
            run.sweep()
    total_bytes, what = sum(removal.size_bytes for removal in found), "would go" if dry_run else "deleted"
    print(f"{run.uri}: {total_bytes:,} bytes {what}" if found else f"{run.uri}: there is nothing to prune")


def _fence_at_work(run: Store) -> int:
    """The fence from which on attempts may still be at work: the highest, unless it gave its lease back."""
    with suppress(BadDataError, ObjectMissingError):
        if load_lease(run).released:
            return records.highest_fence(run) + 1
    return records.highest_fence(run)


def _removals(bucket: Store, run: Store, config: RunConfig, fence: int) -> list[Removal]:
    """What is to go, in the order in which it goes; deletes nothing. Attempts with a lower fence than `fence` are over.

    Raises:
        MissingInputError: the run's rules speak of epochs of a dataset that is not there.
        BadDataError: none of its checkpoints verifies.
    """
    sizes, keep, dataset_images = {entry.key: entry.size_bytes for entry in run.list()}, config.checkpoint, 1
    why = f"not among the last {keep.keep_last}"
    if keep.keep_every_epochs or keep.keep_epochs:
        dataset_images = load_index(bucket, records.dataset_key_of(config)).images
        why += ", nor of an epoch to keep"
    found, read = list[Removal](), being_read(run)
    if old := Retention(config, dataset_images).retire(list_checkpoints(run)):
        with newest_good(run, note) as newest:
            stays = read | ({newest.manifest.ref} if newest else set())
            best = best_images_seen(config, read_rows(run, newest.manifest.metrics, note)) if newest else -1
            old = [ref for ref in old if ref.images_seen != best]
        for ref in old:
            if ref not in stays:
                size_bytes = sum(size for key, size in sizes.items() if key.startswith(f"{ref.key}/"))
                found.append(Removal(ref.key, size_bytes, why, ref))
    places = {key: located(key) for key in sizes}
    for key, who in leftovers(run, places, fence).items():
        # A sampler says that it reads a checkpoint before it makes its first piece.
        if not (read and places[key].batch):
            found.append(Removal(key, sizes[key], f"left behind by {who}"))
    return found


def _remove(run: Store, removal: Removal) -> bool:
    """Whether it has gone: a piece that has been taken up since it was found stays.

    Samplers hold no lease, but say that they read. They look for a piece's record while they say so, and make the
    record after all that it names is there.
    """
    if batch := located(removal.key).batch:
        record_key = ObjectKind.RECORD.key(batch=batch, piece=located(removal.key).piece)
        if being_read(run) or run.exists(record_key):
            return False
    if removal.ref is None:
        run.delete(removal.key)
    else:
        delete_checkpoint(run, removal.ref)
    return True


def delete_run(bucket_uri: str, name: str, *, certain: bool) -> None:
    """Deletes a run, or what is left of one whose deletion was stopped, and says how much that was.

    Raises:
        BadRequestError: not `certain`; the message says what would go.
        MissingInputError: there is no such run.
        LostRunError: somebody trains it, or samples from it.
        StoppedError: a signal came; what is left goes with the same command.
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
    # Whatever bears the last fence goes as well.
    floor = min(records.highest_fence(run), MAX_FENCE - 1)
    with closing(Lease.take(run, floor, 0.0, stop, note)) as lease:
        if read := being_read(run):
            raise LostRunError(
                f"somebody samples from {run.uri}/{max(read).key}: wait until that is done, or stop it. One that was "
                f"killed on another machine holds it for up to {READING_SECONDS / 60:g} minutes, or until {run.uri}/"
                f"{ObjectKind.READER.folder} is deleted"
            )
        # Listed anew, for whoever held the run before may have written since.
        keys = sorted((entry.key for entry in run.list() if entry.key != LEASE_KEY), key=_turn)
        for key in _while_held("deleting", keys, lease, stop):
            run.delete(key)
    print(f"deleted {run.uri}: {len(keys):,} objects, {size_bytes:,} bytes")


def _turn(key: str) -> int:
    """An order in which a half-deleted run is never taken for whole.

    The configuration goes first, without which nobody goes on with the run, and the attempts last, which say that there
    was one. The lease stays: a woken attempt of the old run would otherwise have a fence as high as one of a new run.
    """
    turns: dict[ObjectKind | None, int] = {ObjectKind.CONFIG: 0, ObjectKind.MANIFEST: 1, ObjectKind.ATTEMPT: 3}
    return turns.get(located(key).kind, 2)


def _while_held(title: str, objects: Sequence[T], lease: Lease, stop: Stop) -> Iterator[T]:
    """Yields what is to be deleted one by one, for as long as the run is certainly ours and nobody asks to stop."""
    with Progress(title, total=len(objects), unit="objects") as bar:
        for number, one in enumerate(objects):
            stop.check(f"after {number:,} of {len(objects):,} objects")
            lease.confirm()
            yield one
            bar.update(number + 1)

"""Retention in a run's folder: which checkpoints stay, and the deletion of old ones and of leftovers.

Training deletes both after each commit. A checkpoint that a process reads stays, whatever the rules say: a mark below
`RUN/reading/` keeps it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from job.config import RunConfig
from job.coordination.lease import Lease, ProcessIdentity
from job.coordination.sealed import Sealed
from job.data.reading.order import epochs_completed_by
from job.exits import BadDataError, JobError, LostRunError, NoPermissionError
from job.progress import note
from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest
from job.runs.layout import CHECKPOINTS, MAX_IMAGES_SEEN, CheckpointRef, Located, ObjectKind, located, places_in
from job.runs.metric_rows import Row
from job.runs.run import score_name
from job.store import ObjectMissingError, Store

LAST_SAVES = 2
"""The newest saves that stay, whether or not they end an epoch; the second one serves if the newest is damaged."""
READING_SECONDS = 900.0
"""The lifetime of a mark: a reader that was killed on another machine keeps its checkpoint no longer.

It covers clocks that differ by minutes, and a step of sampling, after which the mark is renewed.
"""


OUTSIDE = (ObjectKind.METRICS, ObjectKind.EVENTS, ObjectKind.SNAPSHOT)
"""Kinds outside of a checkpoint's folder that its manifest names."""
Named = dict[CheckpointRef, set[str] | None]
"""The keys that each manifest names; None for one that cannot be read."""


class Reader(Sealed):
    """The mark of a process that reads a checkpoint."""

    checkpoint: str
    until: float
    """Seconds since 1970; clocks may differ by minutes. An older mark is that of a killed process."""
    process: ProcessIdentity | None = None


@contextmanager
def kept_while_read(run: Store, *refs: CheckpointRef) -> Iterator[Callable[[], None]]:
    """Keeps checkpoints, and their run, from deletion until the context ends.

    Yields a function that renews the marks, for readers that take longer than `READING_SECONDS`. A reader without
    permission to write leaves no mark, and its checkpoint may be deleted meanwhile.
    """
    keys = {ref: ObjectKind.READER.key(checkpoint=ref, unique=uuid.uuid4().hex) for ref in refs}
    may_write, marked_at = True, float("-inf")

    def renew() -> None:
        nonlocal marked_at, may_write
        if not may_write or time.monotonic() - marked_at <= READING_SECONDS / 4:
            return
        try:
            until, process = time.time() + READING_SECONDS, ProcessIdentity.of_this_process()
            for ref, key in keys.items():
                run.put(key, Reader(checkpoint=ref.key, until=until, process=process).to_json())
            marked_at = time.monotonic()
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
    """Chooses checkpoints and marks them as being read; yields them, and the function that `kept_while_read` yields.

    If training deletes one of them before its mark is written, it chooses again.
    """
    while True:
        with kept_while_read(run, *(refs := choose())) as renew:
            if all(run.exists(ref.manifest_key) for ref in refs):
                yield refs, renew
                return


def being_read(run: Store) -> set[CheckpointRef]:
    """Returns the checkpoints that are being read; corrupt or old marks and those of dead processes do not count."""
    refs = set()
    for key, place in places_in(run, ObjectKind.READER.folder).items():
        with suppress(BadDataError, ObjectMissingError):
            reader = Reader.load(run, key)
            is_dead = reader.process is not None and reader.process.certainly_dead()
            if reader.until > time.time() and not is_dead:
                refs.add(place.checkpoint)
    return refs


@dataclass(frozen=True)
class Retention:
    """The rules that decide which checkpoints stay: the last saves and ends of epochs, chosen epochs, and the best."""

    config: RunConfig
    dataset_images: int
    """Of an epoch; decides which epochs a checkpoint ends. More than `MAX_IMAGES_SEEN`: not known."""
    best_images_seen: int = -1
    """By the checkpoint with the best score, if the run keeps that one; else -1."""

    def ended(self, images_seen: int) -> range:
        """Returns the epochs that end at this moment, with the first batch at or after their last image."""
        return epochs_completed_by(images_seen, self.dataset_images, self.config.train.batch_size)

    def ends_epoch(self, images_seen: int, every_epochs: int) -> bool:
        """Returns whether each `every_epochs`-th epoch ends at this moment; 0 stands for none."""
        return bool(every_epochs) and any(epoch % every_epochs == 0 for epoch in self.ended(images_seen))

    def keeps(self, images_seen: int) -> bool:
        """Returns whether a checkpoint is kept for good: the best so far, or the end of a chosen epoch."""
        chosen = self.config.checkpoint
        is_chosen = not {*chosen.keep_epochs}.isdisjoint(self.ended(images_seen))
        return (
            is_chosen or self.ends_epoch(images_seen, chosen.keep_every_epochs) or images_seen == self.best_images_seen
        )

    def takes_snapshot(self, images_seen: int) -> bool:
        """Returns whether a checkpoint of this moment has a snapshot of the averages, and so is always made."""
        return self.ends_epoch(images_seen, self.config.ema.snapshot_epochs)

    def needs(self, images_seen: int) -> bool:
        """Returns whether a checkpoint of this moment must be made, however long the bucket takes."""
        return self.keeps(images_seen) or self.takes_snapshot(images_seen)

    def retire(self, refs: Iterable[CheckpointRef]) -> list[CheckpointRef]:
        """Returns the checkpoints to delete, oldest first; never the newest.

        Saves may come every 10 s, and must not replace the last ends of epochs, which people sample. If the epochs are
        not known, each save counts as the end of one.
        """
        rules, there, is_known = self.config.checkpoint, sorted(refs), self.dataset_images <= MAX_IMAGES_SEEN
        ends = [ref for ref in there if not is_known or self.ends_epoch(ref.images_seen, rules.every_epochs)]
        stay = {*there[-min(LAST_SAVES, rules.keep_last) :], *ends[-rules.keep_last :]}
        return [ref for ref in there if ref not in stay and not self.keeps(ref.images_seen)]


def best_images_seen(config: RunConfig, rows: Iterable[Row]) -> int:
    """Returns `images_seen` of the metric row with the best score, if the run keeps its checkpoint; else -1."""
    score = score_name(config.evaluate.metrics[0], config.evaluate.extractor)
    scored = [(row[score], row["images_seen"]) for row in rows if row.get(score) is not None]
    return min(scored)[1] if scored and config.checkpoint.keep_best else -1


def delete_checkpoint(run: Store, ref: CheckpointRef) -> None:
    """Deletes a checkpoint, the manifest first, so that the remaining files never look like a whole one.

    If a process began to read it meanwhile, its files stay, for a later sweep.
    """
    run.delete(ref.manifest_key)
    if ref not in being_read(run):
        for entry in run.list(ref.key):
            run.delete(entry.key)


def leftovers(
    run: Store, places: Mapping[str, Located], until: CheckpointRef, named: Named, read: Collection[CheckpointRef]
) -> dict[str, str]:
    """Returns the keys of objects that killed processes left, and what left each of them; they are harmless.

    Args:
        run: the run's folder.
        places: the objects to check, with all manifests and records of pieces among them.
        until: objects of checkpoints from this one on may still be in use.
        named: the keys that each manifest names, as far as it has been read; it adds the others.
        read: the checkpoints that are being read.
    """
    committed = {place.checkpoint for place in places.values() if place.kind is ObjectKind.MANIFEST}
    recorded = {(place.folder, place.piece) for place in places.values() if place.kind is ObjectKind.RECORD}
    made = {(place.checkpoint, place.group) for place in places.values() if place.kind is ObjectKind.AVERAGE}
    for ref in committed - named.keys():
        named[ref] = None
        with suppress(BadDataError, ObjectMissingError):
            named[ref] = set(load_manifest(run, ref).objects)
    in_use = set[str]().union(*(named[ref] or () for ref in committed))
    # A manifest that cannot be read may name whatever was uploaded before it.
    unreadable = max((ref for ref in committed if named[ref] is None), default=CheckpointRef(0, 0))
    left = dict[str, str]()
    for key, place in places.items():
        is_read, is_committed = place.checkpoint in read, place.checkpoint in committed
        is_old = place.checkpoint < until
        match place.kind:
            case ObjectKind.TENSORS | ObjectKind.PIPELINE if is_old and not is_read and not is_committed:
                left[key] = "an attempt that is over"
            case ObjectKind.METRICS | ObjectKind.EVENTS | ObjectKind.SNAPSHOT if (
                is_old and key not in in_use and place.checkpoint > unreadable
            ):
                left[key] = "an attempt that is over"
            case ObjectKind.AVERAGE | ObjectKind.AVERAGE_TENSORS if not is_read and (
                not is_committed or (place.checkpoint, place.group) not in made
            ):
                left[key] = "`ddpm ema` that was stopped"
            case ObjectKind.PIECE | ObjectKind.IMAGE if (place.folder, place.piece) not in recorded:
                left[key] = "sampling that was stopped"
            case ObjectKind.FEATURES | ObjectKind.FEATURE_RECORD | ObjectKind.FEATURE_CLAIM:
                left[key] = "an evaluation that was stopped"
            case ObjectKind.CLAIM:
                left[key] = "sampling by several machines"
            case ObjectKind.READER if not is_read:
                left[key] = "a reader that was killed"
            case ObjectKind.PROBE:
                left[key] = "a check of permissions"
    return left


class Retirement:
    """Deletes what no checkpoint needs after each commit of an attempt: old checkpoints, their metrics, leftovers."""

    def __init__(self, run: Store, lease: Lease, damaged: Collection[CheckpointRef]) -> None:
        """Checkpoints that are `damaged` do not count for retention, and stay."""
        self._run, self._lease, self._damaged = run, lease, damaged
        self._named, self._is_swept = Named(), False

    def after(self, newest: Manifest, retention: Retention) -> None:
        """Deletes what the rules do not keep. After an error, which loses no work, the next commit tries again."""
        self._named[newest.ref] = set(newest.objects)
        try:
            there = {*list_checkpoints(self._run)}
            # A checkpoint of a higher fence may be damaged: if it counted, a sound one would be deleted in its place.
            for ref in retention.retire(ref for ref in there if ref <= newest.ref and ref not in self._damaged):
                self._while_held(partial(self._retire, ref, there))
            self._sweep(newest.ref, there)
        except LostRunError:
            raise
        except JobError as error:
            note(f"old checkpoints of {self._run.uri} stay for now: {error}")

    def _retire(self, ref: CheckpointRef, there: set[CheckpointRef]) -> None:
        # Checked right before the deletion: a reader that comes later misses the manifest, and chooses again.
        if ref not in being_read(self._run):
            delete_checkpoint(self._run, ref)
            there.discard(ref)

    def _sweep(self, newest: CheckpointRef, there: set[CheckpointRef]) -> None:
        """Deletes what the manifests that are gone named alone; at first also the leftovers of earlier attempts."""
        gone, read = self._named.keys() - there, set[CheckpointRef]()
        places = {key: located(key) for ref in gone for key in self._named[ref] or ()}
        places = {key: place for key, place in places.items() if place.kind in OUTSIDE}
        if not self._is_swept:
            kinds = (ObjectKind.TENSORS, ObjectKind.READER, *OUTSIDE)
            places, read = places_in(self._run, *(kind.folder for kind in kinds)), being_read(self._run)
        places |= {ref.manifest_key: located(ref.manifest_key) for ref in there}
        for key in leftovers(self._run, places, newest, self._named, read):
            self._while_held(partial(self._run.delete, key))
        for ref in gone:
            del self._named[ref]
        if not self._is_swept:
            self._run.sub(CHECKPOINTS).sweep()
            self._is_swept = True

    def _while_held(self, delete: Callable[[], None]) -> None:
        """Deletes something; checks the lease again after an outage, in which another attempt may have the run."""

        def attempt() -> None:
            self._lease.confirm()
            delete()

        self._run.retry(attempt)

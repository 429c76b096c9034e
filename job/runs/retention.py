"""What stays in a run's folder and what goes: old checkpoints, and what dead attempts left half-done."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import Field

from ddpm.epochs import epochs_completed_by
from job.config import RunConfig
from job.exits import BadDataError
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.layout import CHECKPOINTS, CheckpointRef, Located, ObjectKind, located
from job.runs.lease import Lease
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

READING_SECONDS = 3600.0
"""A reader that was killed holds its checkpoint no longer than this."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last few, and those of certain epochs."""

    config: RunConfig
    dataset_images: int
    """From this follows which epochs a checkpoint ends."""

    def keeps(self, images_seen: int) -> bool:
        """Whether this is the end of an epoch whose checkpoint is never retired, and therefore always made.

        An epoch ends with the first batch at or after its last image.
        """
        every, chosen = self.config.checkpoint.keep_every_epochs, self.config.checkpoint.keep_epochs
        epochs = epochs_completed_by(images_seen, self.dataset_images, self.config.train.batch_size)
        return any(epoch in chosen or (every and epoch % every == 0) for epoch in epochs)

    def retire(self, refs: Iterable[CheckpointRef]) -> list[CheckpointRef]:
        """Those of the checkpoints that may go, oldest first; never the newest."""
        return [ref for ref in sorted(refs)[: -self.config.checkpoint.keep_last] if not self.keeps(ref.images_seen)]


class Reader(Sealed):
    """Somebody who reads a checkpoint."""

    checkpoint: str
    until: float = Field(gt=0)
    """Seconds since 1970; minutes of difference between clocks do no harm."""

    @property
    def is_over(self) -> bool:
        """Whether whoever said so must have been killed."""
        return self.until < time.time()


@contextmanager
def reading(run: Store, ref: CheckpointRef, seconds: float = READING_SECONDS) -> Iterator[Callable[[], None]]:
    """Keeps a checkpoint from being retired, and its run from being deleted, meanwhile.

    Yields a function to be called now and then by whoever takes longer than `seconds`.
    """
    key, said_at = ObjectKind.READER.key(checkpoint=ref, unique=uuid.uuid4().hex), float("-inf")

    def renew() -> None:
        nonlocal said_at
        if time.monotonic() - said_at > seconds / 4:
            run.put(key, Reader(checkpoint=ref.key, until=time.time() + seconds).to_json())
            said_at = time.monotonic()

    renew()
    try:
        yield renew
    finally:
        run.delete(key)


def being_read(run: Store) -> tuple[set[CheckpointRef], set[str]]:
    """The checkpoints that somebody reads, and the keys of readers whose word is rotten, or too old to be believed."""
    refs, over = set[CheckpointRef](), set[str]()
    for entry in run.list(ObjectKind.READER.folder):
        place = located(entry.key)
        try:
            if place and not Reader.load(run, entry.key).is_over:
                refs.add(place.checkpoint)
            else:
                over.add(entry.key)
        except BadDataError:
            over.add(entry.key)
        except ObjectMissingError:
            pass
    return refs, over


def delete_checkpoint(run: Store, ref: CheckpointRef) -> None:
    """Retires a checkpoint: the manifest first, so that nobody takes the rest for whole.

    The files of one that somebody began to read meanwhile are left behind, for a later sweep.
    """
    run.delete(ref.manifest_key)
    if ref not in being_read(run)[0]:
        for entry in run.list(ref.key):
            run.delete(entry.key)


def leftovers(
    places: Mapping[str, Located], fence: int, named: Collection[str] | None, over: Collection[str]
) -> dict[str, str]:
    """Keys of what killed processes left behind, and who left it; it harms nobody.

    Args:
        places: the objects in question, and all manifests and records of pieces among them.
        fence: attempts from this one on may still be at work.
        named: keys that manifests name; none if one is damaged, which may name any.
        over: keys of readers that were killed.
    """
    committed = {place.checkpoint for place in places.values() if place.kind is ObjectKind.MANIFEST}
    recorded = {(place.batch, place.piece) for place in places.values() if place.kind is ObjectKind.RECORD}
    named, left = places if named is None else named, {}
    for key, place in places.items():
        is_old = place.checkpoint.fence < fence
        match place.kind:
            case ObjectKind.TENSORS if is_old and place.checkpoint not in committed:
                left[key] = "an attempt that is over"
            case ObjectKind.METRICS | ObjectKind.EVENTS if is_old and key not in named:
                left[key] = "an attempt that is over"
            case ObjectKind.PIECE | ObjectKind.IMAGE if (place.batch, place.piece) not in recorded:
                left[key] = "sampling that was stopped"
            case ObjectKind.READER if key in over:
                left[key] = "a reader that was killed"
            case ObjectKind.PROBE:
                left[key] = "a measurement"
    return left


def named_by_manifests(run: Store) -> set[str] | None:
    """Keys of all objects that a run's manifests name; none if one of them is damaged, which may name any."""
    try:
        return {key for ref in list_checkpoints(run) for key in load_manifest(run, ref).objects}
    except (BadDataError, ObjectMissingError):
        return None


def sweep(run: Store, lease: Lease) -> None:
    """Deletes what attempts before the holder of `lease` left behind.

    They are over, for they cannot commit any more: files without a manifest, metrics that were logged again by the
    attempt that computed them again.
    """
    folders = (CHECKPOINTS, *(kind.folder for kind in (ObjectKind.METRICS, ObjectKind.EVENTS, ObjectKind.READER)))
    places = {entry.key: at for folder in folders for entry in run.list(folder) if (at := located(entry.key))}
    for key in leftovers(places, lease.fence, named_by_manifests(run), being_read(run)[1]):
        lease.confirm()
        run.delete(key)
    run.sub(CHECKPOINTS).sweep()

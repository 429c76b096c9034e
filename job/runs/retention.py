"""What stays in a run's folder and what goes: old checkpoints, and what dead attempts left half-done.

RUN/reading/{fence:06d}-{images_seen:012d}-….json     somebody reads this checkpoint; it stays until then
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import Field

from ddpm.epochs import epochs_completed_by
from job.config import RunConfig
from job.exits import BadDataError
from job.runs.checkpoints import FOLDER, CheckpointRef, list_checkpoints, load_manifest, manifest_key
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

READING = "reading"
READING_SECONDS = 3600.0
"""A reader that was killed holds its checkpoint no longer than this."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last few, and those of certain epochs."""

    keep_last: int
    keep_every_epochs: int
    keep_epochs: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Retention:
        """What a run's configuration says."""
        keep = config.checkpoint
        return cls(keep.keep_last, keep.keep_every_epochs, keep.keep_epochs)

    @property
    def keeps_epochs(self) -> bool:
        """Whether there are epochs whose checkpoints stay."""
        return bool(self.keep_every_epochs or self.keep_epochs)

    def keeps_epoch(self, epoch: int) -> bool:
        """Whether the checkpoint at the end of `epoch` is never retired, and therefore always made."""
        every = self.keep_every_epochs
        return epoch in self.keep_epochs or bool(every and epoch % every == 0)

    def retire(
        self,
        refs: list[CheckpointRef],
        dataset_images: int,
        batch_size_images: int,
        verified: CheckpointRef | None = None,
    ) -> list[CheckpointRef]:
        """The checkpoints that may go, oldest first; never the newest.

        An epoch's checkpoint is the first one at or after its last image, which is a function of the two sizes.

        Args:
            refs: those there are.
            dataset_images: images of an epoch.
            batch_size_images: how progress is counted.
            verified: one that is known to be good, for the caller has made it, the newest of its fence: one of a
                higher fence, which may be rotten for all the caller knows, neither goes nor pushes others out.
        """
        if verified is not None:
            refs = [ref for ref in refs if ref.fence <= verified.fence]
        newest = sorted(refs)[-self.keep_last :]

        def kept_for_epoch(ref: CheckpointRef) -> bool:
            epochs = epochs_completed_by(ref.images_seen, dataset_images, batch_size_images)
            return any(self.keeps_epoch(epoch) for epoch in epochs)

        return [ref for ref in sorted(refs) if ref not in newest and not kept_for_epoch(ref)]


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
    key = f"{READING}/{ref.key.removeprefix(f'{FOLDER}/')}-{uuid.uuid4().hex}.json"

    def reader() -> bytes:
        return Reader(checkpoint=ref.key, until=time.time() + seconds).to_json()

    run.create(key, reader())
    said_at = time.monotonic()

    def renew() -> None:
        nonlocal said_at
        if time.monotonic() - said_at > seconds / 4:
            run.put(key, reader())
            said_at = time.monotonic()

    try:
        yield renew
    finally:
        run.delete(key)


def read_of(key: str) -> CheckpointRef | None:
    """The checkpoint that a reader's object is about; none if its name is not one of a reader."""
    match = re.fullmatch(rf"{READING}/(\d{{6}}-\d{{12}})-[0-9a-f]{{32}}\.json", key)
    return CheckpointRef.parse(match[1]) if match else None


def being_read(run: Store) -> tuple[set[CheckpointRef], list[str]]:
    """The checkpoints that somebody reads, and the keys of readers whose word is rotten, or too old to be believed."""
    refs, over = set[CheckpointRef](), list[str]()
    for entry in run.list(READING):
        ref = read_of(entry.key)
        try:
            is_over = ref is None or Reader.load(run, entry.key).is_over
        except ObjectMissingError:
            continue
        except BadDataError:
            is_over = True
        if ref is None or is_over:
            over.append(entry.key)
        else:
            refs.add(ref)
    return refs, over


def delete_checkpoint(run: Store, ref: CheckpointRef) -> None:
    """Retires a checkpoint: the manifest first, so that nobody takes the rest for whole.

    The files of one that somebody began to read meanwhile are left behind, for a later sweep.
    """
    run.delete(manifest_key(ref))
    if ref in being_read(run)[0]:
        return
    for entry in run.list(ref.key):
        run.delete(entry.key)


def orphans(run: Store, fence: int) -> list[str]:
    """Keys that attempts with a lower fence than `fence` left behind and that no checkpoint names.

    Those attempts are over, for they cannot commit any more: files without a manifest, metrics that were logged
    again by the attempt that computed them again. Nothing is taken for an orphan that a damaged manifest may name.
    """
    refs = list_checkpoints(run)
    keys = [
        entry.key
        for entry in run.list(FOLDER)
        if (ref := CheckpointRef.parse(entry.key.split("/")[1])) and ref.fence < fence and ref not in refs
    ]
    named: set[str] = set()
    try:
        for ref in refs:
            named |= {segment.name for segment in load_manifest(run, ref).metric_segments}
    except (BadDataError, ObjectMissingError):
        return keys
    for folder in ("metrics", "tensorboard"):
        for entry in run.list(folder):
            name = entry.key.removeprefix(f"{folder}/").removesuffix(".jsonl").rsplit(".", 1)[-1]
            ref = CheckpointRef.parse(name)
            if ref and ref.fence < fence and name not in named:
                keys.append(entry.key)
    return keys

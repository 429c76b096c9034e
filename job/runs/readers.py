"""Marks that keep a checkpoint while somebody reads it: `RUN/reading/…`, written before the first byte is read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from job.exits import BadDataError, NoPermissionError
from job.processes.process_identity import ProcessIdentity
from job.runs.layout import CheckpointRef, Located, ObjectKind, places_in
from job.runs.records import RunRecord
from job.store import ObjectMissingError, Store

READING_SECONDS = 900.0
"""A reader that was killed on another machine holds its checkpoint no longer than this; it covers clocks that differ by
minutes, and a step of sampling, after which it is said again."""


class Reader(RunRecord):
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

"""Marks below `RUN/reading/` that keep a checkpoint from deletion while a process reads it."""

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
"""The lifetime of a mark: a reader that was killed on another machine keeps its checkpoint no longer.

It covers clocks that differ by minutes, and a step of sampling, after which the mark is renewed.
"""


class Reader(RunRecord):
    """The mark of a process that reads a checkpoint."""

    checkpoint: str
    until: float
    """Seconds since 1970; clocks may differ by minutes. An older mark is that of a killed process."""
    process: ProcessIdentity | None = None

    def is_at(self, place: Located) -> bool:
        """Returns whether it lies among the marks of its checkpoint."""
        return self.checkpoint == place.checkpoint.key


@contextmanager
def reading(run: Store, *refs: CheckpointRef) -> Iterator[Callable[[], None]]:
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
    """Chooses checkpoints and marks them as being read; yields them, and the function that `reading` yields.

    If training deletes one of them before its mark is written, it chooses again.
    """
    while True:
        with reading(run, *(refs := choose())) as renew:
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

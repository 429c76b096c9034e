"""`ddpm runs prune`: what training retires as it goes, at once and for a run that is over: old checkpoints, leftovers.

Deleting takes the run's lease, so that nobody trains meanwhile. A checkpoint that somebody reads stays, and so does the
newest one that verifies, whatever the rules say.
"""

from __future__ import annotations

import time
from calendar import timegm
from collections.abc import Callable
from dataclasses import dataclass, replace

from job.config import RunConfig
from job.data.shards import load_index
from job.exits import BadDataError
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoints import LATEST, CheckpointRef, Latest, list_checkpoints, put_latest
from job.runs.grace import PROBE
from job.runs.lease import Lease, load_lease
from job.runs.retention import Retention, being_read, delete_checkpoint, orphans
from job.runs.verification import checkpoint_problems
from job.sampling.names import SAMPLES
from job.sampling.piece_checks import batch_of, record_of, uncommitted
from job.stop import Stop
from job.store import ObjectMissingError, Store, open_store

ORPHAN_SECONDS = 3600.0
"""What the last attempt left behind is an orphan once the attempt is over for this long."""


@dataclass(frozen=True)
class Removal:
    """A checkpoint or an object that is to go."""

    key: str
    size_bytes: int
    why: str
    ref: CheckpointRef | None = None

    def __str__(self) -> str:
        return f"{self.key}  {self.size_bytes:,} bytes  {self.why}"


def prune_run(bucket_uri: str, name: str, *, keep_last: int | None, dry_run: bool) -> None:
    """Deletes what the run's rules do not keep, and prints a line for each removal; with `dry_run` only prints.

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
    retention = Retention.of(config)
    if keep_last is not None:
        retention = replace(retention, keep_last=keep_last)
    # Before the lease is taken: then it says nothing about the last attempt any more.
    over_below = fences_over(run)
    if dry_run:
        _tell_what_goes(run, removals(bucket, run, config, retention, over_below, note))
        return
    lease = Lease.take(run, records.highest_fence(run), 0.0, stop, note)
    try:
        _remove(run, lease, removals(bucket, run, config, retention, over_below, note), stop)
    finally:
        lease.close()


def fences_over(run: Store) -> int:
    """The fence from which on attempts may still leave objects behind; all before it are over.

    Attempts that were replaced are over. The last one is when it gave its lease back an hour ago, by its last word.
    """
    highest = records.highest_fence(run)
    try:
        released = load_lease(run).released
    except (BadDataError, ObjectMissingError):
        released = False
    status, attempt = records.read_status(run), records.last_attempt(run)
    if status is not None and status.fence == highest:
        age_seconds = records.age_seconds(status)
    elif attempt is not None and attempt.fence == highest:
        age_seconds = time.time() - timegm(time.strptime(attempt.started, records.UTC))
    else:
        age_seconds = 0.0
    return highest + 1 if released and age_seconds >= ORPHAN_SECONDS else highest


def removals(
    bucket: Store,
    run: Store,
    config: RunConfig,
    retention: Retention,
    over_below: int,
    warn: Callable[[str], None],
) -> list[Removal]:
    """What is to go, in the order in which it goes; deletes nothing.

    Args:
        bucket: where the run and its dataset lie.
        run: the run's folder.
        config: the run's.
        retention: what stays.
        over_below: the attempts with lower fences are over.
        warn: told about checkpoints that do not verify.

    Raises:
        MissingInputError: `retention` speaks of epochs, and the dataset is gone.
        BadDataError: there are checkpoints to retire, but none verifies.
    """
    refs, sizes = list_checkpoints(run), {entry.key: entry.size_bytes for entry in run.list()}
    # Without rules about epochs it does not matter how long one is.
    dataset_images = load_index(bucket, records.dataset_key_of(config)).images if retention.keeps_epochs else 1
    old = retention.retire(refs, dataset_images, config.train.batch_size)
    read, over = being_read(run)
    if old:
        stays = _newest_verified(run, refs, warn)
        old = [ref for ref in old if ref not in read and ref != stays]
    why = f"not among the last {retention.keep_last}" + (", nor of an epoch to keep" if retention.keeps_epochs else "")
    found = [
        Removal(ref.key, sum(size for key, size in sizes.items() if key.startswith(f"{ref.key}/")), why, ref)
        for ref in old
    ]
    left = [(key, "left behind by an attempt that is over") for key in orphans(run, over_below)]
    left += [(key, "left behind by a reader that was killed") for key in over]
    # A sampler says that it reads a checkpoint before it makes its first piece.
    if not read:
        left += [(key, "left behind by sampling that was stopped") for key in _pieces_without_record(run)]
    left += [(key, "left behind by a measurement") for key in sizes if key.startswith(f"{PROBE}/")]
    return [*found, *(Removal(key, sizes.get(key, 0), reason) for key, reason in left)]


def _pieces_without_record(run: Store) -> list[str]:
    batches: dict[str, set[str]] = {}
    for entry in run.list(SAMPLES):
        if folder := batch_of(entry.key):
            batches.setdefault(folder, set()).add(entry.key.removeprefix(f"{folder}/"))
    return [f"{folder}/{key}" for folder, keys in batches.items() for key in sorted(uncommitted(keys))]


def _is_wanted(run: Store, key: str) -> bool:
    """Whether a piece has been taken up since it was found: samplers hold no lease, but say that they read.

    They look for a piece's record while they say so, and make the record after all that it names is there.
    """
    return bool(being_read(run)[0]) or run.exists(f"{batch_of(key)}/{record_of(key)}")


def _newest_verified(run: Store, refs: list[CheckpointRef], warn: Callable[[str], None]) -> CheckpointRef:
    with Progress("verifying", total=len(refs), unit="checkpoints") as bar:
        for number, ref in enumerate(sorted(refs, reverse=True)):
            problems = checkpoint_problems(run, ref)
            if not problems:
                return ref
            warn(f"{run.uri}/{ref.key} does not verify, so that an older one stays: {problems[0]}")
            bar.update(number + 1)
    raise BadDataError(f"no checkpoint of {run.uri} verifies: nothing is deleted before somebody has looked at them")


def _remove(run: Store, lease: Lease, found: list[Removal], stop: Stop) -> None:
    done_bytes = 0
    with Progress("pruning", total=len(found), unit="objects") as bar:
        for number, removal in enumerate(found):
            stop.check(f"after {number:,} of {len(found):,} removals")
            lease.confirm()
            if batch_of(removal.key) and _is_wanted(run, removal.key):
                continue
            if removal.ref is None:
                run.delete(removal.key)
            else:
                delete_checkpoint(run, removal.ref)
            print(removal)
            done_bytes += removal.size_bytes
            bar.update(number + 1)
    run.sweep()
    _mend_latest(run, {removal.ref for removal in found})
    print(f"{run.uri}: {done_bytes:,} bytes deleted" if found else f"{run.uri}: there is nothing to prune")


def _mend_latest(run: Store, removed: set[CheckpointRef | None]) -> None:
    """Has `LATEST` name the newest checkpoint if it names one that went."""
    try:
        named = Latest.load(run, LATEST).ref
    except (BadDataError, ObjectMissingError):
        return
    refs = list_checkpoints(run)
    if named in removed and refs:
        put_latest(run, max(refs))


def _tell_what_goes(run: Store, found: list[Removal]) -> None:
    for removal in found:
        print(removal)
    total_bytes = sum(removal.size_bytes for removal in found)
    print(f"{run.uri}: {total_bytes:,} bytes would go" if found else f"{run.uri}: there is nothing to prune")

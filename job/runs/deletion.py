"""`ddpm runs delete`: all of a run, in an order in which a half-deleted one is never taken for whole.

The configuration goes first, without which nobody goes on with the run, and the attempts last, which say that there was
one. `lease.json` stays: a woken attempt of the old run would otherwise have a fence as high as one of a new run.
"""

from __future__ import annotations

from job.exits import BadRequestError, LostRunError, MissingInputError
from job.progress import Progress, note
from job.runs import records
from job.runs.checkpoints import FOLDER
from job.runs.lease import LEASE, Lease
from job.runs.retention import being_read
from job.stop import Stop
from job.store import Store, open_store


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
    entries = [entry for entry in run.list() if entry.key != LEASE]
    if not entries:
        raise MissingInputError(f"there is no run {name!r} in {bucket.uri}: `ddpm runs list` shows those there are")
    size_bytes = sum(entry.size_bytes for entry in entries)
    if not certain:
        raise BadRequestError(
            f"{run.uri} has {len(entries):,} objects of {size_bytes:,} bytes, its checkpoints and pictures among them: "
            "add --yes to delete them for good"
        )
    lease = Lease.take(run, records.highest_fence(run), 0.0, stop, note)
    try:
        read, _ = being_read(run)
        if read:
            raise LostRunError(f"somebody samples from {run.uri}/{max(read).key}: wait until that is done, or stop it")
        # Listed anew, for whoever held the run before may have written since.
        deleted = _delete(run, lease, stop)
    finally:
        lease.close()
    print(f"deleted {run.uri}: {deleted:,} objects, {size_bytes:,} bytes")


def _delete(run: Store, lease: Lease, stop: Stop) -> int:
    keys = sorted((entry.key for entry in run.list() if entry.key != LEASE), key=_turn)
    with Progress("deleting", total=len(keys), unit="objects") as bar:
        for number, key in enumerate(keys):
            stop.check(f"after {number:,} of {len(keys):,} objects")
            lease.confirm()
            run.delete(key)
            bar.update(number + 1)
    return len(keys)


def _turn(key: str) -> tuple[int, str]:
    folder = key.split("/")[0]
    if key == records.CONFIG:
        return 0, key
    if folder == FOLDER:
        return (1 if key.endswith("/MANIFEST.json") else 2), key
    return (4 if folder == records.ATTEMPTS else 3), key

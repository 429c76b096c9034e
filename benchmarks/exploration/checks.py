"""The invariants of the protocols, checked at each change of the bucket; `docs/protocols.md` states them for people."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from benchmarks.exploration.training import BATCH_IMAGES, DATASET_IMAGES, RUN, ending, rows_of
from benchmarks.exploration.world import Process, Request, Violation, World
from job.coordination.lease import EXPIRE_SECONDS, LEASE_KEY
from job.exits import BucketAwayError, LostRunError, MissingInputError, StoppedError
from job.runs import layout
from job.runs.checkpoints import Manifest
from job.runs.layout import CheckpointRef, ObjectKind

REPLACED = ("LATEST", "status.json", LEASE_KEY)
"""Names of the objects that are written more than once."""
ORDERLY = (LostRunError, StoppedError, BucketAwayError)
"""The errors with which a disturbed process may end: the same command goes on."""


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes as a record has it."""
    return hashlib.sha256(data).hexdigest()


class Checks:
    """The invariants of every world: objects are created once, and processes end in an orderly way."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.result: Any = None
        """The result of the work, after `at_end`."""
        world.observe, world.asked = self.observe, self.asked

    def asked(self, request: Request) -> None:
        """Checks a request before it is sent."""

    def observe(self, request: Request, before: bytes | None) -> None:
        """Checks a change of the bucket."""
        name = request.key.rpartition("/")[2]
        is_new = before is None or before == request.data or request.op == "delete"
        if not is_new and name not in REPLACED and "/reading/" not in request.key:
            raise Violation(f"{request.key} was overwritten with other content by {request.process.name}")

    def ended(self, process: Process) -> None:
        """Checks how a process ended.

        Raises:
            Violation: it failed, though nothing was wrong that the same command could not go on from.
        """
        error = process.thread_error or (None if isinstance(process.error, ORDERLY) else process.error)
        if error is not None and not process.was_killed:
            kind = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
            raise Violation(f"{process.name} failed: {type(error).__name__}{kind}: {error}")

    def at_end(self) -> None:
        """Checks the bucket after the last attempt, which nothing disturbed."""


class LeaseChecks(Checks):
    """One writer at a time: fences grow, and a lease is taken only from one who released it, is dead or was silent."""

    lease = f"{RUN}/{LEASE_KEY}"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._record: dict[str, Any] = {}
        self._written_at = 0.0
        self._owners = dict[str, Process]()
        self._sure = dict[Process, tuple[float, float]]()
        """When each process last wrote its lease, and how long it had been suspended before."""

    def observe(self, request: Request, before: bytes | None) -> None:
        """Checks a write of the lease."""
        super().observe(request, before)
        if request.key != self.lease or request.op == "delete":
            return
        old, new, process = self._record, json.loads(request.data), request.process
        owner = self._owners.setdefault(new["holder"], process)
        if owner is not process:
            raise Violation(f"{process.name} wrote the lease of {owner.name}")
        if old and old["holder"] != new["holder"]:
            if new["fence"] <= old["fence"]:
                raise Violation(f"the fence of {process.name} is {new['fence']} after {old['fence']}")
            silent = self.world.now - self._written_at
            is_dead = self._owners[old["holder"]].is_dead and old["process"]["host"] == process.host
            if not old["released"] and not is_dead and silent < EXPIRE_SECONDS:
                raise Violation(
                    f"{process.name} took the lease of {self._owners[old['holder']].name}, "
                    f"which had renewed it {silent:g} s before"
                )
        elif old and (new["renewal"] <= old["renewal"] or new["fence"] != old["fence"]):
            raise Violation(f"{process.name} wrote its lease backwards")
        self._record, self._written_at = new, self.world.now
        self._sure[process], process.unknown_seconds = (self.world.now, process.frozen_seconds), 0.0

    def check_holds(self, process: Process, what: str, *, commits: bool) -> None:
        """Checks that a process has renewed its lease lately.

        It could not know of a suspension before the answer to its renewal; nor, as it looks for readers between its
        renewal and a deletion, of one before a deletion.
        """
        if process not in self._sure:
            raise Violation(f"{process.name} {what} without ever having had the lease")
        written_at, frozen_seconds = self._sure[process]
        unknown = process.unknown_seconds if commits else process.frozen_seconds - frozen_seconds
        age = self.world.now - written_at - unknown
        if age >= EXPIRE_SECONDS:
            raise Violation(f"{process.name} {what} {age:g} s after the last renewal of its lease")
        if self._record["released"] and self._owners[self._record["holder"]] is process:
            raise Violation(f"{process.name} {what} after it released the lease")


class RunChecks(LeaseChecks):
    """A checkpoint that is committed is whole until its manifest is deleted, and the newest one stays."""

    def __init__(self, world: World, undisturbed: dict[str, Any] | None) -> None:
        super().__init__(world)
        self._undisturbed = undisturbed
        self._named = dict[CheckpointRef, dict[str, str]]()
        self._retired = dict[CheckpointRef, Process]()
        """The process that began to delete a checkpoint, by its name."""
        self._late = set[CheckpointRef]()
        """Manifests that took effect after a newer one, such as a replaced writer's: objects may be gone by then."""

    def asked(self, request: Request) -> None:
        """Checks that only the holder of the lease commits and deletes."""
        if not request.key.startswith(f"{RUN}/") or not request.process.name.startswith(("attempt", "last")):
            return
        place = layout.located(request.key.removeprefix(f"{RUN}/"))
        kind = place.kind
        if request.op == "delete" and kind is ObjectKind.MANIFEST:
            self._retired[place.checkpoint] = request.process
        elif self._retired.get(place.checkpoint) is request.process:
            # The rest of a checkpoint that it had the right to delete.
            return
        if request.op == "delete" and kind not in (ObjectKind.PROBE, ObjectKind.READER):
            self.check_holds(request.process, f"deletes {request.key}", commits=False)
        elif request.writes and kind is ObjectKind.MANIFEST:
            self.check_holds(request.process, f"commits {request.key}", commits=True)

    def observe(self, request: Request, before: bytes | None) -> None:
        """Checks a change of the run's folder."""
        super().observe(request, before)
        key = request.key.removeprefix(f"{RUN}/")
        place = layout.located(key)
        if request.op == "delete":
            if place.kind is ObjectKind.MANIFEST and before is not None:
                newest = max(self._named, default=place.checkpoint)
                ends = [ref for ref in self._named if not ref.images_seen % DATASET_IMAGES and ref not in self._late]
                del self._named[place.checkpoint]
                if place.checkpoint == newest:
                    raise Violation(f"{request.process.name} deleted the newest checkpoint, {place.checkpoint}")
                # Without the dataset, which is not in this bucket, a prune knows no epochs.
                if not request.process.name.startswith("pruning") and place.checkpoint == max(ends, default=None):
                    raise Violation(f"{request.process.name} deleted the last end of an epoch, {place.checkpoint}")
            for ref, objects in self._named.items():
                if key in objects and ref not in self._late and before is not None:
                    raise Violation(f"{request.process.name} deleted {key}, which the manifest of {ref} names")
        elif place.kind is ObjectKind.MANIFEST:
            self._check_commit(request, place.checkpoint)

    def _check_commit(self, request: Request, ref: CheckpointRef) -> None:
        if ref in self._named:
            return
        manifest = Manifest.from_json(request.data, request.key)
        is_late = bool(self._named) and max(self._named) > ref
        self._named[ref] = manifest.objects
        if is_late:
            self._late.add(ref)
            return
        for key, wanted in manifest.objects.items():
            content = self.world.objects.get(f"{RUN}/{key}")
            if content is None or sha256(content[0]) != wanted:
                state = "is missing" if content is None else "differs"
                raise Violation(f"{request.process.name} committed {ref}, but {key} {state}")
        seen = [json.loads(line)["images_seen"] for line in rows_of(self.world.objects, manifest).splitlines()]
        if seen != [*range(BATCH_IMAGES, ref.images_seen + 1, BATCH_IMAGES)]:
            raise Violation(f"{request.process.name} committed {ref} with the rows of {seen}")

    def at_end(self) -> None:
        """Checks that the run ends with what an undisturbed one ends with."""
        ref = max(self._named, default=None)
        if ref is None:
            raise Violation("the run has no checkpoint")
        manifest = Manifest.from_json(self.world.objects[f"{RUN}/{ref.manifest_key}"][0], "manifest")
        self.result = ending(self.world.objects, manifest)
        for name, value in (self._undisturbed or {}).items():
            if self.result[name] != value:
                raise Violation(f"the {name} at the end are {self.result[name]} instead of {value}")


class ReadChecks(RunChecks):
    """A reader that began finds everything until its end, unless it began in the middle of a deletion."""

    def __init__(self, world: World, undisturbed: Any) -> None:
        super().__init__(world, undisturbed)
        self._marked_at, self._looked_at = dict[str, int](), dict[Process, int]()
        self._raced = set[str]()
        """Checkpoints that were marked between the last look for marks and the deletion of the manifest."""

    def asked(self, request: Request) -> None:
        """Notes a look for marks."""
        super().asked(request)
        if request.op == "list" and request.key.endswith("/reading/"):
            self._looked_at[request.process] = self.world.requests

    def observe(self, request: Request, before: bytes | None) -> None:
        """Notes marks, and manifests that are deleted in spite of one."""
        super().observe(request, before)
        place = layout.located(request.key.removeprefix(f"{RUN}/"))
        if place.kind is ObjectKind.READER and request.op == "put":
            self._marked_at[str(place.checkpoint)] = self.world.requests
        elif place.kind is ObjectKind.MANIFEST and request.op == "delete":
            looked_at = self._looked_at.get(request.process, self.world.requests)
            if self._marked_at.get(str(place.checkpoint), 0) > looked_at:
                self._raced.add(place.checkpoint.manifest_key)

    def ended(self, process: Process) -> None:
        """Checks how a process ended."""
        is_early = isinstance(process.error, MissingInputError) and (
            "has no checkpoint yet" in str(process.error) or "there is no run" in str(process.error)
        )
        is_raced = isinstance(process.error, MissingInputError) and any(
            key in str(process.error) for key in self._raced
        )
        if is_early or is_raced:
            process.error = None
        super().ended(process)

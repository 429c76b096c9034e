"""Commands that work on a run without its lease, while it trains: they mark the checkpoint that they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.exploration import runtime, training
from benchmarks.exploration.checks import RunChecks
from benchmarks.exploration.store import SimulatedStore
from benchmarks.exploration.world import Process, Request, World
from job.exits import MissingInputError
from job.runs import layout
from job.runs.checkpoints import choose, restore
from job.runs.layout import ObjectKind
from job.runs.retention import reading_chosen
from job.verbs import averages, upkeep

STD = 0.1
"""The width of the average that is made: between those in the checkpoint."""


def read(world: World, process: Process) -> None:
    """Reads the newest checkpoint twice, as `ddpm sample` does: a mark keeps it meanwhile."""
    run = SimulatedStore(world, process).sub(training.RUN)
    with reading_chosen(run, lambda: choose(run, "latest", training.DATASET_IMAGES, training.BATCH_IMAGES)) as found:
        refs, renew = found
        for _ in range(2):
            restore(run, refs[0], groups=("model",))
            renew()
            world.sleep(4.0)


def average(world: World, process: Process) -> None:
    """Makes an average of the newest checkpoint, as `ddpm ema` does."""
    averages.make_averages("sim://bucket", "r", STD, "latest")


def prune(world: World, process: Process) -> None:
    """Prunes the run, as `ddpm runs prune` does."""
    upkeep.prune_run("sim://bucket", "r", keep_last=None, dry_run=False)


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
        place = layout.located(request.key.removeprefix(f"{training.RUN}/"))
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


@contextmanager
def opened_here() -> Iterator[None]:
    """Has commands open the bucket of their world until the context ends."""

    def store(*_: Any) -> SimulatedStore:
        return SimulatedStore(runtime.world(), runtime.world().process)

    def stop() -> Any:
        return SimpleNamespace(install=lambda: runtime.world().process.stop)

    with ExitStack() as stack:
        for module in (averages, upkeep):
            name = "open_bucket" if module is averages else "open_store"
            stack.enter_context(patch.object(module, name, store))
            stack.enter_context(patch.object(module, "Stop", stop))
            stack.enter_context(patch.object(module, "print", lambda *_: None, create=True))
        # To read the configuration takes longer than the rest, and it never changes.
        stack.enter_context(patch("job.runs.records.parsed_config", lambda *_: training.config()))
        stack.enter_context(patch("job.runs.records.as_last_changed", lambda run, config: config))
        yield

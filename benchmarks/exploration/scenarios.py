"""The worlds that are explored: which processes do which work at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.exploration import shared, training
from benchmarks.exploration.checks import Checks, ReadChecks, RunChecks
from benchmarks.exploration.world import Disturbance, Process, World

Main = Callable[[World, Process], Any]
RESTARTS = 2
"""How often the work of a killed or interrupted process is begun again, while others work."""


@dataclass
class Scenario:
    """Processes that work at the same time, and what has to hold.

    Attributes:
        name: as a schedule names it.
        what: a line for people.
        workers: the work of each process by its name, with its host, and the seconds after which it begins.
        last: the work of the last attempt, which nothing disturbs.
        checks: makes the invariants; takes what an undisturbed world ended with.
        content_versions: whether versions are hashes of the content, as on a local disk, and not generations.
        prepared: fills the bucket.
    """

    name: str
    what: str
    workers: dict[str, tuple[str, float, Main]]
    last: Main
    checks: Callable[[World, Any], Checks]
    content_versions: bool = False
    prepared: Callable[[World], None] = lambda world: None
    undisturbed: Any = field(default=None, repr=False)
    requests: int = 0
    """Of an undisturbed world, with the last attempt."""
    singles: Sequence[tuple[int, Disturbance]] = ()
    """Every single disturbance of an undisturbed world, by number of the request."""


def _again(world: World, checks: Checks, name: str, host: str, main: Main, left: int) -> None:
    """Starts a process, and again when it was killed or had to stop."""

    def ended(process: Process) -> None:
        checks.ended(process)
        if (process.was_killed or process.error) and left:
            world.at(1.0, lambda: _again(world, checks, f"{name}'", host, main, left - 1))

    world.spawn(name, host, lambda process: main(world, process), ended)


def play(scenario: Scenario, world: World) -> Checks:
    """Runs a world to its end, then the last attempt; returns the checks, all of which held.

    Raises:
        Violation: an invariant does not hold.
    """
    scenario.prepared(world)
    checks = scenario.checks(world, scenario.undisturbed)
    for name, (host, after, main) in scenario.workers.items():
        world.at(after, partial(_again, world, checks, name, host, main, RESTARTS))
    world.run()
    world.calm()
    world.spawn("last attempt", "elsewhere", lambda process: scenario.last(world, process), checks.ended)
    world.run()
    last = world.processes[-1]
    if last.error is not None:
        raise last.error
    checks.at_end()
    return checks


def _shared(name: str, what: str, work: Any, checks: Any, **more: Any) -> Scenario:
    """Returns the scenario of two machines that share work."""
    workers = {"machine A": ("one", 0.0, partial(work, "0/2")), "machine B": ("two", 1.0, partial(work, "1/2"))}
    return Scenario(name, what, workers, partial(work, "0/1"), checks, **more)


def _watched(name: str, what: str, others: dict[str, tuple[str, float, Main]], **more: Any) -> Scenario:
    """Returns the scenario of an attempt at a run, and of others that work on that run meanwhile."""
    workers = {"attempt A": ("one", 0.0, _TRAIN), **others}
    return Scenario(name, what, workers, _TRAIN, **{"checks": ReadChecks, **more})


_TRAIN = partial(training.attempt, 600.0)
_SCENARIOS = (
    _watched(
        "train",
        "two attempts at one run on two machines, of which one waits for the other",
        {"attempt B": ("two", 4.0, _TRAIN)},
        checks=RunChecks,
    ),
    _watched(
        "train-here",
        "two attempts on one machine, in a folder: a dead holder is known to be dead",
        {"attempt B": ("one", 4.0, partial(training.attempt, 0.0))},
        checks=RunChecks,
        content_versions=True,
    ),
    _watched("read", "an attempt, and a reader of its newest checkpoint", {"reader": ("two", 4.0, training.read)}),
    _watched(
        "read-meanwhile",
        "an attempt, and a reader that begins while a checkpoint is retired",
        {"reader": ("two", 6.0, training.read)},
    ),
    _watched(
        "average",
        "an attempt, and two machines that make the same average of a checkpoint",
        {"averager B": ("two", 7.0, training.average), "averager C": ("three", 7.0, training.average)},
    ),
    _watched("prune", "two attempts, and a prune of their run", {"pruning": ("two", 8.0, training.prune)}),
    _shared("pack", "two machines that pack a dataset together", shared.pack, shared.PackChecks),
    Scenario(
        "pack-twice",
        "two people who pack the same dataset, in a folder",
        {"packer A": ("one", 0.0, partial(shared.pack, "")), "packer B": ("two", 1.0, partial(shared.pack, ""))},
        partial(shared.pack, "0/1"),
        shared.PackChecks,
        content_versions=True,
    ),
    _shared(
        "encode", "two machines that encode a dataset", shared.encode, shared.EncodeChecks, prepared=shared.with_source
    ),
    _shared("sample", "two machines that draw a set of images", shared.sample, shared.SampleChecks),
    Scenario(
        "sample-twice",
        "two machines that draw the same set without sharing it, in step",
        {"machine A": ("one", 0.0, partial(shared.sample, "")), "machine B": ("two", 0.0, partial(shared.sample, ""))},
        partial(shared.sample, "0/1"),
        shared.SampleChecks,
    ),
    _shared("score", "two machines that score a checkpoint", shared.score, shared.ScoreChecks),
)


def all_scenarios() -> dict[str, Scenario]:
    """Returns the scenarios by name, none of them measured yet."""
    return {scenario.name: replace(scenario) for scenario in _SCENARIOS}

"""The worlds that are explored: which processes do which work at the same time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.exploration import training
from benchmarks.exploration.checks import Checks, RunChecks
from benchmarks.exploration.world import Process, World

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
    """Of an undisturbed world, but for the last attempt."""


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


def _train(wait_seconds: float) -> Main:
    return lambda world, process: training.attempt(world, process, wait_seconds)


def all_scenarios() -> dict[str, Scenario]:
    """Returns the scenarios by name."""
    return {
        scenario.name: scenario
        for scenario in (
            Scenario(
                "train",
                "two attempts at one run on two machines, of which one waits for the other",
                {"attempt A": ("one", 0, _train(600.0)), "attempt B": ("two", 4, _train(600.0))},
                _train(600.0),
                RunChecks,
            ),
            Scenario(
                "train-here",
                "two attempts on one machine, in a folder: a dead holder is known to be dead",
                {"attempt A": ("one", 0, _train(600.0)), "attempt B": ("one", 4, _train(0.0))},
                _train(600.0),
                RunChecks,
                content_versions=True,
            ),
        )
    }

"""Plays the real protocols over a bucket in memory, in many orders and with many faults.

A scenario is played first with every single disturbance, then with random ones of more and more. A schedule is a
scenario and its disturbances, such as train:17c,40z25: request 17 never happens, since its process is killed before it,
and at request 40 a process is suspended for 25 seconds. --list shows scenarios, letters, mutations.

Exit code: 0 if all invariants hold, else 1, with the shortest schedule that fails.
Example: python -m benchmarks.exploration --schedules 100000 --seed 1
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

import torch

from benchmarks.exploration import runtime, shared, training
from benchmarks.exploration.mutations import MUTATIONS, planted
from benchmarks.exploration.scenarios import Scenario, all_scenarios, play
from benchmarks.exploration.world import DISTURBANCES, Disturbance, Planned, Request, Step, Violation, World
from job.platform import usable_cores

READS = tuple(Planned.parse("0s,1s1,2c,3z25,4Z25,5e,6k,7w6,8o30").disturbances.values())
WRITES = (*READS, *Planned.parse("0C,1a25,2l,3t4,4t12,5t30,6w12").disturbances.values())
SWITCHES = tuple(Planned.parse("0s,1s,2s1").disturbances.values())


def possible(request: Request) -> tuple[Disturbance, ...]:
    """Returns what may happen at a request: only a write can be late or lost."""
    return WRITES if request.writes else READS


class Sparse:
    """Disturbs requests of some numbers at random, and others by a change of threads with a small probability."""

    def __init__(self, generator: random.Random, numbers: set[int], switch_probability: float) -> None:
        self.disturbances = dict[int, Disturbance]()
        self._generator, self._numbers, self._probability = generator, numbers, switch_probability

    def __call__(self, number: int, request: Request) -> Disturbance | None:
        """Returns the disturbance of a request, and remembers it."""
        if number in self._numbers:
            self.disturbances[number] = self._generator.choice(possible(request))
        elif self._probability and self._generator.random() < self._probability:
            self.disturbances[number] = self._generator.choice(SWITCHES)
        return self.disturbances.get(number)


@dataclass
class Played:
    """A schedule and its outcome."""

    scenario: str
    disturbances: dict[int, Disturbance]
    violation: str
    trace: list[Step]

    @property
    def schedule(self) -> str:
        """As `--replay` takes it."""
        return f"{self.scenario}:{Planned(self.disturbances)}"

    @property
    def digest(self) -> bytes:
        """A hash of everything that happened, in its order: schedules with equal ones are the same interleaving."""
        text = "\n".join(f"{step.now:g} {step.who} {step.op} {step.key} {step.outcome}" for step in self.trace)
        return hashlib.blake2b(f"{self.scenario}\n{text}".encode(), digest_size=8).digest()


def played(scenario: Scenario, chooser: Planned | Sparse) -> Played:
    """Plays a schedule in a world of its own; call it within `runtime.simulated`."""
    world, violation = World(chooser, content_versions=scenario.content_versions), ""
    with runtime.running(world):
        try:
            play(scenario, world)
        except Violation as error:
            violation = str(error)
        except Exception as error:
            violation = f"{type(error).__name__}: {error}"
    return Played(scenario.name, chooser.disturbances, violation, world.trace)


def measure(scenario: Scenario) -> Played:
    """Plays the undisturbed world, by whose end the others are judged."""
    requests = list[Request]()

    def count(number: int, request: Request) -> None:
        requests.append(request)

    world = World(count, content_versions=scenario.content_versions)
    with runtime.running(world):
        checks = play(scenario, world)
    scenario.undisturbed, scenario.requests = checks.result, len(requests)
    scenario.singles = [(number, one) for number, request in enumerate(requests) for one in possible(request)]
    return Played(scenario.name, {}, "", world.trace)


def schedules(scenario: Scenario, seed: int) -> Iterator[Planned | Sparse]:
    """Yields schedules without end: none, each single disturbance, then several at random."""
    yield Planned({})
    singles = list(scenario.singles)
    random.Random(seed).shuffle(singles)
    for number, one in singles:
        yield Planned({number: one})
    yield from deeper(scenario, seed)


def deeper(scenario: Scenario, seed: int) -> Iterator[Sparse]:
    """Yields random schedules of two to five disturbances, a quarter of them with many changes of threads besides."""
    round_number = 0
    while True:
        generator = random.Random(f"{seed} {scenario.name} {round_number}")
        depth, reach = generator.choice((2, 2, 2, 3, 3, 4, 5)), int(scenario.requests * 1.5)
        numbers = set(generator.sample(range(reach), depth))
        yield Sparse(generator, numbers, 0.15 if round_number % 4 == 3 else 0.0)
        round_number += 1


def shortest(scenario: Scenario, failed: Played) -> Played:
    """Returns the schedule with all disturbances left out without which it fails, too."""
    is_shorter = True
    while is_shorter:
        is_shorter = False
        for number in sorted(failed.disturbances, reverse=True):
            fewer = {other: one for other, one in failed.disturbances.items() if other != number}
            again = played(scenario, Planned(fewer))
            if again.violation:
                failed, is_shorter = again, True
                break
    return failed


def replay(text: str, mutation: str = "") -> Played:
    """Plays a schedule such as `train:17c,40z25`.

    Raises:
        ValueError: the text is not a schedule.
    """
    name, _, words = text.partition(":")
    scenarios = all_scenarios()
    if name not in scenarios:
        raise ValueError(f"{name!r} is not a scenario: there are {', '.join(scenarios)}")
    planned = Planned.parse(words)
    with workplace():
        measure(scenarios[name])
        with planted(mutation):
            return played(scenarios[name], planned)


@contextmanager
def workplace() -> Iterator[None]:
    """Opens the simulation, with a folder in memory for local files."""
    before, in_memory = tempfile.tempdir, "/dev/shm"
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else None) as folder:
        tempfile.tempdir = folder
        try:
            with runtime.simulated(), shared.small_work(), training.opened_here():
                yield
        finally:
            tempfile.tempdir = before


@dataclass
class Report:
    """The results of an exploration."""

    schedules: Counter[str] = field(default_factory=Counter)
    distinct: dict[str, set[bytes]] = field(default_factory=dict)
    failed: list[Played] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Report) -> None:
        """Adds the results of another process."""
        self.schedules += other.schedules
        for name, digests in other.distinct.items():
            self.distinct.setdefault(name, set()).update(digests)
        self.failed += other.failed


def explore(names: list[str], count: int, seed: int, processes: int) -> Report:
    """Plays `count` schedules in so many processes, equally many of each scenario."""
    began, report = time.monotonic(), Report()
    shares = [(names, count, seed, index, processes) for index in range(processes)]
    if processes == 1:
        report.add(_share(*shares[0]))
    else:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for part in pool.starmap(_share, shares, chunksize=1):
                report.add(part)
    report.seconds = time.monotonic() - began
    return report


def _share(names: list[str], count: int, seed: int, index: int, processes: int) -> Report:
    """Plays every `processes`-th schedule."""
    report, scenarios = Report(), all_scenarios()
    # The tensors have two numbers each.
    torch.set_num_threads(1)
    with workplace():
        for place, name in enumerate(names):
            scenario = scenarios[name]
            measure(scenario)
            # The collector need not look again at objects that stay.
            gc.freeze()
            wanted = count // len(names) + (place < count % len(names))
            digests = report.distinct.setdefault(name, set())
            for number, chooser in enumerate(schedules(scenario, seed)):
                if number >= wanted or report.failed:
                    break
                if number % processes == index:
                    outcome = played(scenario, chooser)
                    report.schedules[name] += 1
                    digests.add(outcome.digest)
                    if outcome.violation:
                        report.failed.append(shortest(scenario, outcome))
    return report


def found_after(mutation: str, names: list[str], most: int, seed: int) -> tuple[int, Played | None]:
    """Returns the number of schedules until a planted mutation shows, and the shortest that shows it."""
    scenarios, count = all_scenarios(), 0
    with workplace():
        streams = list[Iterator[tuple[Scenario, Planned | Sparse]]]()
        for name, _, words in (text.partition(":") for text in names):
            measure(scenario := scenarios[name])
            streams.append(zip(repeat(scenario), [Planned.parse(words)] if words else schedules(scenario, seed)))
        with planted(mutation):
            for scenario, chooser in islice(chain.from_iterable(zip(*streams, strict=False)), most):
                count += 1
                outcome = played(scenario, chooser)
                if outcome.violation:
                    return count, shortest(scenario, outcome)
    return count, None


def main() -> int:
    """Explores as the command line says; returns the exit code."""
    options = _options()
    if options.list:
        print(listing())
        return 0
    if options.replay:
        return _replayed(options)
    if options.mutations:
        return _all_found(options)
    report = explore(options.scenarios, options.schedules, options.seed, options.processes)
    print(table(report, options.seed))
    for failed in report.failed:
        print(f"\n{described(failed, '')}")
    return 1 if report.failed else 0


def _replayed(options: argparse.Namespace) -> int:
    try:
        outcome = replay(options.replay, options.mutation)
    except ValueError as error:
        print(f"--replay {options.replay}: {error}", file=sys.stderr)
        return 2
    print(described(outcome, options.mutation))
    return 1 if outcome.violation else 0


def _all_found(options: argparse.Namespace) -> int:
    is_lacking = False
    for name, mutation in MUTATIONS.items():
        count, found = found_after(name, list(mutation.scenarios), options.schedules, options.seed)
        is_lacking |= found is None
        shown = f"{count:>6,}  {found.schedule}" if found else f"not in {count:,}"
        print(f"{name:<28}{shown:<36}  {mutation.what}", flush=True)
    return 1 if is_lacking else 0


def described(outcome: Played, mutation: str) -> str:
    """Returns a schedule for people: a line for each request, the verdict, and the command that replays it."""
    rows = [(str(step.number), f"{step.now:g} s", step.who, step.op, step.key, step.outcome) for step in outcome.trace]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    broken = f" --mutation {mutation}" if mutation else ""
    verdict = f"VIOLATION  {outcome.violation}" if outcome.violation else "All invariants hold."
    again = f"again: make explore ARGS='--replay {outcome.schedule}{broken}'"
    return "\n".join([*lines, "", verdict, again])


def table(report: Report, seed: int) -> str:
    """Returns the numbers of an exploration."""
    names, what = list(report.schedules), all_scenarios()
    played, distinct = report.schedules.total(), sum(map(len, report.distinct.values()))
    rows = [("scenario", "schedules", "distinct", "")]
    rows += [
        (name, f"{report.schedules[name]:,}", f"{len(report.distinct[name]):,}", what[name].what) for name in names
    ]
    rows.append(("all", f"{played:,}", f"{distinct:,}", f"seed {seed}, {report.seconds:.0f} s"))
    lines = [f"{name:<12}{count:>10}{number:>10}  {text}".rstrip() for name, count, number, text in rows]
    found = len(report.failed)
    return "\n".join([*lines, "", f"{found} violation{'s' * (found != 1)}"])


def listing() -> str:
    """Returns all scenarios, disturbances and mutations, a line each."""
    lines = ["scenarios:", *(f"  {name:<12}{one.what}" for name, one in all_scenarios().items())]
    lines += ["disturbances of a request:", *(f"  {letter:<12}{what}" for letter, what in DISTURBANCES.items())]
    lines += ["mutations:", *(f"  {name:<26}{one.what}" for name, one in MUTATIONS.items())]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exploration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names, cores = list(all_scenarios()), usable_cores()
    add = parser.add_argument
    add("--schedules", type=int, default=15_000, metavar="N", help="number of schedules (15,000)")
    add("--seed", type=int, default=1, metavar="S", help="seed of the random schedules (1)")
    add("--scenarios", default="", metavar="NAMES", help="only these, such as train,pack (all)")
    add("--processes", type=int, default=cores, metavar="N", help=f"processes ({cores}: all cores)")
    add("--replay", default="", metavar="SCHEDULE", help="play one schedule, and show each request")
    add("--mutation", default="", choices=["", *MUTATIONS], metavar="NAME", help="break this for --replay")
    add("--mutations", action="store_true", help="count the schedules until each mutation is found")
    add("--list", action="store_true", help="list scenarios, disturbances and mutations, and exit")
    options = parser.parse_args()
    options.scenarios = options.scenarios.split(",") if options.scenarios else names
    if unknown := set(options.scenarios) - set(names):
        parser.error(f"unknown scenario {min(unknown)!r}: --list shows all")
    if options.schedules < 1 or options.processes < 1:
        parser.error("--schedules and --processes: use 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())

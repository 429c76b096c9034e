"""`python -m benchmarks.exploration`: plays the protocols in many orders, and shows the shortest that fails."""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.exploration.exploring import Played, Report, explore, found_after, replay
from benchmarks.exploration.mutations import MUTATIONS
from benchmarks.exploration.scenarios import all_scenarios
from benchmarks.exploration.world import DISTURBANCES

EPILOG = """\
A schedule is a scenario and its disturbances, such as train:17c,40z25: request 17 never happens, since its process is
killed before it, and at request 40 a process is suspended for 25 seconds. --list shows scenarios, letters, mutations.
Exit code: 0 if all invariants hold, else 1, with the shortest schedule that fails.
Example: python -m benchmarks.exploration --schedules 100000 --seed 1"""


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
        description="Plays the real protocols over a bucket in memory, in many orders and with many faults.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names, cores = list(all_scenarios()), len(os.sched_getaffinity(0))
    parser.add_argument("--schedules", type=int, default=15_000, metavar="N", help="number of schedules (15,000)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the random schedules (1)")
    parser.add_argument("--scenarios", default="", metavar="NAMES", help="only these, such as train,pack (all)")
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help=f"processes ({cores}: all cores)")
    parser.add_argument("--replay", default="", metavar="SCHEDULE", help="play one schedule, and show each request")
    parser.add_argument(
        "--mutation", default="", choices=["", *MUTATIONS], metavar="NAME", help="break this for --replay"
    )
    parser.add_argument("--mutations", action="store_true", help="count the schedules until each mutation is found")
    parser.add_argument("--list", action="store_true", help="list scenarios, disturbances and mutations, and exit")
    options = parser.parse_args()
    options.scenarios = options.scenarios.split(",") if options.scenarios else names
    if unknown := set(options.scenarios) - set(names):
        parser.error(f"unknown scenario {min(unknown)!r}: --list shows all")
    if options.schedules < 1 or options.processes < 1:
        parser.error("--schedules and --processes: use 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks [PART …] [--quick]`: measures, prints a table, writes `latest.json` beside this file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measuring import BUSY_LOAD, Figure, machine

PARTS = {
    "training_step": "computing",
    "exact": "computing",
    "loader": "loading",
    "cold": "loading",
    "checkpoint": "saving",
    "sampling": "computing",
    "store": "store",
    "restore": "saving",
    "large_index": "large_index",
    "requests": "large_index",
}
"""The module of each part, a function of the same name."""
ON_REQUEST = ("restore", "large_index", "requests")
"""Parts that take gigabytes or minutes, and only run when they are named."""
LATEST = Path(__file__).with_name("latest.json")


def main() -> None:
    """Runs the chosen parts. A missed target does not fail the command, since machines differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed, against peers, on this machine.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all but the last three")
    parser.add_argument("--quick", action="store_true", help="tiny networks, no targets: shows that everything runs")
    parser.add_argument("--output", type=Path, default=LATEST, metavar="FILE", help=f"the JSON (default: {LATEST})")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}: use {', '.join(PARTS)}")
    began, there, figures = time.time(), machine(), list[Figure]()
    for part in options.parts or [part for part in PARTS if part not in ON_REQUEST]:
        print(f"measuring: {part.replace('_', ' ')}", file=sys.stderr)
        measured: list[Figure] = getattr(import_module(f"benchmarks.{PARTS[part]}"), part)(options.quick)
        figures += [replace(f, at_least=None, at_most=None) for f in measured] if options.quick else measured
        # Written after each part, so that an interruption does not lose the finished parts.
        report = report_of(figures, there, began, **{figure.key: figure.value for figure in figures})
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    show(figures, report, options.output)


def report_of(figures: list[Figure], there: dict[str, Any], began: float, **more: Any) -> dict[str, Any]:
    """Returns figures with their machine, command, date and duration, for JSON."""
    program = Path(sys.argv[0]).parent.relative_to(Path(__file__).parents[1]).as_posix().replace("/", ".")
    return {
        **more,
        "machine": there,
        "command": " ".join(["python", "-m", program, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "minutes": round((time.time() - began) / 60, 2),
        "figures": {figure.key: figure.to_dict() for figure in figures},
    }


def show(figures: list[Figure], report: dict[str, Any], output: Path) -> None:
    """Prints the table, and the machine of its numbers."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("", "median", "min – max", "target", "", "beside")
    for figure in figures:
        low, high = min(figure.samples), max(figure.samples)
        table.add_row(
            escape(figure.what),
            f"[bold]{number(figure.value)}[/]",
            f"{number(low)} – {number(high)}" if len(figure.samples) > 1 else "",
            target(figure),
            {True: "[green]met[/]", False: "[red]MISSED[/]", None: ""}[figure.met],
            escape(figure.beside),
        )
    console.print(table)
    there = report["machine"]
    console.print(
        f"{there['cpu']}, {there['cores']} cores, {there['memory_gigabytes']} GB, torch {there['torch']}; "
        f"{report['date']}, {report['minutes']} min: {report['command']}",
        highlight=False,
    )
    if there["load_before"] > BUSY_LOAD:
        console.print(f"[yellow]the machine was busy before (load {there['load_before']}): measure again when idle[/]")
    console.print(f"written: {output}", highlight=False)


def number(value: float) -> str:
    """Formats three significant digits, or a whole number with its thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def target(figure: Figure) -> str:
    """Returns `≥ 1.8`, `≤ 0.1`, or an empty text without a target."""
    if figure.at_least is not None:
        return f"≥ {number(figure.at_least)}"
    return f"≤ {number(figure.at_most)}" if figure.at_most is not None else ""


if __name__ == "__main__":
    main()

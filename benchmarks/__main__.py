"""`python -m benchmarks [PART …] [--gpu] [--quick]`: measures, prints a table, and writes the numbers as JSON.

Each part has its own process, and a limit of time. One that fails or takes too long is recorded as such, and the others
go on. The JSON is written after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measuring import BUSY_LOAD, ROOT, Figure, machine

PARTS = {
    "training_step": ("computing", 300),
    "exact": ("computing", 300),
    "loader": ("loading", 300),
    "cold": ("loading", 300),
    "checkpoint": ("saving", 300),
    "sampling": ("computing", 300),
    "restore": ("saving", 1200),
    "large_index": ("large_index", 1200),
    "requests": ("large_index", 1200),
}
"""The module of each part, a function of the same name; and the seconds that it may take."""
ON_REQUEST = ("restore", "large_index", "requests")
"""Parts that take gigabytes or minutes, and only run when they are named."""
GPU_PARTS = {
    "training": ("gpu", 180),
    "sampling": ("gpu", 80),
    "loader": ("loading", 80),
    "checkpoint": ("gpu", 70),
    "equality": ("gpu", 120),
}
"""The parts of `benchmarks/gpu.sh`: nine minutes in all."""
LATEST = Path(__file__).with_name("latest.json")


def main() -> None:
    """Runs the chosen parts. A missed target does not fail the command, since machines differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed, against peers, on this machine.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all but the last three")
    parser.add_argument("--gpu", action="store_true", help=f"the parts for a GPU: {', '.join(GPU_PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny networks, no targets: shows that everything runs")
    parser.add_argument("--output", type=Path, default=LATEST, metavar="FILE", help=f"the JSON (default: {LATEST})")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = GPU_PARTS if options.gpu else PARTS
    if unknown := set(options.parts) - set(known):
        parser.error(f"unknown part {min(unknown)!r}: use {', '.join(known)}")
    if options.inside:
        measure(*options.parts, known, options.inside, options.quick)
        return
    began, there, figures, states = time.time(), machine(), list[Figure](), dict[str, Any]()
    for part in options.parts or [part for part in known if options.gpu or part not in ON_REQUEST]:
        print(f"measuring: {part.replace('_', ' ')}, at most {known[part][1]} s", file=sys.stderr)
        words = [*(["--gpu"] if options.gpu else []), *(["--quick"] if options.quick else []), part]
        states[part], found = run_part(words, known[part][1])
        figures += found
        values = {figure.key: figure.value for figure in figures}
        report = report_of(figures, there, began, parts=states, **values)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    show(figures, report, options.output)
    if lacking := {part: entry for part, entry in states.items() if entry["state"] != "done"}:
        sys.exit("\n".join(f"{part}: {entry['state']}\n{entry['why']}" for part, entry in lacking.items()))


def measure(part: str, known: dict[str, tuple[str, int]], folder: Path, is_quick: bool) -> None:
    """Measures a part in this process, and writes its figures into a folder."""
    figures = getattr(import_module(f"benchmarks.{known[part][0]}"), part)(folder, is_quick)
    if is_quick:
        figures = [replace(figure, at_least=None, at_most=None) for figure in figures]
    (folder / "figures.json").write_text(json.dumps([asdict(figure) for figure in figures]))


def run_part(words: list[str], limit_seconds: float) -> tuple[dict[str, Any], list[Figure]]:
    """Measures a part in a process of its own; returns how that ended, and its figures."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="ddpm-bench-") as folder:
        command = [sys.executable, "-m", "benchmarks", "--inside", folder, *words]
        # Its own session: a part that takes too long ends with all its processes.
        process = subprocess.Popen(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=limit_seconds)
            entry: dict[str, Any] = {"state": "failed" if process.returncode else "done"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
            entry = {"state": "out of time", "limit_seconds": limit_seconds}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if entry["state"] != "done":
            entry |= {"exit_code": process.returncode, "why": errors[-2000:]}
        path = Path(folder) / "figures.json"
        figures = [Figure(**each) for each in json.loads(path.read_text())] if path.exists() else []
    return entry | {"seconds": round(time.monotonic() - began, 1)}, figures


def report_of(figures: list[Figure], there: dict[str, Any], began: float, **more: Any) -> dict[str, Any]:
    """Returns figures with their machine, command, date and duration, for JSON."""
    program = Path(sys.argv[0]).parent.relative_to(ROOT).as_posix().replace("/", ".")
    return {
        **more,
        "machine": there,
        "command": " ".join(["python", "-m", program, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "minutes": round((time.time() - began) / 60, 2),
        "figures": {figure.key: asdict(figure) | {"value": figure.value, "met": figure.met} for figure in figures},
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

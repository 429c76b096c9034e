"""`python -m benchmarks.goodput`: productive time ÷ wall time of training that is killed all the time.

Each system trains the same network in the same bucket, and the same kills meet it: SIGKILL for all its processes, then
the same command again at once. Productive time is the images in the newest state that loads at the end, times the
seconds of an image in a run without kills and saves. The peers save at Young's interval for their measured cost; ours
as it does by default. A model from quantities that are measured once predicts each window, and then rarer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.crash_campaign.buckets import KINDS, bucket
from benchmarks.goodput import accounting
from benchmarks.goodput.accounting import WARM_STEPS, Costs, gaps, image_seconds, of_kind, restart_seconds
from benchmarks.goodput.picture import goodput_png
from benchmarks.goodput.systems import LABELS, Attempt, Subject
from benchmarks.measuring import BUSY_LOAD, machine
from job.progress import Progress
from job.sealed import utc_now

TOLERANCE = 0.1
"""The largest relative error of the model."""
SAVES_SECONDS = 1.0
"""The interval of the peers' saves while their cost is measured."""
PEER_SAVES = 5
"""The saves of a peer for each of ours while the cost is measured: they come more often."""
GOALS = {60.0: 0.92, 3600.0: 0.995}
RARE_SECONDS = (600.0, 3600.0)
CURVE_SECONDS = tuple(10 * 2 ** (i / 4) for i in range(43))
TINY = ("model.channels=8", "model.norm_groups=4", "checkpoint.every_epochs=1")


class Measurement:
    """One system: its costs, then its windows."""

    def __init__(self, system: str, subject: Subject, options: argparse.Namespace) -> None:
        self.system, self._subject, self._options = system, subject, options
        self._step_images = subject.step_images(system)
        self.costs, self.interval_images, self.windows = Costs(0, 0, 0, 0), 0.0, list[dict[str, Any]]()
        self.starts: list[tuple[float, list[accounting.Event]]] = []

    def run(self) -> Measurement:
        """Measures everything."""
        self._measure_costs()
        for mean_seconds, kills in self._options.kills:
            if self._options.quick:
                # However busy the machine is, there is something to account for.
                mean_seconds = max(mean_seconds, 2 * self.costs.restart_seconds)
            self.windows.append(self._window(mean_seconds, kills))
        return self

    def expected(self, times: list[float]) -> float:
        """Returns the goodput that the model expects for kills after these times."""
        return self.costs.goodput(times, self.interval(fmean(times)))

    def interval(self, mean_seconds: float) -> float:
        """Returns the images between two saves: Young's for the peers, its own for ours."""
        if self.system == "ours":
            return self.interval_images
        return self.costs.young_images(mean_seconds, self._step_images)

    def _measure_costs(self) -> None:
        """Trains without saves, with saves, and from these saves on."""
        enough, patience = self._options.steps, self._options.patience
        with Progress(f"{self.system}: costs", total=2 + self._options.restarts, unit="runs") as bar:
            calm = self._attempt("calm", "calm", 0)
            calm.wait(lambda: len(of_kind(calm.events, "step")) > WARM_STEPS + enough, patience)
            seconds = image_seconds(of_kind(calm.events, "step"))
            bar.update(1)
            saving = self._attempt("saving", "saving", self._steps(SAVES_SECONDS / seconds))
            wanted = self._options.saves * (1 if self.system == "ours" else PEER_SAVES)
            saving.wait(lambda: self._has_saved(saving.events, wanted), patience)
            bar.update(2)
            starts = [self._attempt_of_restart(number, bar) for number in range(self._options.restarts)] or [saving]
        self.starts += [(start.started, start.events) for start in starts]
        events = saving.events
        if not (spans := accounting.saves(events)):
            raise RuntimeError(f"{self.system} saved nothing within {patience:g} s: raise --patience")
        saved = [0, *(event["at"] for event in of_kind(events, "saved"))]
        self.interval_images = median(two - one for one, two in pairwise(saved))
        self.costs = Costs(
            image_seconds=seconds,
            restart_seconds=fmean(restart_seconds(events, started, seconds) for started, events in self.starts),
            save_seconds=accounting.save_seconds(events, seconds),
            commit_seconds=fmean(end - begin for begin, end in spans),
        )

    def _has_saved(self, events: list[accounting.Event], wanted: int) -> bool:
        """Returns whether training went on after so many saves."""
        spans, steps = accounting.saves(events), of_kind(events, "step")
        return len(spans) >= wanted and steps[-WARM_STEPS]["time"] > spans[wanted - 1][1]

    def _steps(self, images: float) -> int:
        return max(1, round(images / self._step_images))

    def _attempt_of_restart(self, number: int, bar: Progress) -> Attempt:
        start = self._attempt(f"restart-{number}", "saving", 10**9)
        start.wait(lambda: len(of_kind(start.events, "step")) > WARM_STEPS, self._options.patience)
        bar.update(3 + number)
        return start

    def _attempt(self, name: str, run: str, every_steps: int) -> Attempt:
        return Attempt(self._subject, name, self._subject.command(self.system, run, every_steps), self.system)

    def _window(self, mean_seconds: float, kills: int) -> dict[str, Any]:
        """Trains through kills, and returns the account."""
        run, times, attempts = f"kills-{len(self.windows)}", gaps(mean_seconds, kills), list[Attempt]()
        every_steps = self._steps(self.interval(mean_seconds))
        began = time.time()
        with Progress(f"{self.system}: a kill every {mean_seconds:.0f} s", total=round(sum(times)), unit="s") as bar:
            for number, seconds in enumerate(times):
                before = time.time() - began
                attempts.append(self._attempt(f"{run}-{number}", run, every_steps))
                attempts[-1].wait(lambda: False, seconds, lambda passed, before=before: bar.update(before + passed))
        wall_seconds = time.time() - began
        events = [attempt.events for attempt in attempts]
        self.starts += [(attempt.started, of_one) for attempt, of_one in zip(attempts, events, strict=True)]
        at = self._subject.kept_at(self.system, run)
        kept = accounting.lineage(events, at)
        lost, repeated, epochs = accounting.lost_and_repeated(kept, self._subject.dataset)
        if self.system == "ours" and len(kept) != at:
            lost += abs(at - len(kept))
        trained = sum(len(step["images"]) for of_one in events for step in of_kind(of_one, "step"))
        first = [(of_kind(of_one, "step") or [{"time": float("inf")}])[0]["time"] for of_one in events]
        starting = sum(
            min(time_ - attempt.started, seconds)
            for time_, attempt, seconds in zip(first, attempts, times, strict=True)
        )
        pace = self.costs.image_seconds / wall_seconds
        goodput, expected = len(kept) * pace, self.expected(times)
        return {
            "mean_seconds": mean_seconds,
            "gaps_seconds": times,
            "wall_seconds": wall_seconds,
            "goodput": goodput,
            "model": expected,
            "is_valid": abs(expected - goodput) <= TOLERANCE * goodput,
            "kept_images": len(kept),
            "trained_again_images": trained - len(kept),
            "lost_images": lost,
            "repeated_images": repeated,
            "finished_epochs": epochs,
            "interval_images": self.interval(mean_seconds),
            "starting_share": starting / wall_seconds,
            "trained_again_share": (trained - len(kept)) * pace,
            "slower_share": 1 - starting / wall_seconds - trained * pace,
        }

    def report(self) -> dict[str, Any]:
        """Returns everything, for JSON."""
        curve = {seconds: self.expected(gaps(seconds, 101)) for seconds in (*CURVE_SECONDS, *RARE_SECONDS)}
        return {
            "costs": vars(self.costs),
            "default_interval_images": self.interval_images,
            "windows": self.windows,
            "curve": [{"mean_seconds": seconds, "goodput": goodput} for seconds, goodput in sorted(curve.items())],
            "start_seconds": accounting.timeline(self.starts),
        }


def main() -> int:
    """Runs the benchmark; returns 1 if a model misses a measurement by more than its tolerance."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    there, began = machine(), time.time()
    with tempfile.TemporaryDirectory(prefix="ddpm-goodput-") as name:
        folder = Path(name)
        with bucket(options.bucket, folder / "bucket") as uri:
            subject = Subject.prepared(folder, uri.rstrip("/"), tuple(options.set))
            measurements = [Measurement(system, subject, options) for system in options.only]
            # A quick trial shows that everything runs: its systems disturb each other.
            with ThreadPoolExecutor(len(measurements) if options.quick else 1) as pool:
                systems = {one.system: one.report() for one in pool.map(Measurement.run, measurements)}
    report = {
        "systems": systems,
        "bucket": options.bucket,
        "machine": there,
        "date": utc_now(),
        "minutes": round((time.time() - began) / 60, 1),
        "command": " ".join(["python", "-m", "benchmarks.goodput", *sys.argv[1:]]),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "goodput.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "goodput.png").write_bytes(goodput_png(systems))
    is_valid = all(window["is_valid"] for system in systems.values() for window in system["windows"])
    _show(report, options.output)
    return 0 if is_valid or options.quick else 1


def _show(report: dict[str, Any], output: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(
        "a kill every", "", "goodput", "model", "starting", "again", "slower", "lost", "repeated", "saves every"
    )
    for name, system in report["systems"].items():
        pace = system["costs"]["image_seconds"]
        for window in system["windows"]:
            table.add_row(
                f"{window['mean_seconds']:.0f} s",
                LABELS[name],
                f"[bold]{window['goodput']:.1%}[/]{_goal(name, window['mean_seconds'], window['goodput'])}",
                f"{window['model']:.1%} {'' if window['is_valid'] else '[red]OFF[/]'}",
                *(f"{window[f'{part}_share']:.1%}" for part in ("starting", "trained_again", "slower")),
                *(f"{window[f'{what}_images']:,}" for what in ("lost", "repeated")),
                f"{window['interval_images'] * pace:.2g} s",
            )
        for point in system["curve"]:
            if (seconds := point["mean_seconds"]) in RARE_SECONDS:
                table.add_row(
                    f"{seconds:g} s", LABELS[name], _goal(name, seconds, point["goodput"]), f"{point['goodput']:.2%}"
                )
    console.print(table)
    for name, system in report["systems"].items():
        costs = {key.removesuffix("_seconds"): 1000 * value for key, value in system["costs"].items()}
        console.print(
            f"{name}, ms: " + ", ".join(f"{key} {value:.4g}" for key, value in costs.items()), highlight=False
        )
        moments = ", ".join(f"{event} {seconds:.2f}" for event, seconds in system["start_seconds"].items())
        console.print(f"{name}, s from a restart to: {moments or 'no restart reached a step'}", highlight=False)
    there = report["machine"]
    console.print(
        f"{there['cpu']}, {there['cores']} cores, torch {there['torch']}; {report['minutes']} min", highlight=False
    )
    if there["load_before"] > BUSY_LOAD:
        console.print(f"[yellow]the machine was busy before (load {there['load_before']}): measure again when idle[/]")
    console.print(f"written: {output}/goodput.json, goodput.png", highlight=False)


def _goal(system: str, mean_seconds: float, goodput: float) -> str:
    """Returns whether ours meets its goal, if it has one."""
    if system != "ours" or mean_seconds not in GOALS:
        return ""
    return (
        f" [green]≥ {GOALS[mean_seconds]:.1%}[/]"
        if goodput >= GOALS[mean_seconds]
        else f" [red]< {GOALS[mean_seconds]:.1%}[/]"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__.partition("\n")[2])
    kinds = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
    parser.add_argument(
        "--kills",
        type=lambda text: [(float(seconds), int(n)) for seconds, n in (one.split("x") for one in text.split(","))],
        default="15x6,60x4",
        metavar="SECONDSxN",
        help="mean seconds between kills, and how many kills (15x6,60x4)",
    )
    parser.add_argument("--only", default=",".join(LABELS), metavar="SYSTEMS", help="ours,accelerate,dcp (all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of ours")
    parser.add_argument("--bucket", default="file", metavar="WHERE", help=f"{kinds}, or the URI of a bucket (file)")
    parser.add_argument(
        "--patience", type=float, default=200, help="longest seconds of a run that measures a cost (200)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny network, two kills, all systems at once: no numbers")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1], metavar="FOLDER", help="of JSON and picture"
    )
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - LABELS.keys():
        parser.error(f"unknown system {min(unknown)!r}: use {', '.join(LABELS)}")
    options.steps, options.saves, options.restarts = (20, 1, 0) if options.quick else (250, 2, 2)
    if options.quick:
        options.kills, options.set = [(8.0, 2)], [*TINY, *options.set]
        # Threads of several systems would wait for each other.
        os.environ["OMP_NUM_THREADS"] = "1"
    return options


if __name__ == "__main__":
    sys.exit(main())

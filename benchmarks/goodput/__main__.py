"""`python -m benchmarks.goodput`: productive time ÷ wall time of training that is killed again and again.

Each system trains the same network in the same bucket, and the same kills meet it: SIGKILL for all its processes, then
the same command again at once. Productive time is the images in the newest state that loads at the end, times the
seconds of an image in a run without kills and saves. The peers save at Young's interval for their measured cost, ours
by its defaults. A model of quantities that are measured once predicts each window, and then the goodput at rarer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.__main__ import report_of, show
from benchmarks.crash_campaign.processes import Event, destroy_at_signals
from benchmarks.goodput import accounting
from benchmarks.goodput.accounting import WARM_STEPS, Costs, gaps, of_kind, restart_seconds
from benchmarks.goodput.systems import LABELS, Attempt, Subject
from benchmarks.measuring import Figure, Lines, lines_png, machine
from job.runs.outlook import interval_seconds
from job.stop import SPOT_GRACE_SECONDS

TOLERANCE = 0.1
"""The largest relative error of the model."""
GOALS = {60.0: 92, 3600.0: 99.5}
"""Of ours, in %, by the mean seconds between kills."""
RARE_SECONDS = (600.0, 3600.0)
CURVE_SECONDS = tuple(10 * 2 ** (i / 4) for i in range(43))
TICKS = (10, 60, 600, 3600)
TINY = ("model.channels=8", "model.norm_groups=4", "checkpoint.every_minutes=0.05")
PATIENCE_SECONDS = 200.0
PEER_SAVES, PEER_SAVES_SECONDS = 10, 1.0
"""The saves of a peer while their cost is measured, and the time between them."""


class Measurement:
    """One system: its costs, then its windows of kills."""

    def __init__(self, system: str, subject: Subject, options: argparse.Namespace) -> None:
        self.system, self._subject, self._options = system, subject, options
        self._step_images = subject.step_images(system)
        self.figures: list[Figure] = []

    def run(self) -> Measurement:
        """Measures everything."""
        self._measure_costs()
        for mean_seconds, kills in self._options.kills:
            # However busy the machine is, a quick trial has something to account for.
            while self._options.quick and not self.costs.kept_images(mean_seconds / 2, self.interval(mean_seconds)):
                mean_seconds *= 1.5
            self.figures.append(self._window(mean_seconds, kills))
        for seconds in RARE_SECONDS:
            expected = self.expected(gaps(seconds, 101))
            self.figures.append(self._figure(seconds, expected, "by the model", {"is_measured": False}))
        return self

    def expected(self, times: list[float]) -> float:
        """Returns the goodput that the model expects for kills after these times."""
        return self.costs.goodput(times, self.interval(fmean(times)))

    def interval(self, mean_seconds: float) -> float:
        """Returns the images between two saves: Young's, and for ours that of a run that is killed so often."""
        if self.system != "ours":
            return self.costs.young_images(mean_seconds, self._step_images)
        save = self.costs.commit_seconds, self.costs.save_seconds
        every_minutes = self._subject.every_minutes
        return interval_seconds(every_minutes, SPOT_GRACE_SECONDS, save, mean_seconds) / self.costs.image_seconds

    def _measure_costs(self) -> None:
        """Trains without saves, with saves, and from these saves on."""
        quick, wanted = self._options.quick, 2 if self.system == "ours" else PEER_SAVES
        calm = self._attempt("calm", 0, "without saves", 30 if quick else 250)
        seconds = accounting.image_seconds(of_kind(calm.events, "step"))
        saving = self._attempt("saving", self._steps(PEER_SAVES_SECONDS / seconds), "saves", 0, 1 if quick else wanted)
        starts = [saving] if quick else [self._attempt("saving", 10**9, "restart", 0) for _ in range(2)]
        if not (spans := accounting.saves(saving.events)):
            raise RuntimeError(f"{self.system} saved nothing within {PATIENCE_SECONDS:g} s")
        self.costs = Costs(
            image_seconds=seconds,
            restart_seconds=fmean(restart_seconds(start.events, start.started, seconds) for start in starts),
            save_seconds=accounting.save_seconds(saving.events, seconds),
            commit_seconds=fmean(end - begin for begin, end in spans),
        )

    def _attempt(self, run: str, every_steps: int, title: str, steps: int, saves: int = 0) -> Attempt:
        """Trains until so many steps, and saves with steps after them, are measured."""

        def is_enough(events: list[Event]) -> bool:
            spans, done = accounting.saves(events), of_kind(events, "step")
            is_after = not saves or (len(spans) >= saves and done[-WARM_STEPS]["time"] > spans[saves - 1][1])
            return len(done) > WARM_STEPS + steps and is_after

        words = self._subject.command(self.system, run, every_steps)
        return self._subject.attempt(self.system, words, f"{self.system}: {title}", PATIENCE_SECONDS, is_enough)

    def _steps(self, images: float) -> int:
        return max(1, round(images / self._step_images))

    def _window(self, mean_seconds: float, kills: int) -> Figure:
        """Trains through kills, and returns the goodput."""
        run, times, attempts = f"kills-{len(self.figures)}", gaps(mean_seconds, kills), list[Attempt]()
        words, began = self._subject.command(self.system, run, self._steps(self.interval(mean_seconds))), time.time()
        for number, seconds in enumerate(times, 1):
            title = f"{self.system}: kill {number} of {kills}, every {mean_seconds:.0f} s"
            attempts.append(self._subject.attempt(self.system, words, title, seconds))
        wall_seconds, events = time.time() - began, [attempt.events for attempt in attempts]
        at = self._subject.kept_at(self.system, run)
        kept = accounting.lineage(events, at)
        lost, repeated = accounting.lost_and_repeated(kept, self._subject.dataset)
        # The speed of the machine in this window, which may not be that of the minutes before.
        self.costs = replace(self.costs, image_seconds=accounting.calm_image_seconds(events, self.costs.image_seconds))
        raw = {
            "is_measured": True,
            "gaps_seconds": times,
            "image_seconds": self.costs.image_seconds,
            "model": self.expected(times),
            "kept_images": len(kept),
            "lost_images": lost,
            "repeated_images": repeated,
        }
        every_seconds = accounting.interval_images(events, self.interval(mean_seconds)) * self.costs.image_seconds
        beside = f"model {raw['model']:.1%}; lost {lost:,}, repeated {repeated:,}; saves every {every_seconds:.2g} s"
        goodput = len(kept) * self.costs.image_seconds / wall_seconds
        return self._figure(mean_seconds, goodput, beside, raw)

    def _figure(self, mean_seconds: float, goodput: float, beside: str, raw: dict[str, Any]) -> Figure:
        goals = GOALS if self.system == "ours" and not self._options.quick else {}
        return Figure(
            f"goodput_{self.system}_{mean_seconds:.0f}",
            f"{LABELS[self.system]}, a kill every {mean_seconds:,.0f} s, %",
            [100 * goodput],
            at_least=goals.get(mean_seconds),
            beside=beside,
            raw={"mean_seconds": mean_seconds, **raw},
        )

    @property
    def report(self) -> dict[str, Any]:
        """The costs and the model, for JSON."""
        curve = {seconds: 100 * self.expected(gaps(seconds, 101)) for seconds in CURVE_SECONDS}
        return {"costs": vars(self.costs), "curve": curve}


def main() -> int:
    """Runs the benchmark; returns 1 if the model misses a measurement by more than its tolerance."""
    options, there, began = _options(), machine(), time.time()
    destroy_at_signals()
    with tempfile.TemporaryDirectory(prefix="ddpm-goodput-") as name:
        subject = Subject.prepared(Path(name), tuple(options.set))
        measurements = [Measurement(system, subject, options) for system in options.only]
        # A quick trial shows that everything runs: its systems disturb each other.
        with ThreadPoolExecutor(len(measurements) if options.quick else 1) as pool:
            done = list(pool.map(Measurement.run, measurements))
    figures = [figure for one in done for figure in one.figures]
    systems = {one.system: one.report for one in done}
    report = report_of(figures, there, began, systems=systems)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "goodput.json").write_text(json.dumps(report, indent=1) + "\n")
    lines: Lines = {}
    for color, one in enumerate(done):
        curve, windows = one.report["curve"], [figure for figure in one.figures if figure.raw["is_measured"]]
        lost, again = (sum(window.raw[f"{what}_images"] for window in windows) for what in ("lost", "repeated"))
        lines[f"{LABELS[one.system]}: {lost:,} images lost, {again:,} repeated"] = (
            [*curve],
            [*curve.values()],
            f"C{color}",
        )
        seconds, values = [window.raw["mean_seconds"] for window in windows], [window.value for window in windows]
        lines[f"_{one.system}"] = seconds, values, f"oC{color}"
    png = lines_png(lines, TICKS, "mean seconds between two kills", "goodput: productive ÷ wall time, %", "linear")
    (options.output / "goodput.png").write_bytes(png)
    show(figures, report, options.output / "goodput.json")
    for one in done:
        costs = ", ".join(f"{name.removesuffix('_seconds')} {seconds:.3g}" for name, seconds in vars(one.costs).items())
        print(f"{one.system}: seconds of an {costs}")
    off = [f for f in figures if f.raw["is_measured"] and abs(100 * f.raw["model"] - f.value) > TOLERANCE * f.value]
    for figure in off:
        print(f"the model is off: {figure.what}: {100 * figure.raw['model']:.1f} instead of {figure.value:.1f}")
    return 1 if off and not options.quick else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    add = parser.add_argument
    add("--kills", default="15x6,60x4", metavar="SECONDSxN", help="mean gap, number of kills (15x6,60x4)")
    add("--only", default=",".join(LABELS), metavar="SYSTEMS", help=f"of {', '.join(LABELS)}; default: all")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of ours")
    add("--quick", action="store_true", help="tiny network, two kills, all systems at once, no targets")
    add("--output", type=Path, default=Path(__file__).parents[1], metavar="FOLDER", help="of JSON and picture")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - LABELS.keys():
        parser.error(f"unknown system {min(unknown)!r}: use {', '.join(LABELS)}")
    if options.quick:
        options.kills, options.set = "15x2", [*TINY, *options.set]
        # Threads of several systems would wait for each other.
        os.environ["OMP_NUM_THREADS"] = "1"
    options.kills = [(float(seconds), int(n)) for seconds, n in (one.split("x") for one in options.kills.split(","))]
    return options


if __name__ == "__main__":
    sys.exit(main())

"""Runs all lanes of a campaign, two at a time, and reports the results as a table and as JSON."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crash_campaign.attempts import Attempts
from benchmarks.crash_campaign.injection import EXPIRE_SECONDS, RENEW_SECONDS
from benchmarks.crash_campaign.lane import Lane
from benchmarks.crash_campaign.points import POINTS, SABOTAGES, Point
from benchmarks.crash_campaign.records import Moment, Tally
from benchmarks.crash_campaign.work import IMAGES, Work, make_images
from job.progress import Progress

LANES_AT_A_TIME = 2
KINDS = ((1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1))
"""The number of processes and the dropout of each lane."""
TURNS = (*KINDS, *KINDS[:2])
"""The lanes that get random kills in turn: those of two processes get fewer, since they are slower."""
ACTIONS, TARGETS = ("kill", "term"), ("group", "rank", "launcher")


@dataclass(frozen=True)
class Request:
    """The options of a campaign."""

    kills: int
    seed: int
    epochs: int
    """The length of each run."""
    points: tuple[str, ...]
    """The names of the points; empty: all points."""
    sabotage: str = ""

    def chosen_points(self) -> list[Point]:
        """Returns the chosen points, in order."""
        names = self.points or SABOTAGES.get(self.sabotage, ()) or tuple(point.name for point in POINTS)
        return [point for point in POINTS if point.name in names]


@dataclass(frozen=True)
class Report:
    """The results of all lanes together."""

    request: Request
    bucket: str
    seconds: float
    lanes: dict[str, Tally]

    @property
    def failures(self) -> list[str]:
        """The claims that did not hold."""
        return [failure for tally in self.lanes.values() for failure in tally.failures]

    @property
    def kills(self) -> Counter[str]:
        """Kills of all lanes, by kind."""
        return sum((tally.kills for tally in self.lanes.values()), Counter())

    def total(self, name: str) -> int:
        """Returns the sum of a count over all lanes."""
        return sum(getattr(tally, name) for tally in self.lanes.values())

    @property
    def recovery_seconds(self) -> list[float]:
        """The recovery times of all lanes."""
        return [seconds for tally in self.lanes.values() for seconds in tally.recovery_seconds]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        recovery = self.recovery_seconds or [0.0]
        return {
            "seed": self.request.seed,
            "bucket": self.bucket,
            "sabotage": self.request.sabotage,
            "epochs": self.request.epochs,
            "seconds": round(self.seconds, 1),
            "kills": self.kills.total(),
            "kills_by_kind": dict(self.kills),
            "resumes": self.total("resumes"),
            "runs": self.total("runs"),
            "lost_images": self.total("lost_images"),
            "repeated_images": self.total("repeated_images"),
            "bad_checkpoints": self.total("bad_checkpoints"),
            "planted_checkpoints": self.total("planted_checkpoints"),
            "recovery_seconds_median": round(median(recovery), 2),
            "recovery_seconds_worst": round(max(recovery), 2),
            "failures": self.failures,
            "lanes": {name: vars(tally) for name, tally in self.lanes.items()},
        }

    def table(self) -> str:
        """Returns a table for people."""
        recovery = self.recovery_seconds
        rows: list[tuple[str, str]] = [("kills", f"{self.kills.total()}")]
        rows += [(f"  {kind}", f"{count}") for kind, count in sorted(self.kills.items())]
        rot = sum((tally.rot for tally in self.lanes.values()), Counter[str]())
        rows += [
            ("damages", ", ".join(sorted(rot)) or "none"),
            ("resumes", f"{self.total('resumes')}, in {self.total('runs')} runs"),
            ("images lost", f"{self.total('lost_images')}"),
            ("images repeated", f"{self.total('repeated_images'):,}"),
            ("bad checkpoints seen", f"{self.total('bad_checkpoints')} of {self.total('planted_checkpoints')} damaged"),
            ("recovery", f"median {median(recovery):.1f} s, worst {max(recovery):.1f} s" if recovery else "none"),
        ]
        for name, tally in self.lanes.items():
            undisturbed = f"{tally.undisturbed_hash[:32]}… undisturbed" if tally.undisturbed_hash else "not compared"
            rows.append((f"weights, {name}", undisturbed))
            for sha256, count in Counter(tally.hashes).items():
                rows.append(("", f"{sha256[:32]}… after kills ({count} run{'s' * (count > 1)})"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
        return "\n".join([*lines, "", *DEFINITIONS])


DEFINITIONS = (
    "images lost: images of the order from 0 to the end that never went into the final weights.",
    "images repeated: images that a later attempt trained on again, because a kill came before their save.",
    "recovery: from the start of a process after a kill to the end of its first step, imports included.",
    "weights: SHA-256 over all tensors of the newest checkpoint: model, averaged weights, moments of the optimiser.",
    "Also compared: learning rate, losses and all other metrics, loss sums of manifests, pixels, noise and point",
    "of every image, pictures, packed shards, saved samples. All are equal to the bit.",
    f"The lease is renewed every {RENEW_SECONDS:g} s and expires after {EXPIRE_SECONDS:g} s, not 5 and 20.",
)  # fmt: skip


def lane_of(point: Point) -> tuple[int, float]:
    """Returns processes and dropout of the lane that meets a point; the two lanes of one process share the points."""
    is_later = POINTS.index(point) >= [other.name for other in POINTS].index("renewal-before")
    if point.processes == 2:
        return 2, 0.1 if point.action == "term" else 0.0
    return 1, 0.1 if is_later else 0.0


def plan_lanes(request: Request) -> list[tuple[int, float, list[Point], list[Moment]]]:
    """Returns processes, dropout, points and moments of each lane with work."""
    # A broken protocol shows in any lane.
    shares = {kind: (list[Point](), list[Moment]()) for kind in (KINDS[:1] if request.sabotage else KINDS)}
    for point in request.chosen_points():
        kind = lane_of(point)
        shares[kind if kind in shares else KINDS[0]][0].append(point)
    generator, turns = random.Random(request.seed), cycle(kind for kind in TURNS if kind in shares)
    for action, target, at_once in _kinds_of_kills(generator, request.kills):
        kind = next(turns)
        moment = Moment(generator.random(), action, target, generator.randrange(kind[0]), at_once)
        shares[kind][1].append(moment)
    return [(*kind, points, moments) for kind, (points, moments) in shares.items() if points or moments]


def _kinds_of_kills(generator: random.Random, count: int) -> list[tuple[str, str, bool]]:
    """Returns equally many kills of each kind, in a random order."""
    kinds = list(product(ACTIONS, TARGETS, (False, True)))
    kills: list[tuple[str, str, bool]] = []
    while len(kills) < count:
        generator.shuffle(kinds)
        kills += kinds
    return kills[:count]


def run_campaign(request: Request, bucket: str, folder: Path, tell: Callable[[str], None]) -> Report:
    """Runs all lanes.

    Args:
        request: the options.
        bucket: the URI of an unused bucket, or of an unused folder in one.
        folder: the folder for caches, traces and outputs.
        tell: prints a line; called from several threads.
    """
    began = time.time()
    source = make_images(folder / "images")
    planned = plan_lanes(request)
    total = sum(len([p for p in points if p.op != "rot"]) + len(moments) for _, _, points, moments in planned)
    lanes: list[Lane] = []
    with Progress("crash campaign", total=total, unit="kills") as bar:
        lock, done = threading.Lock(), 0

        def killed() -> None:
            nonlocal done
            with lock:
                done += 1
                bar.update(done, total=max(total, done))

        for number, (processes, dropout, points, moments) in enumerate(planned):
            base, place = f"{bucket}/lane-{number + 1}", folder / f"lane-{number + 1}"
            how: dict[str, Any] = {"processes": processes, "dropout": dropout, "seed": request.seed}
            work = partial(_work, base, source=source, epochs=request.epochs, **how)
            lane = f"{processes} process{'es' * (processes > 1)}, dropout {dropout:g}"
            attempts = Attempts(lane, place / "disturbed", sabotage=request.sabotage, tell=tell, killed=killed)
            lanes.append(Lane(work, place / "undisturbed", points, moments, attempts))
        with ThreadPoolExecutor(LANES_AT_A_TIME) as pool:
            tallies = list(pool.map(Lane.run, lanes))
    names: Sequence[str] = [lane.name for lane in lanes]
    return Report(request, bucket, time.time() - began, dict(zip(names, tallies, strict=True)))


def _work(base: str, part: str, **how: Any) -> Work:
    return Work(f"{base}/{part}", **how)


def title(report: Report, bucket: str) -> str:
    """Returns the facts of a campaign, in a line."""
    request, lanes = report.request, len(report.lanes)
    kinds = f"{lanes} kind{'s' * (lanes > 1)} of runs"
    length = f"{request.epochs} epochs of {IMAGES} images"
    return f"seed {request.seed}, {bucket}: {kinds}, {length}, {report.seconds / 60:.1f} min"

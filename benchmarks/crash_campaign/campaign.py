"""Plans and runs all lanes of a campaign, two at a time, and reports the results as a table and as JSON."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crash_campaign.injection import EXPIRE_SECONDS, RENEW_SECONDS
from benchmarks.crash_campaign.lane import Lane
from benchmarks.crash_campaign.points import BY_NAME, POINTS, SABOTAGES, Point
from benchmarks.crash_campaign.processes import Attempts, Moment, Tally
from benchmarks.crash_campaign.work import IMAGES, Work, make_images
from job.progress import Progress

LANES_AT_A_TIME = 2
KINDS = ((1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1))
"""The number of processes and the dropout of each lane."""
TURNS = (*KINDS, *KINDS[:2])
"""The lanes that get random kills in turn: those of two processes get fewer, since they are slower."""
ACTIONS, TARGETS = ("kill", "term"), ("group", "rank", "launcher")
FIRST_LATER = POINTS.index(BY_NAME["picture-before"])
"""The first point of the second of the two lanes of one process, which share the points."""
COUNTS = ("resumes", "runs", "lost_images", "repeated_images", "bad_checkpoints", "planted_checkpoints")
DEFINITIONS = f"""
images lost: images of the order from 0 to the end that never went into the final weights.
images repeated: images that a later attempt trained on again, because a kill came before their save.
recovery: from the start of a process after a kill to the end of its first step, imports included.
weights: SHA-256 over all tensors of the newest checkpoint: model, averaged weights, moments of the optimiser.
Also compared: learning rate, losses and all other metrics, loss sums of manifests, pixels, noise and point
of every image, pictures, packed shards, saved samples. All are equal to the bit.
The lease is renewed every {RENEW_SECONDS:g} s and expires after {EXPIRE_SECONDS:g} s, not 5 and 20."""


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
        names = self.points or SABOTAGES.get(self.sabotage, ()) or tuple(BY_NAME)
        return [point for point in POINTS if point.name in names]


@dataclass(frozen=True)
class Report:
    """The results of all lanes together."""

    request: Request
    seconds: float
    lanes: dict[str, Tally]

    @property
    def failures(self) -> list[str]:
        """The claims that did not hold."""
        return [failure for tally in self.lanes.values() for failure in tally.failures]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        tallies = list(self.lanes.values())
        recovery = [seconds for tally in tallies for seconds in tally.recovery_seconds] or [0.0]
        by_kind = sum((tally.kills for tally in tallies), Counter[str]())
        return {
            **asdict(self.request),
            **{name: sum(getattr(tally, name) for tally in tallies) for name in COUNTS},
            "seconds": round(self.seconds, 1),
            "kills": by_kind.total(),
            "kills_by_kind": dict(sorted(by_kind.items())),
            "damages": sorted({name for tally in tallies for name in tally.rot}),
            "recovery_seconds_median": round(median(recovery), 2),
            "recovery_seconds_worst": round(max(recovery), 2),
            "failures": self.failures,
            "lanes": {name: vars(tally) for name, tally in self.lanes.items()},
        }

    def table(self) -> str:
        """Returns a table for people."""
        found = self.to_dict()
        rows = [
            ("kills", found["kills"]),
            *((f"  {kind}", count) for kind, count in found["kills_by_kind"].items()),
            ("damages", ", ".join(found["damages"]) or "none"),
            ("resumes", f"{found['resumes']}, in {found['runs']} runs"),
            ("images lost", found["lost_images"]),
            ("images repeated", f"{found['repeated_images']:,}"),
            ("bad checkpoints seen", f"{found['bad_checkpoints']} of {found['planted_checkpoints']} damaged"),
            ("recovery", "median {recovery_seconds_median} s, worst {recovery_seconds_worst} s".format(**found)),
        ]
        for name, tally in self.lanes.items():
            rows.append((f"weights, {name}", f"{tally.undisturbed_hash[:32] or 'not compared'} undisturbed"))
            for sha256, count in Counter(tally.hashes).items():
                rows.append(("", f"{sha256[:32]} after kills ({count} run{'s' * (count > 1)})"))
        width = max(len(name) for name, _ in rows)
        return "\n".join([*(f"{name.ljust(width)}  {value}" for name, value in rows), DEFINITIONS])

    def title(self, bucket: str) -> str:
        """Returns the facts of the campaign, in a line."""
        lanes, length = len(self.lanes), f"{self.request.epochs} epochs of {IMAGES} images"
        kinds = f"{lanes} kind{'s' * (lanes > 1)} of runs"
        return f"seed {self.request.seed}, {bucket}: {kinds}, {length}, {self.seconds / 60:.1f} min"


def lane_of(point: Point) -> tuple[int, float]:
    """Returns processes and dropout of the lane that meets a point."""
    if point.processes == 2:
        return 2, 0.1 if point.action == "term" else 0.0
    return 1, 0.1 if POINTS.index(point) >= FIRST_LATER else 0.0


def plan_lanes(request: Request) -> list[tuple[int, float, list[Point], list[Moment]]]:
    """Returns processes, dropout, points and moments of each lane with work."""
    # A broken protocol shows in any lane.
    shares = {kind: (list[Point](), list[Moment]()) for kind in (KINDS[:1] if request.sabotage else KINDS)}
    for point in request.chosen_points():
        kind = lane_of(point)
        shares[kind if kind in shares else KINDS[0]][0].append(point)
    generator, turns = random.Random(request.seed), cycle(kind for kind in TURNS if kind in shares)
    # Equally many kills of each kind, in a random order.
    kills = list[tuple[str, str, bool]]()
    while len(kills) < request.kills:
        kinds = list(product(ACTIONS, TARGETS, (False, True)))
        generator.shuffle(kinds)
        kills += kinds
    for action, target, at_once in kills[: request.kills]:
        kind = next(turns)
        moment = Moment(generator.random(), action, target, generator.randrange(kind[0]), at_once)
        shares[kind][1].append(moment)
    return [(*kind, points, moments) for kind, (points, moments) in shares.items() if points or moments]


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
    lanes: dict[str, Lane] = {}
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
            name = f"{processes} process{'es' * (processes > 1)}, dropout {dropout:g}"
            attempts = Attempts(name, place / "disturbed", sabotage=request.sabotage, tell=tell, killed=killed)
            lanes[name] = Lane(work, place / "undisturbed", points, moments, attempts)
        with ThreadPoolExecutor(LANES_AT_A_TIME) as pool:
            tallies = list(pool.map(Lane.run, lanes.values()))
    return Report(request, time.time() - began, dict(zip(lanes, tallies, strict=True)))


def _work(base: str, part: str, **how: Any) -> Work:
    return Work(f"{base}/{part}", **how)

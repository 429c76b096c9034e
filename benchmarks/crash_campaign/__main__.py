"""`python -m benchmarks.crash_campaign`: kills a run at points of its protocols, then at random moments.

It runs all lanes, two at a time, and reports the results as a table and as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import signal
import sys
import tempfile
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
from types import FrameType
from typing import Any, NoReturn

from benchmarks.crash_campaign.injection import EXPIRE_SECONDS, RENEW_SECONDS
from benchmarks.crash_campaign.lane import Lane
from benchmarks.crash_campaign.points import BY_NAME, POINTS, SABOTAGES, Point, listing
from benchmarks.crash_campaign.processes import Attempts, Moment, Tally, destroy_all
from benchmarks.crash_campaign.work import IMAGES, Work, make_images
from benchmarks.subject import BUCKETS, bucket
from job.exits import JobError
from job.progress import Progress, note
from job.store import open_store

EPILOG = """\
Exit code: 0 if the killed runs end with the weights, metrics and pictures of the undisturbed run, else 1, with a list
of failures. Example: python -m benchmarks.crash_campaign --kills 100 --seed 7 --bucket gs"""
LANES_AT_A_TIME = 2
KINDS = ((1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1))
"""The number of processes and the dropout of each lane."""
TURNS = (*KINDS, *KINDS[:2])
"""The lanes that get random kills in turn: those of two processes get fewer, since they are slower."""
ACTIONS, TARGETS = ("kill", "term"), ("group", "rank", "launcher")
FIRST_LATER = POINTS.index(BY_NAME["picture-before"])
"""The first point of the second of the two lanes of one process, which share the points."""
COUNTS = ("resumes", "runs", "lost_images", "repeated_images", "bad_checkpoints", "planted_checkpoints")
RECOVERY = ("recovery_seconds_median", "recovery_seconds_worst")
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
            "damages": ", ".join(sorted({name for tally in tallies for name in tally.rot})) or "none",
            **dict(zip(RECOVERY, (round(median(recovery), 2), round(max(recovery), 2)), strict=True)),
            "failures": self.failures,
            "lanes": {name: vars(tally) for name, tally in self.lanes.items()},
        }

    def table(self) -> str:
        """Returns a table for people."""
        found = self.to_dict()
        kinds = {f"  {kind}": count for kind, count in found["kills_by_kind"].items()}
        rows: list[tuple[str, object]] = [("kills", found["kills"]), *kinds.items()]
        rows += [(name.replace("_", " "), found[name]) for name in ("damages", *COUNTS, *RECOVERY)]
        for name, tally in self.lanes.items():
            rows.append((f"weights, {name}", f"{tally.undisturbed_hash[:32] or 'not compared'} undisturbed"))
            for sha256, count in Counter(tally.hashes).items():
                rows.append(("", f"{sha256[:32]} after kills ({count} run{'s' * (count > 1)})"))
        return "\n".join([*(f"{name:<45}{value}" for name, value in rows), DEFINITIONS])

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


def main() -> int:
    """Runs the campaign of the command line; returns the exit code."""
    options = _options()
    if options.list:
        print(listing())
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    names = tuple(filter(None, options.points.split(",")))
    request = Request(options.kills, options.seed, options.epochs, names, options.sabotage)
    with tempfile.TemporaryDirectory(prefix="ddpm-campaign-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with bucket(options.bucket, folder / "bucket") as uri:
            base = f"{uri.rstrip('/')}/campaign-{secrets.token_hex(4)}"
            report = run_campaign(request, base, folder.resolve(), note)
            if options.keep is None and options.bucket == uri:
                store = open_store(base)
                for entry in list(store.list()):
                    store.delete(entry.key)
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print(report.title(options.bucket))
    print(report.table())
    if report.failures:
        print(f"\n{len(report.failures)} failure{'s' * (len(report.failures) > 1)}:")
        print("\n".join(report.failures))
        return 1
    print("\nNothing was lost.")
    return 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    destroy_all()
    raise SystemExit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash_campaign",
        description="Kills a run at points of its protocols and at random moments; its result must not change.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ", ".join(f"{kind} ({what})" for kind, what in BUCKETS.items())
    add = parser.add_argument
    add("--kills", type=int, metavar="N", help="number of random kills after the points (20; 0 with --sabotage)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the runs and of the random kills (0)")
    add("--epochs", type=int, default=10, metavar="N", help="length of each run (10)")
    add("--bucket", default="file", metavar="WHERE", help=f"{kinds}, or the URI of a bucket (file)")
    add("--points", default="", metavar="NAMES", help="only these points, such as upload-2,manifest; or none")
    add("--sabotage", default="", choices=SABOTAGES, help="break a protocol on purpose; the campaign must report it")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add("--keep", type=Path, metavar="FOLDER", help="work in this folder, and keep all files")
    add("--list", action="store_true", help="list the points and exit")
    options = parser.parse_args()
    if options.kills is None:
        options.kills = 0 if options.sabotage else 20
    unknown = set(filter(None, options.points.split(","))) - {*BY_NAME, "none"}
    for is_wrong, why in (
        (unknown, f"unknown point {min(unknown, default='')!r}: --list shows all points"),
        (options.keep and options.keep.exists() and any(options.keep.iterdir()), f"--keep {options.keep}: not empty"),
        (options.points == "none" and not options.kills, "--points none --kills 0 leaves nothing to do"),
        (options.kills < 0, f"--kills {options.kills}: use 0 or more"),
        (options.epochs < 4, "--epochs: use 4 or more, so that checkpoints are retired and pictures drawn"),
    ):
        if is_wrong:
            parser.error(why)
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JobError as error:
        print(f"crash campaign: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))

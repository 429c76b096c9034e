"""Kills a run at points of its protocols, then at random moments; its result must not change, to the bit.

Example: python -m benchmarks.crash_campaign --kills 100 --seed 7 --bucket gs
Exit code: 0 if the killed runs end as the undisturbed run, else 1, with a list of failures.

images lost: images of the order from 0 to the end that never went into the final weights.
images repeated: images that a later attempt trained on again, because a kill came before their save.
recovery: from the start of a process after a kill to the end of its first step, imports included.
weights: SHA-256 over all tensors of the newest checkpoint: model, averaged weights, moments of the optimiser.
Also compared: learning rate, losses and all other metrics, loss sums of manifests, pixels, noise and point of every
image, pictures. The lease is renewed every second and expires after 12 s, not 5 and 20.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.crash_campaign.lane import Lane
from benchmarks.crash_campaign.points import BY_NAME, POINTS, SABOTAGES, Point, listing
from benchmarks.crash_campaign.processes import Attempts, Moment, Tally, destroy_at_signals
from benchmarks.crash_campaign.work import IMAGES, Work, make_images
from benchmarks.subject import BUCKETS, bucket
from job.exits import JobError
from job.progress import Progress
from job.store import open_store

LANES_AT_A_TIME = 2
KINDS = ((1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1))
"""The number of processes and the dropout of each lane; those with dropout train in fp16."""
TURNS = (*KINDS, *KINDS[:2])
"""The lanes that get random kills in turn: those of two processes get fewer, since they are slower."""
ACTIONS, TARGETS = ("kill", "term"), ("group", "rank", "launcher")
COUNTS = ("resumes", "runs", "lost_images", "repeated_images", "bad_checkpoints", "planted_checkpoints")
RECOVERY = ("recovery_seconds_median", "recovery_seconds_worst")


@dataclass(frozen=True)
class Report:
    """The results of all lanes together."""

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
        return "\n".join(f"{name:<45}{value}" for name, value in rows)


def plan_lanes(
    chosen: list[Point], kills_wanted: int, seed: int, sabotage: str = ""
) -> list[tuple[int, float, list[Point], list[Moment]]]:
    """Returns processes, dropout, points and moments of each lane with work."""
    # A broken protocol shows in any lane.
    shares = {kind: (list[Point](), list[Moment]()) for kind in (KINDS[:1] if sabotage else KINDS)}
    for number, point in enumerate(chosen):
        # Runs in fp32 do not overflow.
        kind = point.processes, KINDS[1 if point.op == "overflow" else number % 2][1]
        shares[kind if kind in shares else KINDS[0]][0].append(point)
    generator, turns = random.Random(seed), cycle(kind for kind in TURNS if kind in shares)
    # Equally many kills of each kind, in a random order.
    kills = list[tuple[str, str, bool]]()
    while len(kills) < kills_wanted:
        kinds = list(product(ACTIONS, TARGETS, (False, True)))
        generator.shuffle(kinds)
        kills += kinds
    for action, target, at_once in kills[:kills_wanted]:
        kind = next(turns)
        moment = Moment(generator.random(), action, target, generator.randrange(kind[0]), at_once)
        shares[kind][1].append(moment)
    return [(*kind, points, moments) for kind, (points, moments) in shares.items() if points or moments]


def run_campaign(options: argparse.Namespace, bucket: str, folder: Path) -> Report:
    """Runs all lanes.

    Args:
        options: the command line.
        bucket: the URI of an unused bucket, or of an unused folder in one.
        folder: the folder for caches, traces and outputs.
    """
    began = time.time()
    source = make_images(folder / "images")
    planned = plan_lanes(options.points, options.kills, options.seed, options.sabotage)
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
            place, where = folder / f"lane-{number + 1}", f"{bucket}/lane-{number + 1}"
            work = Work(where, processes, dropout, options.seed, options.epochs, source)
            name = f"{processes} process{'es' * (processes > 1)}, dropout {dropout:g}"
            attempts = Attempts(name, place / "disturbed", sabotage=options.sabotage, killed=killed)
            lanes[name] = Lane(work, place / "undisturbed", points, moments, attempts)
        with ThreadPoolExecutor(LANES_AT_A_TIME) as pool:
            tallies = list(pool.map(Lane.run, lanes.values()))
    return Report(time.time() - began, dict(zip(lanes, tallies, strict=True)))


def main() -> int:
    """Runs the campaign of the command line; returns the exit code."""
    options = _options()
    if options.list:
        print(listing())
        return 0
    destroy_at_signals()
    with tempfile.TemporaryDirectory(prefix="ddpm-campaign-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with bucket(options.bucket, folder / "bucket") as uri:
            base = f"{uri.rstrip('/')}/campaign-{secrets.token_hex(4)}"
            report = run_campaign(options, base, folder.resolve())
            if options.keep is None and options.bucket == uri:
                store = open_store(base)
                for entry in list(store.list()):
                    store.delete(entry.key)
    if options.json:
        asked = {"seed": options.seed, "epochs": options.epochs, "sabotage": options.sabotage}
        options.json.write_text(json.dumps(asked | report.to_dict(), indent=1) + "\n")
    length = f"{options.epochs} epochs of {IMAGES} images, {report.seconds / 60:.1f} min"
    print(f"seed {options.seed}, {options.bucket}: {len(report.lanes)} kinds of runs, {length}")
    print(report.table())
    if report.failures:
        print(f"\n{len(report.failures)} failure{'s' * (len(report.failures) > 1)}:")
        print("\n".join(report.failures))
        return 1
    print("\nNothing was lost.")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash_campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=int, metavar="N", help="number of random kills after the points (20; 0 with --sabotage)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the runs and of the random kills (0)")
    add("--epochs", type=int, default=10, metavar="N", help="length of each run (10)")
    add("--bucket", default="file", metavar="WHERE", help=f"{', '.join(BUCKETS)} (a new one), or a URI (file)")
    add("--points", default="", metavar="NAMES", help="only these points, such as launcher-upload-2,manifest; or none")
    add("--sabotage", default="", choices=SABOTAGES, help="break a protocol on purpose; the campaign must report it")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add("--keep", type=Path, metavar="FOLDER", help="work in this folder, and keep all files")
    add("--list", action="store_true", help="list the points and exit")
    options = parser.parse_args()
    if options.kills is None:
        options.kills = 0 if options.sabotage else 20
    names = set(filter(None, options.points.split(","))) or ({"manifest"} if options.sabotage else {*BY_NAME})
    unknown, options.points = names - {*BY_NAME, "none"}, [point for point in POINTS if point.name in names]
    for is_wrong, why in (
        (unknown, f"unknown point {min(unknown, default='')!r}: --list shows all points"),
        (options.keep and options.keep.exists() and any(options.keep.iterdir()), f"--keep {options.keep}: not empty"),
        (not options.points and not options.kills, "--points none --kills 0 leaves nothing to do"),
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

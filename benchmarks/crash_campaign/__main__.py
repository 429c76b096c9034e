"""`python -m benchmarks.crash_campaign`: kills a run at points of its protocols, then at random moments."""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks.crash_campaign.campaign import Request, run_campaign
from benchmarks.crash_campaign.points import BY_NAME, SABOTAGES, listing
from benchmarks.crash_campaign.processes import destroy_all
from benchmarks.subject import BUCKETS, bucket
from job.exits import JobError
from job.progress import note
from job.store import open_store

EPILOG = """\
Exit code: 0 if the killed runs end with the weights, metrics and pictures of the undisturbed run, else 1, with a list
of failures. Example: python -m benchmarks.crash_campaign --kills 100 --seed 7 --bucket gs"""


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
    add("--points", default="", metavar="NAMES", help="only these points, such as staged,manifest; or none")
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

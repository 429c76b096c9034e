"""`python -m benchmarks.crash_campaign`: kills a run at every point of its protocols, then at random moments."""

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

from benchmarks.crash_campaign.buckets import KINDS, bucket
from benchmarks.crash_campaign.campaign import Request, run_campaign, title
from benchmarks.crash_campaign.points import POINTS, SABOTAGES, listing
from benchmarks.crash_campaign.processes import destroy_all
from job.exits import JobError
from job.progress import note
from job.store import open_store

EPILOG = """\
Exit code: 0 if the killed runs end with the weights, metrics and pictures of the undisturbed run, else 1, with a list
of failures. Example: python -m benchmarks.crash_campaign --kills 100 --seed 7 --bucket gs"""


def main() -> int:
    """Runs the campaign of the command line; returns the exit code."""
    try:
        return _run()
    except JobError as error:
        print(f"crash campaign: {error}", file=sys.stderr)
        return int(error.exit_code)


def _run() -> int:
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
    print(title(report, options.bucket))
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
        description="Kills a run at every point of its protocols and at random moments; its result must not change.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
    parser.add_argument(
        "--kills", type=int, default=20, metavar="N", help="number of random kills after the points (20)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the runs and of the random kills (0)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="length of each run (10)")
    parser.add_argument("--bucket", default="file", metavar="WHERE", help=f"{kinds}, or the URI of a bucket (file)")
    parser.add_argument(
        "--points", default="", metavar="NAMES", help="only these points, such as staged,manifest; or none"
    )
    parser.add_argument(
        "--sabotage", default="", choices=SABOTAGES, help="break a protocol on purpose; the campaign must report it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and keep all files")
    parser.add_argument("--list", action="store_true", help="list the points and exit")
    options = parser.parse_args()
    known = {point.name for point in POINTS} | {"none"}
    if unknown := [name for name in options.points.split(",") if name and name not in known]:
        parser.error(f"unknown point {unknown[0]!r}: --list shows all points")
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty: choose another folder")
    if options.points == "none" and not options.kills:
        parser.error("--points none --kills 0 leaves nothing to do")
    if options.kills < 0:
        parser.error(f"--kills {options.kills}: use 0 or more")
    if options.epochs < 4:
        parser.error(f"--epochs {options.epochs}: use 4 or more, so that checkpoints are retired and pictures drawn")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: use 0 to 2**63 - 1")
    if options.sabotage and options.kills == parser.get_default("kills"):
        options.kills = 0
    return options


if __name__ == "__main__":
    sys.exit(main())

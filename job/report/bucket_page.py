"""The page of all runs in a bucket: a sortable table with the newest sample grids, and chosen runs side by side.

`write_report` is `ddpm report`, which writes this page or that of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from job.exits import JobError, MissingInputError
from job.printing import open_page
from job.progress import Progress, note
from job.report import PAGE_KEY, Facts, PictureCache, columns, facts_of, rendered, run_page
from job.runs.layout import RUNS
from job.runs.metric_rows import Row
from job.runs.outlook import AttemptSpan
from job.runs.run import open_run
from job.store import Store, open_store
from job.store.files import write_file
from job.verbs.run_listing import differing, run_names

MOST_POINTS = 250
"""The largest number of points of a run's loss."""
COMPARED_AT_FIRST = 4
"""The number of runs, of the newest status and one dataset, that the page compares until people choose others."""
ALL_BYTES, MOST_BYTES = 1_500_000, 60_000
"""The size limits of all pictures together, and of one."""
PIXELS_PER_BYTE = 4
"""The density of a sample grid as WebP; a good guess of the size saves encoding it again."""


def bucket_page(bucket: Store) -> bytes:
    """Returns the page; a run that cannot be read has its name and the reason in it."""
    names, pictures = run_names(bucket), PictureCache(note)
    most_bytes = min(MOST_BYTES, ALL_BYTES // max(1, len(names)))
    limits = most_bytes, round(sqrt(PIXELS_PER_BYTE * most_bytes))
    entries, readable = dict[str, Facts | str](), dict[str, Facts]()
    data, grids = dict[str, dict[str, Any]](), dict[str, str]()
    with Progress("reading runs", total=len(names), unit="runs") as bar:
        for number, name in enumerate(names, 1):
            if facts := _facts_or_why(bucket, name):
                entries[name] = facts
            if isinstance(facts, Facts):
                readable[name] = facts
                curve = loss_curve(facts.rows, facts.attempts)
                data[name] = {"loss": curve, "epoch_images": facts.epoch_images}
                # Those of all runs would fill the memory.
                facts.rows.clear()
                if facts.grids:
                    grids[name] = pictures.get(facts.handle.run, facts.grids[-1][1], *limits)
            bar.update(number)
    for name, config in differing({name: facts.config.flat() for name, facts in readable.items()}).items():
        data[name]["config"] = config
    newest = sorted(readable.values(), key=lambda facts: facts.status.updated if facts.status else "", reverse=True)
    # Losses on different images say nothing of each other.
    alike = [facts.name for facts in newest if facts.config.data.dataset_id == newest[0].config.data.dataset_id]
    more = {"compared": alike[:COMPARED_AT_FIRST], "grids": grids, "missing": pictures.missing, "runs_folder": RUNS}
    return rendered("bucket.html", {"runs": data}, bucket=bucket, entries=entries, comparable=len(readable) > 1, **more)


def _facts_or_why(bucket: Store, name: str) -> Facts | str:
    try:
        return facts_of(open_run(bucket.uri, name, with_dataset=False), name)
    except MissingInputError:
        # A deleted run leaves its lease.
        return ""
    except Exception as error:
        # An error in one run must not hide the others.
        return str(error) if isinstance(error, JobError) else f"cannot be read: {error!r}"


def loss_curve(rows: Sequence[Row], attempts: Iterable[AttemptSpan]) -> dict[str, list[float | None]]:
    """Returns the points of a loss: images seen, hours of training without the time between attempts, and values."""
    rows = [row for row in rows if {"loss", "time"} <= row.keys()]
    if not rows:
        return {"images": [], "hours": [], "values": []}
    times, began = [row["time"] for row in rows], np.sort([*(span.began.timestamp() for span in attempts), inf])
    # By the clock of another machine, a row may be older than the one before, or than each attempt.
    since = np.maximum(began[np.searchsorted(began, times, side="right") - 1], [-inf, *times[:-1]])
    hours = np.cumsum(np.maximum(0.0, times - since)) / 3600
    timed = [row | {"hours": each} for row, each in zip(rows, hours, strict=True)]
    images, losses, hours_at = columns(timed, ["loss", "hours"], 1, points=MOST_POINTS)
    return {"images": images, "hours": hours_at, "values": losses}


def write_report(bucket_uri: str, name: str, open_it: bool, output: Path | None) -> None:
    """Writes the page of a run, or of all runs without a `name`, into its folder or to `output`.

    Raises:
        MissingInputError: the run or the bucket is missing.
        BadDataError: its configuration or its dataset's index is damaged.
    """
    bucket = open_store(bucket_uri)
    if name:
        handle = open_run(bucket_uri, name, with_dataset=False)
        folder, page = handle.run, run_page(facts_of(handle, name), PictureCache(note))
    else:
        folder, page = bucket, bucket_page(bucket)
    if output is not None:
        write_file(output, page)
    else:
        folder.put(PAGE_KEY, page)
    where = str(output) if output else folder.uri_of(PAGE_KEY)
    print(f"{where}  ({len(page):,} bytes)")
    if open_it:
        open_page(folder, PAGE_KEY, output)

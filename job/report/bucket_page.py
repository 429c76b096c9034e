"""The page of all runs in a bucket: sortable, with what each of them draws, and any two of them side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

from job.exits import JobError
from job.plan import find_run
from job.progress import Progress, note
from job.report.facts import Facts, facts_of
from job.report.page import PAGE_KEY, columns, rendered, smooth
from job.report.pictures import Shelf
from job.runs.layout import RUNS
from job.runs.overview import run_names
from job.runs.records import run_store
from job.store import Store

MOST_POINTS = 250
"""Of a run's loss."""
ALL_BYTES, MOST_BYTES = 2_000_000, 60_000
"""Of all pictures together, and of one."""
PIXELS_PER_BYTE = 4
"""Of a sample grid as WebP, about: one that is tried at a size that fits is encoded once."""


@dataclass(frozen=True)
class Entry:
    """A run on the page."""

    name: str
    facts: Facts | None
    """None where it cannot be read; without the rows of its metrics."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Its curve."""
    why: str = ""
    picture: str = ""
    why_no_picture: str = ""
    has_page: bool = False


def bucket_page(bucket: Store, say: Callable[[str], None] = note) -> bytes:
    """The file. A run that cannot be read is there by name, with the reason."""
    names, entries = run_names(bucket), list[Entry]()
    most_bytes = min(MOST_BYTES, ALL_BYTES // max(1, len(names)))
    with Progress("reading runs", total=len(names), unit="runs") as bar, Shelf(say) as shelf:
        # Its process makes the picture of one run small while the records of the next are read.
        with ThreadPoolExecutor(1) as pool:
            drawn = []
            for number, name in enumerate(names, 1):
                entries.append(_entry(bucket, name, say))
                drawn.append(pool.submit(_with_picture, bucket, entries[-1], shelf, most_bytes))
                bar.update(number)
        entries = [each.result() for each in drawn]
    flat = {entry.name: entry.facts.config.flat() for entry in entries if entry.facts}
    # Two runs side by side show keys that differ: those that never do would be half of the page.
    differs = {key for key in set().union(*flat.values()) if len({str(each.get(key)) for each in flat.values()}) > 1}
    data = {
        entry.name: {"loss": entry.loss, "config": {key: each[key] for key in each if key in differs}}
        for entry in entries
        if (each := flat.get(entry.name))
    }
    return rendered("bucket.html", {"runs": data}, bucket=bucket, entries=entries, runs_folder=RUNS)


def _entry(bucket: Store, name: str, say: Callable[[str], None]) -> Entry:
    try:
        facts = facts_of(find_run(bucket.uri, name, with_dataset=False), name, say=say, only_loss=True)
    except Exception as error:
        # Whatever is wrong with one run, the others are to be seen.
        return Entry(name, None, why=str(error) if isinstance(error, JobError) else f"cannot be read: {error!r}")
    has_page = False
    with suppress(JobError):
        has_page = run_store(bucket, name).exists(PAGE_KEY)
    # The rows of hundreds of runs would not fit into the memory of a small machine.
    return Entry(name, replace(facts, rows=[]), _loss(facts), has_page=has_page)


def _with_picture(bucket: Store, entry: Entry, shelf: Shelf, most_bytes: int) -> Entry:
    """The same with its newest grid."""
    if not entry.facts or not entry.facts.grids:
        return entry
    run, key = run_store(bucket, entry.name), entry.facts.grids[-1].key
    picture = shelf.get(run, key, most_bytes, round(sqrt(PIXELS_PER_BYTE * most_bytes)))
    return replace(entry, picture=picture, why_no_picture=shelf.missing.get(run.uri_of(key), ""))


def _loss(facts: Facts) -> dict[str, Any]:
    """Its curve, in few points."""
    rows = [row for row in facts.rows if "loss" in row]
    if not rows:
        return {"x": [], "values": []}
    x, (values,) = columns(rows, ["loss"], facts.epoch_images or 1, MOST_POINTS)
    return {"x": x, "values": smooth(values)}

"""The page of all runs in a bucket: sortable, with what each of them draws, and any two of them side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from job.exits import JobError
from job.plan import find_run
from job.progress import Progress, note
from job.report import pictures
from job.report.facts import Facts, facts_of
from job.report.page import PAGE_KEY, charts_of, rendered
from job.report.pictures import Shelf
from job.runs.layout import RUNS
from job.runs.overview import run_names
from job.runs.records import run_store
from job.store import Store

MOST_POINTS = 250
"""Of a run's loss."""
ALL_BYTES, MOST_BYTES = 3_000_000, 60_000
"""Of all pictures together, and of one."""


@dataclass(frozen=True)
class Entry:
    """A run on the page."""

    name: str
    facts: Facts | None
    """None where it cannot be read."""
    why: str = ""
    picture: str = ""
    has_page: bool = False


def bucket_page(bucket: Store, say: Callable[[str], None] = note) -> bytes:
    """The file. A run that cannot be read is there by name, with the reason."""
    names = run_names(bucket)
    shelf, entries = Shelf(say), list[Entry]()
    most_bytes = min(MOST_BYTES, ALL_BYTES // max(1, len(names)))
    with Progress("reading runs", total=len(names), unit="runs") as bar:
        for number, name in enumerate(names, 1):
            entries.append(_entry(bucket, name, shelf, most_bytes, say))
            bar.update(number)
    data = {entry.name: _data(entry) for entry in entries if entry.facts}
    return rendered("bucket.html", {"runs": data}, bucket=bucket, entries=entries, runs_folder=RUNS)


def _entry(bucket: Store, name: str, shelf: Shelf, most_bytes: int, say: Callable[[str], None]) -> Entry:
    try:
        facts = facts_of(find_run(bucket.uri, name, with_dataset=False), name, say=say)
    except Exception as error:
        # Whatever is wrong with one run, the others are to be seen.
        return Entry(name, None, str(error) if isinstance(error, JobError) else f"cannot be read: {error!r}")
    run = run_store(bucket, name)
    picture = shelf.get(run, facts.grids[-1].key, most_bytes, 800) if facts.grids else ""
    has_page = False
    with suppress(JobError):
        has_page = run.exists(PAGE_KEY)
    return Entry(name, facts, picture=picture, has_page=has_page)


def _data(entry: Entry) -> dict[str, Any]:
    assert entry.facts is not None
    loss = next((chart for chart in charts_of(entry.facts) if chart["name"] == "loss"), None)
    curve: dict[str, Any] = {"x": [], "values": []}
    if loss is not None:
        some = pictures.evenly(len(loss["x"]), MOST_POINTS)
        curve = {"x": [loss["x"][i] for i in some], "values": [loss["series"][0]["values"][i] for i in some]}
    return {"loss": curve, "config": entry.facts.config.flat(), "src": entry.picture}

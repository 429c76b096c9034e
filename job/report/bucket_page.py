"""The page of all runs in a bucket: a sortable table with the newest sample grids, and chosen runs side by side.

`write_report` is `ddpm report`, which writes this page or that of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from job.exits import BadRequestError, JobError
from job.plan import open_run
from job.printing import open_page
from job.progress import Progress, note
from job.report import PAGE_KEY, Facts, PictureCache, columns, facts_of, rendered, run_page
from job.runs.layout import RUNS
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


@dataclass(frozen=True)
class RunEntry:
    """A run on the page."""

    name: str
    facts: Facts | None
    """Without the rows of the metrics, which would fill the memory; None if the run cannot be read."""
    why: str = ""
    """The reason why it cannot be read."""
    loss: dict[str, Any] = field(default_factory=dict)
    """The points of its loss curve."""
    grid: str = ""
    """The key of the newest sample grid, below the bucket."""


def bucket_page(bucket: Store, say: Callable[[str], None] = note) -> bytes:
    """Returns the page; a run that cannot be read has its name and the reason in it."""
    names = run_names(bucket)
    picture_cache, entries = PictureCache(say), list[RunEntry]()
    most_bytes = min(MOST_BYTES, ALL_BYTES // max(1, len(names)))
    size = most_bytes, round(sqrt(PIXELS_PER_BYTE * most_bytes))
    with Progress("reading runs", total=len(names), unit="runs") as bar:
        for number, name in enumerate(names, 1):
            entries.append(_entry(bucket, name, say))
            bar.update(number)
    grids = {entry.name: picture_cache.get(bucket, entry.grid, *size) for entry in entries if entry.grid}
    readable = {entry.name: entry.facts for entry in entries if entry.facts}
    configs = differing({name: facts.config.flat() for name, facts in readable.items()})
    data = {
        entry.name: {"loss": entry.loss, "epoch_images": entry.facts.epoch_images, "config": configs[entry.name]}
        for entry in entries
        if entry.facts
    }
    updated = {name: facts.status.updated if facts.status else "" for name, facts in readable.items()}
    newest = sorted(updated, key=updated.__getitem__, reverse=True)
    more: dict[str, Any] = {"grids": grids, "missing": picture_cache.missing, "runs_folder": RUNS}
    # Losses on different images say nothing of each other.
    dataset_of = {name: facts.config.data.dataset_id for name, facts in readable.items()}
    compared = [name for name in newest if dataset_of[name] == dataset_of[newest[0]]][:COMPARED_AT_FIRST]
    more |= {"compared": compared, "comparable": len(readable) > 1}
    return rendered("bucket.html", {"runs": data}, bucket=bucket, entries=entries, **more)


def _entry(bucket: Store, name: str, say: Callable[[str], None]) -> RunEntry:
    try:
        facts = facts_of(open_run(bucket.uri, name, with_dataset=False), name, say=say)
        rows = [row for row in facts.rows if "loss" in row]
        images, loss = columns(rows, ["loss"], 1, points=MOST_POINTS) if rows else ([], [])
    except Exception as error:
        # An error in one run must not hide the others.
        return RunEntry(name, None, str(error) if isinstance(error, JobError) else f"cannot be read: {error!r}")
    grid = f"{RUNS}/{name}/{facts.grids[-1][1]}" if facts.grids else ""
    curve = {"images": images, "values": loss}
    return RunEntry(name, replace(facts, rows=[]), loss=curve, grid=grid)


def write_report(bucket_uri: str, name: str, open_it: bool, output: Path | None) -> None:
    """Writes the page of a run, or of all runs without a `name`, into its folder or to `output`.

    Raises:
        MissingInputError: the run or the bucket is missing.
        BadDataError: its configuration or its dataset's index is damaged.
        BadRequestError: `output` is not a writable HTML file.
    """
    if output is not None and (output.suffix.lower() != ".html" or output.is_dir() or not output.parent.is_dir()):
        raise BadRequestError(f"--output {output}: name a file that ends in .html, in a folder that exists")
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

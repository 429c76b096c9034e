"""Metrics: JSON lines and TensorBoard events, in segments that are committed with checkpoints.

A bucket cannot append, and a killed attempt must leave neither gaps nor duplicates. So the rows since the last
checkpoint travel with the next one, as an object of their own that its manifest names; what was logged after the last
commit is logged again by the attempt that computes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from job.exits import BadDataError
from job.runs.checkpoints import MetricSegment, read_segment
from job.runs.layout import CheckpointRef
from job.store import Store
from job.store.files import scratch_folder

Row = dict[str, Any]


def segment_objects(rows: list[Row], ref: CheckpointRef) -> tuple[MetricSegment, dict[str, bytes]]:
    """The rows as a segment for a manifest, and the objects to upload: JSON lines, and TensorBoard events."""
    name = str(ref)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    events = _events(rows)
    segment = MetricSegment(
        name=name, sha256=hashlib.sha256(lines).hexdigest(), events_sha256=hashlib.sha256(events).hexdigest()
    )
    return segment, {segment.key: lines, segment.events_key: events}


def _events(rows: list[Row]) -> bytes:
    # Written locally, whole: an event writer on a bucket overwrites its own file at each flush.
    from tensorboardX import SummaryWriter

    with scratch_folder("events") as folder:
        with SummaryWriter(str(folder)) as writer:
            for row in rows:
                for name, value in row.items():
                    if name not in ("images_seen", "time") and value is not None:
                        writer.add_scalar(name, value, row["images_seen"], walltime=row["time"])
        (path,) = folder.iterdir()
        return path.read_bytes()


def read_rows(run: Store, segments: Iterable[MetricSegment]) -> list[Row]:
    """The rows of a checkpoint's segments, in order.

    Raises:
        BadDataError: a segment is missing or rotten; the message names it.
    """
    rows: list[Row] = []
    for segment in segments:
        try:
            found = [json.loads(line) for line in read_segment(run, segment).splitlines()]
        except (ValueError, RecursionError):
            found = [None]
        if not all(map(_is_row, found)):
            raise BadDataError(f"{run.uri_of(segment.key)} holds no metrics, though a checkpoint vouches for it")
        rows += found
    return rows


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and {"images_seen", "loss"} <= row.keys() and all(map(_is_number, row.values()))


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)

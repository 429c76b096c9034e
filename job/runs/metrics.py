"""Metrics: JSON lines and TensorBoard events, in segments that are committed with checkpoints.

A bucket cannot append, and a killed attempt must leave neither gaps nor duplicates. So the rows since the last
checkpoint travel with the next one, as objects of their own that its manifest names; what was logged after the last
commit is logged again by the attempt that computes it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from job.exits import BadDataError
from job.runs.layout import CheckpointRef, ObjectKind, located
from job.runs.records import NamedObject
from job.store import Store
from job.store.files import scratch_folder

Row = dict[str, Any]


class _Line(BaseModel, extra="allow"):
    """A row as it is read back: numbers by name, at a moment of the run."""

    __pydantic_extra__: dict[str, int | float | None]
    images_seen: int


def metric_objects(rows: list[Row], ref: CheckpointRef) -> dict[str, bytes]:
    """The rows as two objects by their keys: JSON lines, and TensorBoard events."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return {ObjectKind.METRICS.key(checkpoint=ref): lines, ObjectKind.EVENTS.key(checkpoint=ref): _events(rows)}


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


def read_rows(run: Store, named: Iterable[NamedObject], warn: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of a checkpoint's metrics, in order. With `warn` a damaged object is named there, and left out.

    Raises:
        BadDataError: an object is missing or rotten; the message names it.
        ValidationError: one holds no rows, though a checkpoint vouches for it.
    """
    rows: list[Row] = []
    for segment in named:
        if located(segment.key).kind is ObjectKind.METRICS:
            try:
                rows += [_Line.model_validate_json(line).model_dump() for line in segment.read(run).splitlines()]
            except (BadDataError, ValidationError) as error:
                if warn is None:
                    raise
                warn(f"going on without the rows of {run.uri_of(segment.key)}: {error}")
    return rows

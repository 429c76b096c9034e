"""Metrics: JSON lines and TensorBoard events, in segments that are committed with checkpoints.

A bucket cannot append, and a killed attempt must leave neither gaps nor duplicates. The rows since the last checkpoint
are therefore uploaded with the next one, as objects that its manifest names. Rows after the last commit are lost with
their attempt, and the next attempt logs them again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from job.config import LARGEST, RunConfig
from job.exits import BadDataError
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef, ObjectKind, located
from job.sealed import NamedObject
from job.store import Store
from job.store.files import scratch_folder

Row = dict[str, Any]


class _Line(BaseModel, extra="allow"):
    """The schema of a row: numbers by name, at a moment of the run."""

    __pydantic_extra__: dict[str, int | float | None]
    images_seen: int


class _BriefLine(BaseModel):
    """The schema of a row's most important values alone, which takes less time to read."""

    images_seen: int
    time: int | float | None = None
    loss: int | float | None = None
    images_per_second: int | float | None = None


_LINES, _BRIEF_LINES = TypeAdapter(list[_Line]), TypeAdapter(list[_BriefLine])


def metric_objects(rows: list[Row], ref: CheckpointRef, config: RunConfig | None = None) -> dict[str, bytes]:
    """Returns the rows as two objects by key: JSON lines, and TensorBoard events.

    Args:
        rows: since the checkpoint before.
        ref: the checkpoint that commits them.
        config: of the run, with its first rows only; TensorBoard shows its values as hyper-parameters.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    summary = _tensorboardx().summary
    about = summary.hparams(_plain(config), {"loss": 0.0}) if config is not None else ()
    events = [_event(one, 0, time.time()) for one in about]
    for row in rows:
        named = [(name, value) for name, value in row.items() if name not in ("images_seen", "time")]
        values = [summary.scalar(name, value).value[0] for name, value in named if value is not None]
        events.append(_event(summary.Summary(value=values), row["images_seen"], row["time"]))
    return {ObjectKind.METRICS.key(checkpoint=ref): lines, ObjectKind.EVENTS.key(checkpoint=ref): _file_of(events)}


def grid_events(png: bytes, images_seen: int) -> bytes:
    """Returns a sample grid as TensorBoard events."""
    with Image.open(BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    grid = _tensorboardx().summary.image("samples", pixels, dataformats="HWC")
    return _file_of([_event(grid, images_seen, time.time())])


def _plain(config: RunConfig) -> Row:
    return {key: str(value) if isinstance(value, list) else value for key, value in config.flat().items()}


def _event(summary: Any, images_seen: int, wall_time: float) -> Any:
    return _tensorboardx().proto.event_pb2.Event(summary=summary, step=images_seen, wall_time=wall_time)


def _file_of(events: Iterable[Any]) -> bytes:
    # Not a SummaryWriter: it starts a thread for each file, and training would wait for it.
    with scratch_folder("events") as folder:
        writer = _tensorboardx().event_file_writer.EventsWriter(str(folder / "events"))
        for event in events:
            writer.write_event(event)
        writer.close()
        (path,) = folder.iterdir()
        return path.read_bytes()


@cache
def _tensorboardx() -> ModuleType:
    # For buckets it would import two libraries, which takes as long as several steps of a small network.
    with _without_modules("boto3", "google.cloud.storage"):
        import tensorboardX.event_file_writer
        import tensorboardX.summary
    return tensorboardX


@contextmanager
def _without_modules(*names: str) -> Iterator[None]:
    """Lets imports of these modules fail, unless they are there already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def read_rows(
    run: Store, named: Iterable[NamedObject], warn: Callable[[str], None] | None = None, brief: bool = False
) -> list[Row]:
    """Returns the rows of a checkpoint's metrics, in order; with `warn` it reports damaged objects and skips them.

    Brief rows have the time, the loss and the speed alone.

    Raises:
        BadDataError: an object is missing or corrupt; the message names it.
        ValidationError: an object with the right hash holds something else than rows.
    """
    rows: list[Row] = []
    for segment in named:
        if located(segment.key).kind is ObjectKind.METRICS:
            try:
                lines = b"[%b]" % b",".join(segment.read(run).splitlines())
                read = (_BRIEF_LINES if brief else _LINES).validate_json(lines)
                rows += [line.__dict__ | (line.__pydantic_extra__ or {}) for line in read]
            except (BadDataError, ValidationError) as error:
                if warn is None:
                    raise
                why = error if isinstance(error, BadDataError) else "it holds no rows of this version"
                warn(f"going on without the rows of {run.uri_of(segment.key)}: {why}")
    return rows


def merged(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with those of one moment merged, in order; of values logged twice the last counts."""
    at: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        # NaN and infinite or huge values cannot be drawn.
        sound = {name: value for name, value in row.items() if value is not None and -LARGEST < value < LARGEST**2}
        at.setdefault(row["images_seen"], {}).update(sound)
    return [at[images_seen] for images_seen in at if images_seen <= MAX_IMAGES_SEEN]

"""Metrics: JSON lines and TensorBoard events, in segments that are committed with checkpoints.

A bucket cannot append, and a killed attempt must leave neither gaps nor duplicates. The rows since the last checkpoint
are therefore uploaded with the next one, as a segment that its manifest names. Rows after the last commit are lost with
their attempt, and the next attempt logs them again.

A small run saves every ten seconds, 60,000 times in a week. A new segment therefore takes in the last ones before it
that have fewer than `GROWTH` times its saves, so that a manifest names few segments, and each row is written again a
few times (a log-structured merge tree: O'Neil et al. 1996). `Retirement` deletes a segment with the last checkpoint
that names it.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from ddpm.catalogue import LARGEST
from job.config import RunConfig
from job.coordination.sealed import NamedObject
from job.exits import BadDataError
from job.progress import note
from job.runs.checkpoints import Manifest, Segment, list_checkpoints, newest_sound
from job.runs.layout import MAX_IMAGES_SEEN, CheckpointRef, ObjectKind, located
from job.store import Store

Row = dict[str, Any]


class _Line(BaseModel, extra="allow"):
    """The schema of a row: numbers by name, at a moment of the run."""

    __pydantic_extra__: dict[str, int | float | None]
    images_seen: int


GROWTH = 4
"""100,000 saves have at most 8 segments, and write each row 17 times."""
PARALLEL_READS = 8
_LINES = TypeAdapter(list[_Line])


class History:
    """The segments of a run's metrics, to which an attempt adds.

    Attributes:
        segments: those that the next manifest names.
    """

    def __init__(self, run: Store, segments: Sequence[Segment], config: RunConfig) -> None:
        """Goes on from the segments of a restored checkpoint; damaged ones stay as they are."""
        self.segments = tuple(segments)
        self._run, self._config, self._damaged = run, config, set[str]()

    def add(self, rows: Sequence[Row], ref: CheckpointRef, *, is_hurried: bool) -> None:
        """Uploads the rows since the last checkpoint, together with the segments that the new one takes in.

        Args:
            rows: since the checkpoint before; none add no segment.
            ref: the checkpoint that commits them, under which no object lies yet.
            is_hurried: take in no segment, because there may be no time for that.
        """
        if not rows:
            return
        # The first rows may be of the moment at which the segment before ends, whose rows stay.
        ended = located(self.segments[-1].rows.key).checkpoint.images_seen if self.segments else -1
        contents = ["".join(json.dumps(row) + "\n" for row in rows).encode()]
        contents += [_events(rows, ended + 1, None if self.segments else self._config)]
        saves, before = 1, [*self.segments]
        while before and not is_hurried and before[-1].saves < GROWTH * saves and (older := self._read(before[-1])):
            contents = [earlier + later for earlier, later in zip(older, contents, strict=True)]
            saves += before.pop().saves
        keys = [kind.key(checkpoint=ref) for kind in (ObjectKind.METRICS, ObjectKind.EVENTS)]
        for key, data in zip(keys, contents, strict=True):
            self._run.create(key, data)
        lines, events = map(NamedObject.of, keys, contents)
        self.segments = (*before, Segment(saves=saves, rows=lines, events=events))

    def _read(self, segment: Segment) -> list[bytes]:
        """Returns the contents of a segment; none if it is damaged, so that its loss stays visible."""
        if segment.rows.key in self._damaged:
            return []
        try:
            contents = [one.read(self._run) for one in (segment.rows, segment.events)]
            _parsed(contents[0], self._run.uri_of(segment.rows.key))
            return contents
        except BadDataError as error:
            self._damaged.add(segment.rows.key)
            note(f"{error}; it stays by itself")
            return []


def _parsed(lines: bytes, uri: str) -> list[Row]:
    try:
        read = _LINES.validate_json(b"[%b]" % b",".join(lines.splitlines()))
    except ValidationError:
        raise BadDataError(f"{uri} holds no rows of this version") from None
    return [line.__dict__ | line.__pydantic_extra__ for line in read]


def _events(rows: Sequence[Row], begins_at: int, config: RunConfig | None) -> bytes:
    """Returns rows as a file of TensorBoard's, which may follow another one in a longer file.

    It begins with a start of a session, at which a TensorBoard forgets what it has read from `begins_at` on, such as
    the same rows elsewhere. It shows the values of `config`, which comes with a run's first rows, as hyper-parameters.
    """
    tensorboardx = _tensorboardx()
    summary, event_pb2 = tensorboardx.summary, tensorboardx.proto.event_pb2
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    about = summary.hparams(plain_settings(config), {"loss": 0.0}) if config is not None else ()
    events = [event_pb2.Event(session_log=start, step=begins_at, wall_time=time.time())]
    events += [_event(one, 0, time.time()) for one in about]
    for row in rows:
        named = [(name, value) for name, value in row.items() if name not in ("images_seen", "time")]
        values = [summary.scalar(name, value).value[0] for name, value in named if value is not None]
        events.append(_event(summary.Summary(value=values), row["images_seen"], row["time"]))
    return _file_of(events)


def grid_events(png: bytes, images_seen: int) -> bytes:
    """Returns a sample grid as TensorBoard events."""
    with Image.open(BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    grid = _tensorboardx().summary.image("samples", pixels, dataformats="HWC")
    return _file_of([_event(grid, images_seen, time.time())])


def plain_settings(config: RunConfig) -> Row:
    """Returns the settings by key, as numbers and texts, for programs that show runs."""
    return {key: str(value) if isinstance(value, list) else value for key, value in config.flat().items()}


def _event(summary: Any, images_seen: int, wall_time: float) -> Any:
    return _tensorboardx().proto.event_pb2.Event(summary=summary, step=images_seen, wall_time=wall_time)


def _file_of(events: Iterable[Any]) -> bytes:
    """Returns events in TFRecord's frames: length, its checksum, content, its checksum."""
    tensorboardx, contents = _tensorboardx(), list[bytes]()
    version = tensorboardx.proto.event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
    for event in (version, *events):
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = (struct.pack("<I", tensorboardx.record_writer.masked_crc32c(data)) for data in (length, content))
        contents += [length, next(checksums), content, next(checksums)]
    return b"".join(contents)


@cache
def _tensorboardx() -> ModuleType:
    # For buckets it would import two libraries, which takes as long as several steps of a small network.
    absent = {"boto3", "google.cloud.storage"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        import tensorboardX.record_writer
        import tensorboardX.summary
    finally:
        for name in absent:
            del sys.modules[name]
    return tensorboardX


def _note_loss(problem: str) -> None:
    note(f"going on without some rows of the metrics: {problem}")


def read_rows(run: Store, named: Iterable[NamedObject], warn: Callable[[str], None] = _note_loss) -> list[Row]:
    """Returns the rows of a checkpoint's metrics, in order; reports damaged objects to `warn`, and skips them."""

    def read(one: NamedObject) -> list[Row]:
        try:
            return _parsed(one.read(run), run.uri_of(one.key))
        except BadDataError as error:
            warn(str(error))
            return []

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        of_rows = [one for one in named if located(one.key).kind is ObjectKind.METRICS]
        return [row for rows in pool.map(read, of_rows) for row in rows]


def newest_rows(run: Store, warn: Callable[[str], None] = _note_loss) -> tuple[Manifest | None, list[Row]]:
    """Returns the manifest of the newest sound checkpoint, and its rows, as `read_rows`; none without a checkpoint.

    Training may retire that checkpoint meanwhile, and delete segments that later ones have taken in: then it chooses
    again.
    """
    while manifest := newest_sound(run, list_checkpoints(run)):
        problems = list[str]()
        rows = read_rows(run, manifest.metrics, problems.append)
        if not problems or run.exists(manifest.ref.manifest_key):
            for problem in problems:
                warn(problem)
            return manifest, rows
    return None, []


def merged(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with those of one moment merged, in order; of values logged twice the last counts."""
    at: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        # NaN and infinite or huge values cannot be drawn.
        sound = {name: value for name, value in row.items() if value is not None and -LARGEST < value < LARGEST**2}
        at.setdefault(row["images_seen"], {}).update(sound)
    return [at[images_seen] for images_seen in at if images_seen <= MAX_IMAGES_SEEN]

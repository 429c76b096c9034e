"""The points at which a run is killed, as data. A random kill is a moment instead of a point.

`benchmarks.exploration` kills simulated processes before and after every request to a bucket, and `tests` kill machines
that share work. These points are what is left: ranks and launchers, local files, disks that rot, pictures, the status.
"""

from __future__ import annotations

from dataclasses import dataclass

TENSORS = r"/checkpoints/[^/]+/(unet/)?[^/]+\.safetensors$"
MANIFEST = r"/checkpoints/[^/]+/MANIFEST\.json$"
PICTURES = r"(?<!/tensorboard)/samples/"


@dataclass(frozen=True)
class Point:
    """A point in a process that trains: the n-th operation `op` on an object whose URI matches `key`.

    Attributes:
        name: its name for `--points` and the report.
        what: its description for people.
        op: a method of `job.store.Store`, `sampling-step` for a step of a sampler, `losses` for a pass, `overflow` for
            a step in fp16 that is left out; or `rot`, done between processes.
        key: regular expression for the object's URI.
        when: `before` or `after` the operation.
        nth: the number of the matching operation of a process, from 1.
        data: regular expression for the written data.
        action: `kill` (SIGKILL), `term` (SIGTERM), or `shortage` (memory runs out there).
        target: `group`, `rank` or `launcher`.
        rank: the process that it lies in.
        processes: the number of processes that train.
        fresh: whether it needs a new cache.
    """

    name: str
    what: str
    op: str
    key: str = ""
    when: str = "after"
    nth: int = 1
    data: str = ""
    action: str = "kill"
    target: str = "group"
    rank: int = 0
    processes: int = 1
    fresh: bool = False


POINTS = (
    Point("download-3", "the first download has three shards", "download|open", r"/shard-\d+\.tar$", nth=3, fresh=True),
    Point("manifest", "the manifest is there, LATEST is not", "create", MANIFEST),
    Point("checkpoint-rot", "a bit of the newest checkpoint flips in the bucket", "rot"),
    Point("picture-before", "a picture is made, not stored", "put", f"{PICTURES}epoch-", when="before"),
    Point("cache-rot", "a byte of the cached images flips on the local disk", "rot"),
    Point("rank-1-sampling", "one of two ranks in in-training sampling", "sampling-step", nth=3, target="rank", rank=1,
          processes=2),
    Point("rank-0-manifest", "the rank that writes, one of two, after the manifest", "create", MANIFEST, target="rank",
          processes=2),
    Point("launcher-upload-2", "the launcher alone, with two files uploaded", "move", TENSORS, nth=2, target="launcher",
          processes=2),
    Point("term-upload-1", "SIGTERM to all while a checkpoint is uploaded", "move", TENSORS, action="term",
          processes=2),
    Point("last-picture", "the last picture is made, not stored", "put", f"{PICTURES}denoising-", when="before"),
    Point("finished-before", "everything is there, the status is not updated", "put", "/status.json$", when="before",
          data='"state": "finished"'),
    Point("overflow", "a step has overflowed in fp16, and is left out", "overflow", nth=9),
    Point("rank-1-shortage", "memory runs out in a step of one of two ranks", "losses", nth=50, action="shortage",
          target="rank", rank=1, processes=2),
    Point("sampling-shortage", "memory runs out in in-training sampling", "sampling-step", nth=3, action="shortage",
          target="rank"),
)  # fmt: skip
BY_NAME = {point.name: point for point in POINTS}

SABOTAGES = ("manifest-first", "position-off-by-one")
"""The ways to break a protocol on purpose, each of which shows at the point `manifest`."""


def listing() -> str:
    """Returns all points, a line each."""
    lines = []
    for number, point in enumerate(POINTS, 1):
        place = f"{point.when} {point.op} #{point.nth}" if point.op != "rot" else "between processes"
        lines.append(f"{number:>3}  {point.name:<20} {place:<26} {point.what}")
    return "\n".join(lines)

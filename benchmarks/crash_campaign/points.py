"""The points of the protocols at which a run is killed, as data. A random kill is a moment instead of a point.

`benchmarks.exploration` kills simulated processes before and after every request to a bucket. These points are what it
leaves out: real ranks and launchers, local files, disks that rot, pictures, weights of a parent, several machines.
"""

from __future__ import annotations

from dataclasses import dataclass

TENSORS = r"/checkpoints/[^/]+/(unet/)?[^/]+\.safetensors$"
MANIFEST = r"/checkpoints/[^/]+/MANIFEST\.json$"
PICTURES = r"(?<!/tensorboard)/samples/"
SHARD = r"/shard-\d+\.tar$"


@dataclass(frozen=True)
class Point:
    """A point in a process: the n-th operation `op` on an object whose URI matches `key`.

    Attributes:
        name: its name for `--points` and the report.
        what: its description for people.
        phase: the command it lies in: `pack`, `train`, `end` (of training), `sample` or `batch`; `shared-pack` and
            `shared-batch` where machines share that; `from`: `train` of a run that begins with another's weights.
        op: a method of `job.store.Store`, `sampling-step` for a step of a sampler; or `rot`, done between processes.
        key: regular expression for the object's URI.
        when: `before` or `after` the operation.
        nth: the number of the matching operation of a process, from 1.
        data: regular expression for the written data.
        action: `kill` (SIGKILL), `term` (SIGTERM), or `stop` (SIGSTOP until another attempt has replaced this one).
        target: `group`, `rank` or `launcher`.
        rank: the process that it lies in.
        processes: the number of processes that train.
        machines: the number of machines that share the work; the first one is killed.
        fresh: whether it needs a new cache.
    """

    name: str
    what: str
    phase: str
    op: str
    key: str = ""
    when: str = "after"
    nth: int = 1
    data: str = ""
    action: str = "kill"
    target: str = "group"
    rank: int = 0
    processes: int = 1
    machines: int = 1
    fresh: bool = False


POINTS = (
    Point("pack-upload-2", "the second shard is uploaded, it has no record", "pack", "move", SHARD, nth=2),
    Point("download-3", "the first download has three shards", "train", "download|open", SHARD, nth=3, fresh=True),
    Point("upload-2", "2 of 4 files are uploaded", "train", "move", TENSORS, nth=2),
    Point("manifest", "the manifest is there, LATEST is not", "train", "create", MANIFEST),
    Point("checkpoint-rot", "a bit of the newest checkpoint flips in the bucket", "train", "rot"),
    Point("sampling", "in the middle of in-training sampling", "train", "sampling-step", nth=3),
    Point("picture-before", "a picture is made, not stored", "train", "put", f"{PICTURES}epoch-", when="before"),
    Point("cache-rot", "a byte of the cached images flips on the local disk", "train", "rot"),
    Point("shard-rot", "an image in the bucket's shard is replaced by another", "train", "rot"),
    Point("zombie", "stopped between the last check of the lease and the manifest, woken after its replacement",
          "train", "create", MANIFEST, when="before", action="stop"),
    Point("rank-1-sampling", "one of two ranks in in-training sampling", "train", "sampling-step", nth=3,
          target="rank", rank=1, processes=2),
    Point("rank-0-manifest", "the rank that writes, one of two, after the manifest", "train", "create", MANIFEST,
          target="rank", processes=2),
    Point("launcher-upload-2", "the launcher alone, with two files uploaded", "train", "move", TENSORS, nth=2,
          target="launcher", processes=2),
    Point("term-upload-1", "SIGTERM to all while a checkpoint is uploaded", "train", "move", TENSORS, action="term",
          processes=2),
    Point("last-picture", "the last picture is made, not stored", "end", "put", f"{PICTURES}denoising-",
          when="before"),
    Point("finished-before", "everything is there, the status is not updated", "end", "put", "/status.json$",
          when="before", data='"state": "finished"'),
    Point("sample-step", "in the middle of `ddpm sample`", "sample", "sampling-step", nth=3),
    Point("sample-before", "its picture is made, not stored", "sample", "put", PICTURES, when="before"),
    Point("batch-step", "in the middle of a piece of `ddpm sample --count`", "batch", "sampling-step", nth=3),
    Point("shared-pack-upload", "a shard is uploaded, it has no record", "shared-pack", "move", SHARD, machines=3),
    Point("shared-batch-step", "in the middle of a piece", "shared-batch", "sampling-step", nth=3, machines=2),
    Point("parent-pinned", "the parent is pinned, and not read", "from", "create", "/config.yaml$"),
    Point("parent-read", "the parent's weights are read, nothing of them is saved", "from", "download", TENSORS),
    Point("parent-saved-before", "all of image 0 is uploaded but the manifest", "from", "create", MANIFEST,
          when="before"),
    Point("parent-saved", "image 0 is committed, and the parent is deleted", "from", "create", MANIFEST),
)  # fmt: skip
BY_NAME = {point.name: point for point in POINTS}

SABOTAGES = {
    "manifest-first": ("manifest",),
    "fence-ignored": ("zombie",),
    "position-off-by-one": ("manifest",),
    "image-hash-unchecked": ("shard-rot",),
}
"""The ways to break a protocol on purpose, and the points that show each."""


def listing() -> str:
    """Returns all points, a line each."""
    lines = []
    for number, point in enumerate(POINTS, 1):
        place = f"{point.when} {point.op} #{point.nth}" if point.op != "rot" else "between processes"
        lines.append(f"{number:>3}  {point.name:<20} {point.phase:<13} {place:<26} {point.what}")
    return "\n".join(lines)

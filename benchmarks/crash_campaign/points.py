"""The points of the protocols at which a run is killed, as data. A random kill is a moment instead of a point."""

from __future__ import annotations

from dataclasses import dataclass

INDEX = r"/index\.json$"
LEASE = r"/lease\.json$"
TENSORS = r"/checkpoints/[^/]+/(unet/)?[^/]+\.safetensors$"
SNAPSHOT = r"/snapshots/"
MANIFEST = r"/checkpoints/[^/]+/MANIFEST\.json$"
RECORD, CLAIM = r"/pieces/\d+\.json$", r"/claims/\d+/lease\.json$"
PIECE = r"/piece-\d+\.tar$"
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
        since: operations count only after one whose `OP URI` matches this.
        hold: whether earlier matching operations wait, so that all are still pending at this one.
        action: `kill` (SIGKILL), `term` (SIGTERM), or `stop` (SIGSTOP until another attempt has replaced this one).
        target: `group`, `rank` or `launcher`.
        rank: the process that it lies in.
        processes: the number of processes that train.
        machines: the number of machines that share the work; the first one is killed.
        fresh: whether it needs a new run, or a new cache.
    """

    name: str
    what: str
    phase: str
    op: str
    key: str = ""
    when: str = "after"
    nth: int = 1
    data: str = ""
    since: str = ""
    hold: bool = False
    action: str = "kill"
    target: str = "group"
    rank: int = 0
    processes: int = 1
    machines: int = 1
    fresh: bool = False


def _pack() -> list[Point]:
    return [
        Point("pack-staged", "the first shard is written, nothing uploaded", "pack", "move", SHARD, when="before"),
        Point("pack-upload-2", "the second shard is uploaded, it has no record", "pack", "move", SHARD, nth=2),
        Point("pack-record-3", "three shards have records", "pack", "create", RECORD, nth=3),
        Point("pack-index-before", "all shards are there, no index", "pack", "create", INDEX, when="before"),
        Point("pack-index", "the index is there, the records not deleted", "pack", "create", INDEX),
    ]


def _begin() -> list[Point]:
    take = '"renewal": 0,'
    return [
        Point(
            "lease-before",
            "the lease is about to be taken",
            "train",
            "create|replace",
            LEASE,
            when="before",
            data=take,
            fresh=True,
        ),
        Point(
            "lease-taken",
            "the lease is taken, and nothing else written",
            "train",
            "create|replace",
            LEASE,
            data=take,
            fresh=True,
        ),
        Point("config", "the configuration is there, no attempt", "train", "create", "/config.yaml$", fresh=True),
        Point("attempt", "the attempt is recorded", "train", "create", "/attempts/", fresh=True),
        Point("download-3", "the first download has three shards", "train", "download|open", SHARD, nth=3, fresh=True),
    ]


def _commit() -> list[Point]:
    staged, retired = "all local files are written, none of the checkpoint is uploaded", f"^delete .*{MANIFEST}"
    return [
        Point("staged", staged, "train", "move", TENSORS, when="before", nth=4, hold=True),
        *(Point(f"upload-{k}", f"{k} of 4 files are uploaded", "train", "move", TENSORS, nth=k) for k in range(1, 5)),
        Point("snapshot", "a snapshot of the averages is uploaded, nothing names it", "train", "move", SNAPSHOT),
        # The snapshot before it is what it deletes: an attempt between them might sweep first.
        Point("sweep", "most of the remains of dead attempts are deleted", "train", "delete", SNAPSHOT),
        Point("metrics", "the metrics of the checkpoint are uploaded", "train", "create", "/metrics/"),
        Point("metrics-merged", "so are those that take in earlier ones", "train", "create", "/metrics/", nth=2),
        Point("manifest-before", "everything but the manifest is there", "train", "create", MANIFEST, when="before"),
        Point("manifest", "the manifest is there, LATEST is not", "train", "create", MANIFEST),
        Point("latest", "LATEST is written, nothing retired", "train", "put", "/LATEST$"),
        Point("retire-manifest", "a manifest is deleted, its objects are not", "train", "delete", MANIFEST),
        Point("retire-object", "one of its objects is deleted, too", "train", "delete", TENSORS, since=retired),
        Point(
            "merged-rows",
            "merged metrics are deleted, their events are not",
            "train",
            "delete",
            "/metrics/",
            since=retired,
            fresh=True,
        ),
    ]


def _later() -> list[Point]:
    renewal = r'"renewal": [1-9]\d*,\s+"released": false'
    return [
        Point(
            "renewal-before", "the lease is about to be renewed", "train", "replace", LEASE, when="before", data=renewal
        ),
        Point("renewal", "the lease is renewed, the holder does not know", "train", "replace", LEASE, data=renewal),
        Point("checkpoint-rot", "a bit of the newest checkpoint flips in the bucket", "train", "rot"),
        Point("sampling", "in the middle of in-training sampling", "train", "sampling-step", nth=3),
        Point("picture-before", "a picture is made, not stored", "train", "put", f"{PICTURES}epoch-", when="before"),
        Point("cache-rot", "a byte of the cached images flips on the local disk", "train", "rot"),
        Point("shard-rot", "an image in the bucket's shard is replaced by another", "train", "rot", fresh=True),
        Point(
            "zombie",
            "stopped between the last check of the lease and the manifest, woken after its replacement",
            "train",
            "create",
            MANIFEST,
            when="before",
            action="stop",
        ),
    ]


def _of_two() -> list[Point]:
    return [
        Point("rank-1-sampling", "one of two ranks in in-training sampling", "train", "sampling-step", nth=3,
              target="rank", rank=1, processes=2),
        Point("rank-0-manifest", "the rank that writes, one of two, after the manifest", "train", "create", MANIFEST,
              target="rank", processes=2),
        Point("launcher-upload-2", "the launcher alone, with two files uploaded", "train", "move", TENSORS, nth=2,
              target="launcher", processes=2),
        Point("term-upload-1", "SIGTERM to all while a checkpoint is uploaded", "train", "move", TENSORS,
              action="term", processes=2),
    ]  # fmt: skip


def _end() -> list[Point]:
    return [
        Point("last-picture", "the last picture is made, not stored", "end", "put", f"{PICTURES}denoising-",
              when="before"),
        Point("finished-before", "everything is there, the status is not updated", "end", "put", "/status.json$",
              when="before", data='"state": "finished"'),
        Point("lease-return", "finished, the lease not released", "end", "replace", LEASE, when="before",
              data='"released": true'),
    ]  # fmt: skip


def _sample() -> list[Point]:
    return [
        Point("sample-step", "in the middle of `ddpm sample`", "sample", "sampling-step", nth=3),
        Point("sample-before", "its picture is made, not stored", "sample", "put", PICTURES, when="before"),
    ]


def _batch() -> list[Point]:
    return [
        Point("batch-step", "in the middle of a piece of `ddpm sample --count`", "batch", "sampling-step", nth=3),
        Point("batch-upload-2", "the second piece is uploaded, it has no record", "batch", "create", PIECE, nth=2),
        Point("batch-record-2", "the second of its records is written", "batch", "create", RECORD, nth=2),
        Point("batch-index-before", "all pieces are there, no index", "batch", "create", INDEX, when="before"),
    ]


def _shared() -> list[Point]:
    return [
        Point("shared-pack-claim", "a piece is claimed, nothing made", "shared-pack", "create", CLAIM, machines=2),
        Point("shared-pack-upload", "a shard is uploaded, it has no record", "shared-pack", "move", SHARD,
              machines=3),
        Point("shared-pack-record", "a piece has its record, its claim is not released", "shared-pack", "create",
              RECORD, machines=2),
        Point("shared-batch-claim", "a piece is claimed, nothing drawn", "shared-batch", "create", CLAIM,
              machines=3),
        Point("shared-batch-step", "in the middle of a piece", "shared-batch", "sampling-step", nth=3, machines=2),
        Point("shared-batch-upload", "a piece is uploaded, it has no record", "shared-batch", "create", PIECE,
              machines=3),
        Point("shared-batch-record", "a piece has its record, its claim is not released", "shared-batch", "create",
              RECORD, machines=2),
    ]  # fmt: skip


def _from() -> list[Point]:
    return [
        Point("parent-pinned", "the parent is pinned, and not read", "from", "create", "/config.yaml$"),
        Point("parent-read", "the parent's weights are read, nothing of them is saved", "from", "download", TENSORS),
        Point("parent-saved-before", "all of image 0 is uploaded but the manifest", "from", "create", MANIFEST,
              when="before"),
        Point("parent-saved", "image 0 is committed, and the parent is deleted", "from", "create", MANIFEST),
    ]  # fmt: skip


POINTS = (
    *(*_pack(), *_begin(), *_commit(), *_later(), *_of_two()),
    *(*_end(), *_sample(), *_batch(), *_shared(), *_from()),
)

SABOTAGES = {
    "manifest-first": ("manifest",),
    "fence-ignored": ("zombie",),
    "position-off-by-one": ("manifest",),
    "order-drawn-anew": ("manifest",),
    "image-hash-unchecked": ("shard-rot",),
}
"""The ways to break a protocol on purpose, and the points that show each."""


def listing() -> str:
    """Returns all points, a line each."""
    rows = [
        (
            f"{number:>3}",
            point.name,
            point.phase,
            f"{point.when} {point.op}" if point.op != "rot" else "between processes",
            f"#{point.nth}" if point.op != "rot" else "",
            point.what,
        )
        for number, point in enumerate(POINTS, 1)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

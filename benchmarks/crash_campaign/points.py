"""Where a run is killed: the points of its protocols, as data. A random kill is a moment instead of a point."""

from __future__ import annotations

from dataclasses import dataclass

INDEX = r"/index\.json$"
LEASE = r"/lease\.json$"
TENSORS = r"/checkpoints/[^/]+/(unet/)?[^/]+\.safetensors$"
SNAPSHOT = r"/snapshots/"
MANIFEST = r"/checkpoints/[^/]+/MANIFEST\.json$"
RECORD, CLAIM = r"/pieces/\d+\.json$", r"/claims/\d+/lease\.json$"
PIECE = r"/piece-\d+\.tar$"
PICTURES = r"(?<!/provenance)(?<!/tensorboard)/samples/"
SHARD = r"/shard-\d+\.tar$"


@dataclass(frozen=True)
class Point:
    """A moment in a process, told by what it does: the n-th operation `op` on an object whose URI matches `key`.

    Attributes:
        name: for `--points` and the report.
        what: for people.
        phase: the command it lies in: `pack`, `train`, `end` (of training), `sample` or `batch`; `shared-pack` and
            `shared-batch` where machines share that.
        op: a method of `job.store.Store`, `sampling-step` for a step of a sampler; or `rot`, done between processes.
        key: regular expression for the object's URI.
        when: `before` or `after` the operation.
        nth: which of the matching operations of a process, from 1.
        data: regular expression for what is written.
        since: only operations count that come after one whose `OP URI` matches this.
        hold: earlier matching operations wait, so that none has begun when this one is reached.
        action: `kill` (SIGKILL), `term` (SIGTERM), or `stop` (SIGSTOP until another attempt has replaced this one).
        target: `group`, `rank` or `launcher`.
        rank: in which of the processes.
        processes: how many train.
        machines: how many share the work; the first one is killed.
        fresh: whether it needs a run, or a cache, that nobody has begun.
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
        Point("pack-staged", "the first shard is written, nothing uploaded", "pack", "upload", SHARD, when="before"),
        Point("pack-upload-2", "the second shard is uploaded, it has no record", "pack", "upload", SHARD, nth=2),
        Point("pack-record-3", "three shards have records", "pack", "create", RECORD, nth=3),
        Point("pack-index-before", "all shards are there, the index is not", "pack", "create", INDEX, when="before"),
        Point("pack-index", "the index is there, the records not cleared away", "pack", "create", INDEX),
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
        Point("config", "the configuration is there, no attempt is", "train", "create", "/config.yaml$", fresh=True),
        Point("attempt", "the attempt is written down", "train", "create", "/attempts/", fresh=True),
        Point("download-3", "the first download has three shards", "train", "download|open", SHARD, nth=3, fresh=True),
    ]


def _commit() -> list[Point]:
    staged, retired = "all local files are written, none of the checkpoint is uploaded", f"^delete .*{MANIFEST}"
    return [
        Point("staged", staged, "train", "upload", TENSORS, when="before", nth=4, hold=True),
        *(Point(f"upload-{k}", f"{k} of 4 files are uploaded", "train", "upload", TENSORS, nth=k) for k in range(1, 5)),
        Point("snapshot", "a snapshot of the averages is uploaded, nothing names it", "train", "upload", SNAPSHOT),
        Point("metrics", "the metrics of the checkpoint are uploaded", "train", "create", "/metrics/"),
        Point("manifest-before", "everything but the manifest is there", "train", "create", MANIFEST, when="before"),
        Point("manifest", "the manifest is there, LATEST is not", "train", "create", MANIFEST),
        Point("latest", "LATEST is written, nothing retired", "train", "put", "/LATEST$"),
        Point("sweep", "the leavings of dead attempts are half swept", "train", "delete", "/metrics/"),
        Point("retire-manifest", "a manifest is deleted, its objects are not", "train", "delete", MANIFEST),
        Point("retire-object", "one of its objects is deleted, too", "train", "delete", TENSORS, since=retired),
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
        Point(
            "picture-before",
            "it is written where the picture comes from, but no picture",
            "train",
            "put",
            f"{PICTURES}epoch-",
            when="before",
        ),
        Point("cache-rot", "a byte of the cached images flips on the local disk", "train", "rot"),
        Point("shard-rot", "an image in the bucket's shard is replaced by another", "train", "rot", fresh=True),
        Point(
            "zombie",
            "stopped between the last look at the lease and the manifest, woken after it was replaced",
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
        Point("rank-0-manifest", "the writing one of two ranks, after the manifest", "train", "create", MANIFEST,
              target="rank", processes=2),
        Point("launcher-upload-2", "the launcher alone, with two files uploaded", "train", "upload", TENSORS, nth=2,
              target="launcher", processes=2),
        Point("term-upload-1", "SIGTERM to all while a checkpoint is uploaded", "train", "upload", TENSORS,
              action="term", processes=2),
    ]  # fmt: skip


def _end() -> list[Point]:
    return [
        Point("last-picture", "the last picture is drawn, not stored", "end", "put", f"{PICTURES}denoising-",
              when="before"),
        Point("finished-before", "all is there, the status does not say so", "end", "put", "/status.json$",
              when="before", data='"state": "finished"'),
        Point("lease-return", "finished, the lease not given back", "end", "replace", LEASE, when="before",
              data='"released": true'),
    ]  # fmt: skip


def _sample() -> list[Point]:
    return [
        Point("sample-step", "in the middle of `ddpm sample`", "sample", "sampling-step", nth=3),
        Point("sample-before", "its picture is drawn, not stored", "sample", "put", PICTURES, when="before"),
    ]


def _batch() -> list[Point]:
    return [
        Point("batch-step", "in the middle of a piece of `ddpm sample --count`", "batch", "sampling-step", nth=3),
        Point("batch-upload-2", "the second piece is uploaded, it has no record", "batch", "create", PIECE, nth=2),
        Point("batch-record-2", "the second of its records is written", "batch", "create", RECORD, nth=2),
        Point("batch-index-before", "all pieces are there, the index is not", "batch", "create", INDEX, when="before"),
    ]


def _shared() -> list[Point]:
    return [
        Point("shared-pack-claim", "a piece is claimed, nothing made", "shared-pack", "create", CLAIM, machines=2),
        Point("shared-pack-upload", "a shard is uploaded, it has no record", "shared-pack", "upload", SHARD,
              machines=3),
        Point("shared-pack-record", "a piece has its record, its claim is not given back", "shared-pack", "create",
              RECORD, machines=2),
        Point("shared-batch-claim", "a piece is claimed, nothing drawn", "shared-batch", "create", CLAIM,
              machines=3),
        Point("shared-batch-step", "in the middle of a piece", "shared-batch", "sampling-step", nth=3, machines=2),
        Point("shared-batch-upload", "a piece is uploaded, it has no record", "shared-batch", "create", PIECE,
              machines=3),
        Point("shared-batch-record", "a piece has its record, its claim is not given back", "shared-batch", "create",
              RECORD, machines=2),
    ]  # fmt: skip


POINTS = (*_pack(), *_begin(), *_commit(), *_later(), *_of_two(), *_end(), *_sample(), *_batch(), *_shared())

SABOTAGES = {
    "manifest-first": ("manifest",),
    "fence-ignored": ("zombie",),
    "position-off-by-one": ("manifest",),
    "order-drawn-anew": ("manifest",),
    "shard-hash-unchecked": ("shard-rot",),
}
"""Ways to break the protocols on purpose, and the points at which each shows."""


def listing() -> str:
    """All points, a line each."""
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

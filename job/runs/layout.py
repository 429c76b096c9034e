"""What lies where in a run's folder, said once: whoever writes, verifies, prunes or deletes reads this table.

A row is the key of one kind of object below `BUCKET/runs/NAME`. It serves both ways: `key` fills it in, and
`located` finds the row of a key and reads the fields out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from job.processes.lease import LEASE_KEY
from job.store import Store

RUNS = "runs"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
MAX_IMAGES_SEEN = 10**12 - 1
"""What the twelve digits in a checkpoint's name can count."""


@dataclass(frozen=True, order=True, slots=True)
class CheckpointRef:
    """A checkpoint's place in the order: attempts first, then progress."""

    fence: int
    images_seen: int

    def __str__(self) -> str:
        return f"{self.fence:06d}-{self.images_seen:012d}"

    @property
    def key(self) -> str:
        """Its folder below the run."""
        return f"{CHECKPOINTS}/{self}"

    @property
    def manifest_key(self) -> str:
        """Where its manifest lies, whose existence is the commit."""
        return ObjectKind.MANIFEST.key(checkpoint=self)

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """The inverse of `str`."""
        fence, _, images_seen = text.partition("-")
        return cls(int(fence), int(images_seen))


class ObjectKind(Enum):
    """The kinds of objects in a run's folder, and their keys."""

    CONFIG = "config.yaml"  # resolved when the run began; never rewritten
    LEASE = LEASE_KEY  # who may write to the run now
    STATUS = "status.json"  # how it is going, for people
    LATEST = "LATEST"  # the last commit, a hint
    PAGE = "report.html"  # what people look at, written anew now and then
    ATTEMPT = "attempts/{fence:06d}.json"  # one per attempt, created once: its number is the attempt's fence
    MANIFEST = "checkpoints/{checkpoint}/MANIFEST.json"  # created once, last: the commit of a checkpoint
    TENSORS = "checkpoints/{checkpoint}/{group}-{number:02d}.safetensors"
    PIPELINE = "checkpoints/{checkpoint}/{pipeline}"  # the weights that draw, and what describes them, for diffusers
    AVERAGE = "checkpoints/{checkpoint}/averages/{group}.json"  # created once, last: the commit of a reconstruction
    AVERAGE_TENSORS = "checkpoints/{checkpoint}/averages/{unique}/{group}-{number:02d}.safetensors"
    SNAPSHOT = "snapshots/{checkpoint}/{group}-{number:02d}.safetensors"  # averages of then, in half precision
    METRICS = "metrics/{checkpoint}.jsonl"  # rows up to this checkpoint and since the one before
    EVENTS = "tensorboard/events.out.tfevents.{checkpoint}"  # the same rows for TensorBoard
    GRID_EVENTS = "tensorboard/samples/events.out.tfevents.{checkpoint}"  # a sample grid for TensorBoard
    PICTURE = "samples/{name}.{picture}"
    FIGURE = "figures/{name}.{picture}"
    DRAWING = "samples/{batch}/drawing.json"  # what decides the images of a batch: created once, first
    PIECE = "samples/{batch}/piece-{piece:05d}.tar"  # a shard that webdataset can read
    IMAGE = "samples/{batch}/piece-{piece:05d}/{seed:09d}.png"  # with --save png
    RECORD = "samples/{batch}/pieces/{piece:05d}.json"  # created once, after the piece: its commit
    CLAIM = "samples/{batch}/claims/{piece:05d}/lease.json"  # the process that makes the piece now
    GRID = "samples/{batch}/grid.png"  # the first images of a batch
    INDEX = "samples/{batch}/index.json"  # created once, when all pieces are there
    PROVENANCE = "provenance/{of}/{sha256}.json"  # where a picture of these bytes comes from
    FEATURES = "evaluations/{batch}/piece-{piece:05d}.safetensors"  # of drawn images, until the scores are there
    FEATURE_RECORD = "evaluations/{batch}/pieces/{piece:05d}.json"  # created once, after them: their commit
    FEATURE_CLAIM = "evaluations/{batch}/claims/{piece:05d}/lease.json"  # the process that makes them now
    SCORES = "evaluations/{batch}/scores.json"  # created once: how far they are from real images
    FOUND_GRID = "grids/found-{steps}.json"  # created once: the points that were found for so many steps
    READER = "reading/{checkpoint}-{unique}.json"  # somebody reads this checkpoint; it stays until then
    PROBE = "probe/{unique}"  # measures how long a save takes; deleted at once

    def key(self, **fields: object) -> str:
        """The key of an object of this kind, below the run."""
        return self.value.format(**fields)

    @property
    def folder(self) -> str:
        """The folder below the run in which all of this kind lie."""
        return self.value.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Located:
    """What the key of an object says; fields that its kind does not have are empty, zero or -1."""

    kind: ObjectKind | None
    """None for what is no part of a run."""
    checkpoint: CheckpointRef = CheckpointRef(0, 0)
    fence: int = 0
    group: str = ""
    batch: str = ""
    piece: int = -1
    steps: int = 0
    of: str = ""
    sha256: str = ""


OF_CHECKPOINT = (ObjectKind.TENSORS, ObjectKind.PIPELINE)
"""What a manifest commits."""
PICTURES = (ObjectKind.PICTURE, ObjectKind.FIGURE, ObjectKind.GRID, ObjectKind.GRID_EVENTS)
"""What has a record of where it comes from."""
_FIELDS = {
    "checkpoint": r"\d{6}-\d{12}",
    "fence": r"\d{6}",
    "group": r"[a-z]+(?:-0\.\d+)?",
    "number": r"\d{2,}",
    "pipeline": r"(?:model_index|scheduler/scheduler_config|unet/config)\.json"
    r"|unet/diffusion_pytorch_model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?",
    "name": "[^/]+",
    "picture": "png|gif",
    "batch": "[^/]+",
    "piece": r"\d{5}",
    "steps": r"[1-9]\d{0,6}",
    "seed": r"\d{9,18}",
    "of": r"(?:samples|figures)/.+\.(?:png|gif)|tensorboard/samples/[^/]+",
    "sha256": "[0-9a-f]{64}",
    "unique": "[0-9a-f]{1,32}",
}
"""How each field is written in a key."""
_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("group", "batch", "of", "sha256"), str),
    **dict.fromkeys(("fence", "piece", "steps"), int),
    "checkpoint": CheckpointRef.parse,
}
"""Those that are read out of it again."""


def located(key: str) -> Located:
    """The kind of the object at `key`, below a run, and what else its key says."""
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(key):
            return Located(kind, **{field: _READ[field](match[field]) for field in _READ.keys() & pattern.groupindex})
    return Located(None)


def places_in(run: Store, *folders: str) -> dict[str, Located]:
    """All objects in these folders of a run, or in all of it, by key."""
    return {entry.key: located(entry.key) for folder in folders or ("",) for entry in run.list(folder)}


def _pattern(kind: ObjectKind) -> re.Pattern[str]:
    literals = re.split(r"\{(\w+)[^}]*\}", kind.value)
    parts = (f"(?P<{part}>{_FIELDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(literals))
    # Other scripts have digits, too.
    return re.compile("".join(parts), re.ASCII)


_PATTERNS = [(kind, _pattern(kind)) for kind in ObjectKind]

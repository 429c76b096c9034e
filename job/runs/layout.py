"""The layout of a run's folder: one table of keys for writing, verification, pruning and deletion.

A row is the key of one kind of object below `BUCKET/runs/NAME`. `ObjectKind.key` fills in its fields, and `located`
finds the row of a key and reads the fields out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from job.coordination.lease import LEASE_KEY
from job.store import Store

RUNS = "runs"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
MAX_IMAGES_SEEN = 10**12 - 1
"""The largest number that fits the twelve digits of a checkpoint's name."""


@dataclass(frozen=True, order=True, slots=True)
class CheckpointRef:
    """The name of a checkpoint; names are ordered by attempt, then by progress."""

    fence: int
    images_seen: int

    def __str__(self) -> str:
        return f"{self.fence:06d}-{self.images_seen:012d}"

    @property
    def key(self) -> str:
        """Returns its folder below the run."""
        return f"{CHECKPOINTS}/{self}"

    @property
    def manifest_key(self) -> str:
        """Returns the key of its manifest, whose existence is the commit."""
        return ObjectKind.MANIFEST.key(checkpoint=self)

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """Returns the checkpoint of a name, as the inverse of `str`."""
        fence, _, images_seen = text.partition("-")
        return cls(int(fence), int(images_seen))


class ObjectKind(Enum):
    """The kinds of objects in a run's folder, and their keys."""

    CONFIG = "config.yaml"  # resolved when the run began; never rewritten
    NETWORK = "network.py"  # the file of a network of the user, for people; never executed
    LEASE = LEASE_KEY  # the attempt that may write to the run now
    STATUS = "status.json"  # the progress of the run, for people
    LATEST = "LATEST"  # the checkpoint of the last commit, a hint
    PAGE = "report.html"  # the page of the run, rewritten with each sample grid
    ATTEMPT = "attempts/{fence:06d}.json"  # one per attempt, created once: its number is the attempt's fence
    FITTING = "fitting.json"  # the images at once that fit the memory, rewritten when it runs out: a hint
    MANIFEST = "checkpoints/{checkpoint}/MANIFEST.json"  # created once, last: the commit of a checkpoint
    TENSORS = "checkpoints/{checkpoint}/{group}-{number:02d}.safetensors"
    PIPELINE = "checkpoints/{checkpoint}/{pipeline}"  # weights to sample with, for diffusers
    AVERAGE = "checkpoints/{checkpoint}/averages/{group}.json"  # created once, last: the commit of a reconstruction
    AVERAGE_TENSORS = "checkpoints/{checkpoint}/averages/{unique}/{group}-{number:02d}.safetensors"
    SNAPSHOT = "snapshots/{checkpoint}/{group}-{number:02d}.safetensors"  # averages at a checkpoint, in half precision
    METRICS = "metrics/{checkpoint}.jsonl"  # a segment of the rows, which ends with this checkpoint
    EVENTS = "tensorboard/events.out.tfevents.{checkpoint}"  # the same rows for TensorBoard
    GRID_EVENTS = "tensorboard/samples/events.out.tfevents.{checkpoint}"  # a sample grid for TensorBoard
    PICTURE = "samples/{name}.{picture}"
    FIGURE = "figures/{name}.{picture}"
    PIECE = "samples/{folder}/piece-{piece:05d}.tar"  # a shard that webdataset can read
    IMAGE = "samples/{folder}/piece-{piece:05d}/{seed:09d}.png"  # with --save png
    RECORD = "samples/{folder}/pieces/{piece:05d}.json"  # created once, after the piece: its commit
    CLAIM = "samples/{folder}/claims/{piece:05d}/lease.json"  # the process that makes the piece now
    GRID = "samples/{folder}/grid.png"  # the first images of a set
    INDEX = "samples/{folder}/index.json"  # created once, when all pieces are there
    FEATURES = "evaluations/{folder}/piece-{piece:05d}.safetensors"  # of samples, deleted once they are scored
    FEATURE_RECORD = "evaluations/{folder}/pieces/{piece:05d}.json"  # created once, after the features: their commit
    FEATURE_CLAIM = "evaluations/{folder}/claims/{piece:05d}/lease.json"  # the process that makes them now
    SCORES = "evaluations/{folder}/scores.json"  # created once: distances from real images
    FOUND_GRID = "grids/found-{steps}.json"  # created once: timesteps found for this number of steps
    READER = "reading/{checkpoint}-{unique}.json"  # a process reads this checkpoint, which stays meanwhile
    PROBE = "probe/{unique}"  # shows whether a run may be written to; deleted at once

    def key(self, **fields: object) -> str:
        """Returns the key of an object of this kind, below the run."""
        return self.value.format(**fields)

    @property
    def folder(self) -> str:
        """Returns the folder below the run that holds all objects of this kind."""
        return self.value.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Located:
    """The fields of an object's key; those that its kind does not have are empty, zero or -1."""

    kind: ObjectKind | None
    """None if the object is not part of a run."""
    checkpoint: CheckpointRef = CheckpointRef(0, 0)
    fence: int = 0
    group: str = ""
    folder: str = ""
    piece: int = -1


OF_CHECKPOINT = (ObjectKind.TENSORS, ObjectKind.PIPELINE)
"""Kinds that a manifest commits."""
PICTURES = (ObjectKind.PICTURE, ObjectKind.FIGURE, ObjectKind.GRID)
"""Kinds with their origin and SHA-256 in themselves; see `run.with_origin`."""
_FIELDS = {
    "checkpoint": r"\d{6}-\d{12}",
    "fence": r"\d{6}",
    "group": r"[a-z]+(?:-0\.\d+)?",
    "number": r"\d{2,}",
    "pipeline": r"(?:model_index|id2label|condition|scheduler/scheduler_config|unet/config)\.json|run_config\.yaml"
    r"|unet/diffusion_pytorch_model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?",
    "name": "[^/]+",
    "picture": "png|gif",
    "folder": "[^/]+",
    "piece": r"\d{5}",
    "steps": r"[1-9]\d{0,6}",
    "seed": r"\d{9,18}",
    "unique": "[0-9a-f]{1,32}",
}
"""The pattern of each field in a key."""
_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("group", "folder"), str),
    **dict.fromkeys(("fence", "piece"), int),
    "checkpoint": CheckpointRef.parse,
}
"""The type of each field that `located` reads."""


def located(key: str) -> Located:
    """Returns the kind of the object at `key`, below a run, and the other fields of its key."""
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(key):
            return Located(kind, **{field: _READ[field](match[field]) for field in _READ.keys() & pattern.groupindex})
    return Located(None)


def places_in(run: Store, *folders: str) -> dict[str, Located]:
    """Returns all objects in these folders of a run, or in all of it, by key."""
    return {entry.key: located(entry.key) for folder in folders or ("",) for entry in run.list(folder)}


def _pattern(kind: ObjectKind) -> re.Pattern[str]:
    literals = re.split(r"\{(\w+)[^}]*\}", kind.value)
    parts = (f"(?P<{part}>{_FIELDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(literals))
    # Without ASCII, \d matches the digits of other scripts, too.
    return re.compile("".join(parts), re.ASCII)


_PATTERNS = [(kind, _pattern(kind)) for kind in ObjectKind]

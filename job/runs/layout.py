"""What lies where in a run's folder, said once: whoever writes, verifies, prunes or deletes reads this table.

A row is the key of one kind of object below `BUCKET/runs/NAME`. It serves both ways: `Kind.key` fills it in, and
`located` finds the row of a key and reads the fields out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

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

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """The inverse of `str`."""
        fence, _, images_seen = text.partition("-")
        return cls(int(fence), int(images_seen))


class Kind(Enum):
    """The kinds of objects in a run's folder, and their keys."""

    CONFIG = "config.yaml"  # resolved when the run began; never rewritten
    LEASE = "lease.json"  # who may write to the run now
    STATUS = "status.json"  # how it is going, for people
    LATEST = "LATEST"  # the last commit, a hint
    ATTEMPT = "attempts/{fence:06d}.json"  # one per attempt, created once: its number is the attempt's fence
    MANIFEST = "checkpoints/{checkpoint}/MANIFEST.json"  # created once, last: the commit of a checkpoint
    TENSORS = "checkpoints/{checkpoint}/{group}-{number:02d}.safetensors"
    METRICS = "metrics/{checkpoint}.jsonl"  # rows up to this checkpoint and since the one before
    EVENTS = "tensorboard/events.out.tfevents.{checkpoint}"  # the same rows for TensorBoard
    PICTURE = "samples/{name}.{picture}"
    FIGURE = "figures/{name}.{picture}"
    DRAWING = "samples/{batch}/drawing.json"  # what decides the images of a batch: created once, first
    PIECE = "samples/{batch}/piece-{piece:05d}.tar"  # a shard that webdataset can read
    IMAGE = "samples/{batch}/piece-{piece:05d}/{seed:09d}.png"  # with --save png
    RECORD = "samples/{batch}/records/piece-{piece:05d}.json"  # created once, after the piece: its commit
    GRID = "samples/{batch}/grid.png"  # the first images of a batch
    INDEX = "samples/{batch}/index.json"  # created once, when all pieces are there
    PROVENANCE = "provenance/{of}/{sha256}.json"  # where a picture of these bytes comes from
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

    kind: Kind
    checkpoint: CheckpointRef = CheckpointRef(0, 0)
    fence: int = 0
    batch: str = ""
    piece: int = -1
    of: str = ""
    sha256: str = ""


PICTURES = (Kind.PICTURE, Kind.FIGURE, Kind.GRID)
"""What has a record of where it comes from."""
_KEY_FIELDS: dict[str, tuple[str, Callable[[str], object] | None]] = {
    "checkpoint": (r"\d{6}-\d{12}", CheckpointRef.parse),
    "fence": (r"\d{6}", int),
    "group": ("[a-z]+", None),
    "number": (r"\d{2,}", None),
    "name": ("[^/]+", None),
    "picture": ("png|gif", None),
    "batch": ("[^/]+", str),
    "piece": (r"\d{5}", int),
    "seed": (r"\d{9,18}", None),
    "of": (r"(?:samples|figures)/.+\.(?:png|gif)", str),
    "sha256": ("[0-9a-f]{64}", str),
    "unique": ("[0-9a-f]{1,32}", None),
}
"""How a field is written in a key, and how it is read back into `Located`."""


def located(key: str) -> Located | None:
    """The kind of the object at `key`, below a run, and what else its key says; none if it is no part of a run."""
    for kind, pattern in _PATTERNS.get(key.partition("/")[0], ()):
        if match := pattern.fullmatch(key):
            fields = {name: read(text) for name, text in match.groupdict().items() if (read := _KEY_FIELDS[name][1])}
            return Located(kind, **fields)  # type: ignore[arg-type]
    return None


def _pattern(kind: Kind) -> re.Pattern[str]:
    literals = re.split(r"\{(\w+)[^}]*\}", kind.value)
    parts = (f"(?P<{part}>{_KEY_FIELDS[part][0]})" if i % 2 else re.escape(part) for i, part in enumerate(literals))
    return re.compile("".join(parts))


_PATTERNS: dict[str, list[tuple[Kind, re.Pattern[str]]]] = {}
for _kind in Kind:
    _PATTERNS.setdefault(_kind.folder, []).append((_kind, _pattern(_kind)))

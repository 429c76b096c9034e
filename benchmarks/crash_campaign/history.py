"""A run and its result: tensors, metrics and pictures at its end, images of each attempt; and what differs in two."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageSequence

from benchmarks.crash_campaign.processes import BrokenError, Event, Invocation, Moment
from job.exits import JobError
from job.runs.checkpoints import list_checkpoints, newest_good, restore
from job.runs.layout import CHECKPOINTS, RUNS, SAMPLES, CheckpointRef, ObjectKind, located, places_in
from job.runs.metric_rows import Row, read_rows
from job.store import Store, open_store

MEASURED = ("images_per_second", "memory_bytes", "time")
"""The metrics that differ between any two runs."""

TITLE_PIXELS = 48
"""The largest height of a picture's title."""
_SET_ASIDE = re.compile(rf"set aside checkpoint \S+/{CHECKPOINTS}/(\S+):")
Ref = tuple[int, int]


@dataclass(frozen=True)
class Ending:
    """The content of a finished run in the bucket."""

    ref: Ref
    """Fence and images seen of the newest checkpoint."""
    hashes: dict[str, str]
    """SHA-256 over names, shapes and bytes of all tensors, by group; and of the run's snapshots."""
    loss_sums: list[list[float]]
    rows: list[Row]
    pictures: dict[str, str]
    """SHA-256 of the pixels, by name."""

    @property
    def weights_sha256(self) -> str:
        """One hash over all groups of tensors."""
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()


def read_ending(run: Store) -> Ending:
    """Reads a finished run's newest checkpoint, with its metrics and pictures.

    Raises:
        BadDataError: no checkpoint verifies, or a metric segment does not.
    """
    if (manifest := newest_good(run)) is None:
        raise LookupError(f"{run.uri} has no checkpoint")
    hashes = {f"{manifest.group_of(f)} {f.name}": f.sha256 for f in manifest.files if manifest.group_of(f)}
    hashes |= {f"{located(f.key).checkpoint.images_seen:,}-image {f.name}": f.sha256 for f in manifest.snapshots}
    return Ending(
        (manifest.fence, manifest.images_seen),
        hashes,
        manifest.loss_sums,
        read_rows(run, manifest.metrics, print),
        {
            key: _pixels_sha256(run.read(key).data)
            for key, place in places_in(run, SAMPLES).items()
            if place.kind is ObjectKind.PICTURE
        },
    )


def _pixels_sha256(data: bytes) -> str:
    """Returns the hash of all frames of a picture below its title, which has the name of the run."""
    with Image.open(io.BytesIO(data)) as image:
        below = (0, TITLE_PIXELS, image.width, image.height)
        frames = (frame.convert("RGB").crop(below).tobytes() for frame in ImageSequence.Iterator(image))
        return hashlib.sha256(b"".join(frames)).hexdigest()


@dataclass
class History:
    """The work of all attempts at a run, from their traces."""

    steps: dict[int, list[tuple[int, dict[int, str]]]] = field(default_factory=dict)
    """By fence: the images seen after each step, and the images of one rank in it (number → hash)."""
    restored: dict[int, Ref] = field(default_factory=dict)
    sums: dict[int, list[list[float]]] = field(default_factory=dict)
    """The loss sums of the last commit at each number of images seen."""
    trained: Counter[int] = field(default_factory=Counter)
    """The number of times that all attempts together trained on each image number."""

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Reads the events of all processes of a run."""
        history = cls()
        for event in events:
            if event["event"] == "step":
                images = dict(event["images"])
                history.steps.setdefault(event["fence"], []).append((event["images_seen"], images))
                history.trained.update(images.keys())
            elif event["event"] == "restored":
                history.restored[event["fence"]] = (event["ref"][0], event["ref"][1])
            elif event["event"] == "commit":
                history.sums[event["ref"][1]] = event["loss_sums"]
        return history

    def effective(self, ref: Ref) -> list[tuple[int, str]]:
        """Returns every image of a checkpoint, with its number: from its attempt, its parent's, and so on."""
        images: list[tuple[int, str]] = []
        at: Ref | None = ref
        while at is not None:
            fence, until = at
            at = self.restored.get(fence)
            since = at[1] if at else 0
            for images_seen, step in self.steps.get(fence, []):
                if since < images_seen <= until:
                    images += step.items()
        return images

    @property
    def repeated_images(self) -> int:
        """The number of images that an attempt trained on again, because a kill came before their save."""
        return sum(self.trained.values()) - len(self.trained)


def lost_images(history: History, ending: Ending) -> int:
    """Returns the number of images up to the end of the run that never went into its final weights."""
    return len(set(range(ending.ref[1])) - {number for number, _ in history.effective(ending.ref)})


def differences(history: History, ending: Ending, reference: History, undisturbed: Ending) -> list[str]:
    """Returns the differences of a disturbed run from the undisturbed one, causes first; empty if both are equal."""
    committed = history.sums.keys() & reference.sums.keys()
    ours, theirs = _facts(history, ending, committed), _facts(reference, undisturbed, committed)
    expected, counts = dict(theirs), Counter(name for name, _ in ours)
    kinds = {
        "is missing": [name for name in expected if name not in counts],
        "is there twice": [name for name, count in counts.items() if count > 1],
        # `ddpm sample` may have made pictures since.
        "is beyond the undisturbed run": [n for n in counts if n not in expected and not n.startswith("picture ")],
        "is another": [name for name, value in ours if expected.get(name, value) != value],
    }
    found = [
        f"{names[0]} {what}" + f", and {len(names) - 1:,} more" * (len(names) > 1)
        for what, names in kinds.items()
        if names
    ]
    if not found and ending.rows != sorted(ending.rows, key=lambda row: row["images_seen"]):
        found.append("the metrics are in another order")
    return found


def _facts(history: History, ending: Ending, committed: Iterable[int]) -> list[tuple[str, Any]]:
    """Returns all that two runs are compared by, each with its name."""
    rows = ((row["images_seen"], {key: row[key] for key in row.keys() - set(MEASURED)}) for row in ending.rows)
    return [
        *(
            (f"image {number} (pixels, noise, point)", digest)
            for number, digest in sorted(history.effective(ending.ref))
        ),
        *((f"the tensors of {group}", sha256) for group, sha256 in ending.hashes.items()),
        *((f"the metrics at {images_seen} images", row) for images_seen, row in rows),
        *((f"the loss sums committed at {images_seen} images", history.sums[images_seen]) for images_seen in committed),
        ("the last manifest's loss sums", ending.loss_sums),
        *((f"picture {name}", sha256) for name, sha256 in ending.pictures.items()),
    ]


@dataclass
class Run:
    """One run of a lane, from its first process to its last."""

    name: str
    store: Store
    invocations: list[Invocation] = field(default_factory=list)
    lingering: list[tuple[Invocation, Moment]] = field(default_factory=list)
    verified: set[CheckpointRef] = field(default_factory=set)
    rotten: set[CheckpointRef] = field(default_factory=set)

    @classmethod
    def of(cls, bucket: str, name: str) -> Run:
        """Returns the run of a name in a bucket, before its first process."""
        return cls(name, open_store(bucket).sub(f"{RUNS}/{name}"))

    @property
    def history(self) -> History:
        """The work of all its attempts."""
        return History.of(event for invocation in self.invocations for event in invocation.events)

    @property
    def checkpoints(self) -> list[CheckpointRef]:
        """The committed checkpoints, oldest first."""
        try:
            return list_checkpoints(self.store)
        except JobError:
            # A bucket that is a folder does not exist before its first object.
            return []

    @property
    def set_aside(self) -> set[str]:
        """Folders of checkpoints that a process found damaged."""
        return {name for invocation in self.invocations for name in _SET_ASIDE.findall(invocation.output)}

    def misjudged(self) -> list[str]:
        """Returns the intact checkpoints that a process set aside, and the damaged ones that no process noticed."""
        damaged, aside = {str(ref) for ref in self.rotten}, self.set_aside
        intact = [f"checkpoint {name} was set aside without damage" for name in sorted(aside - damaged)]
        return intact + [f"checkpoint {name} was damaged, and no process noticed" for name in sorted(damaged - aside)]

    def audit(self) -> None:
        """Checks that every committed checkpoint is intact, with its snapshots.

        Raises:
            BrokenError: one is not, and the campaign did not damage it.
        """
        for ref in set(self.checkpoints) - self.verified - self.rotten:
            try:
                for snapshot in restore(self.store, ref).manifest.snapshots:
                    snapshot.read(self.store)
                self.verified.add(ref)
            except JobError as error:
                raise BrokenError(f"checkpoint {ref.key} is committed, but {error}") from None

    def written_after_loss(self) -> list[str]:
        """Returns the attempts that wrote after another took the run; one write may have been in progress."""
        events = [event for invocation in self.invocations for event in invocation.events]
        taken, late = 0, Counter[int]()
        for event in sorted(events, key=lambda event: event["time"]):
            if event["event"] == "began":
                taken = max(taken, event["fence"])
            elif event["event"] in ("commit", "delete") and event["fence"] < taken:
                late[event["fence"]] += 1
        return [f"attempt {fence} wrote {n} times after another took the run" for fence, n in late.items() if n > 1]

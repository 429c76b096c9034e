"""The result of a run: tensors, metrics and pictures at its end, and the training images of each attempt."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageSequence

from benchmarks.crash_campaign.processes import Event
from job.runs.checkpoints import newest_good
from job.runs.layout import SAMPLES, ObjectKind, located, places_in
from job.runs.metric_rows import Row, read_rows
from job.store import Store

MEASURED = ("images_per_second", "memory_bytes", "time")
"""The metrics that differ between any two runs."""

TITLE_PIXELS = 48
"""The largest height of a picture's title."""
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


def saved_images(run: Store) -> dict[str, str]:
    """Returns the SHA-256 of every piece of `ddpm sample --count`, by name; empty if the index lists other pieces."""
    pieces, listed = {}, {}
    for entry in run.list(SAMPLES):
        name = entry.key.rpartition("/")[2]
        if name.startswith("piece-") and name.endswith(".tar"):
            pieces[name] = hashlib.sha256(run.read(entry.key).data).hexdigest()
        elif name == "index.json":
            listed = {
                piece["key"].rpartition("/")[2]: piece["sha256"]
                for piece in json.loads(run.read(entry.key).data)["pieces"]
            }
    return pieces if pieces == listed else {}


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
    found = _image_differences(history.effective(ending.ref), dict(reference.effective(undisturbed.ref)))
    for group in sorted(ending.hashes.keys() | undisturbed.hashes.keys()):
        ours, theirs = ending.hashes.get(group, "none"), undisturbed.hashes.get(group, "none")
        if ours != theirs:
            found.append(f"the final {group} tensors differ: {ours[:16]}… instead of {theirs[:16]}…")
    found += _row_differences(ending.rows, undisturbed.rows)
    if ending.loss_sums != undisturbed.loss_sums:
        found.append(f"the last manifest's loss sums differ: {ending.loss_sums} instead of {undisturbed.loss_sums}")
    for images_seen in sorted(history.sums.keys() & reference.sums.keys()):
        if history.sums[images_seen] != reference.sums[images_seen]:
            found.append(f"the loss sums committed at {images_seen} images differ from the undisturbed run's")
            break
    pictures = ending.pictures
    if missing := sorted(undisturbed.pictures.keys() - pictures.keys()):
        found.append(_named(missing, "picture", "is missing", "are missing"))
    if others := sorted(name for name, sha256 in undisturbed.pictures.items() if pictures.get(name, sha256) != sha256):
        found.append(_named(others, "picture", "is another", "are others"))
    return found


def _named(names: list[Any], kind: str, what: str, what_all: str) -> str:
    """Returns `image 216 was lost`, or `3 images were lost, the first is 216`."""
    if len(names) == 1:
        return f"{kind} {names[0]} {what}"
    return f"{len(names):,} {kind}s {what_all}, the first is {names[0]}"


def _image_differences(effective: list[tuple[int, str]], expected: dict[int, str]) -> list[str]:
    found = []
    counts = Counter(number for number, _ in effective)
    if lost := sorted(expected.keys() - counts.keys()):
        found.append(_named(lost, "image", "of the order was lost", "of the order were lost"))
    if doubled := sorted(number for number, count in counts.items() if count > 1):
        found.append(_named(doubled, "image", "went into the final weights twice", "went into the final weights twice"))
    if beyond := sorted(counts.keys() - expected.keys()):
        found.append(_named(beyond, "image", "is beyond the end of the run", "are beyond the end of the run"))
    if other := sorted(number for number, digest in effective if expected.get(number, digest) != digest):
        what = "other pixels, noise or points than undisturbed"
        found.append(_named(other, "image", f"had {what}", f"had {what}"))
    return found


def _row_differences(rows: list[Row], expected: list[Row]) -> list[str]:
    places, wanted = ([row["images_seen"] for row in some] for some in (rows, expected))
    found = []
    if doubled := [place for place, count in Counter(places).items() if count > 1]:
        found.append(f"the metrics have a duplicate at {doubled[0]} images")
    if missing := sorted(set(wanted) - set(places)):
        found.append(f"the metrics have a gap at {missing[0]} images")
    if places != wanted and not found:
        found.append("the metrics have rows that the undisturbed run has not, or in another order")
    if found:
        return found
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() | other.keys():
            if name not in MEASURED and row.get(name) != other.get(name):
                place = row["images_seen"]
                return [f"the metrics at {place} images have {name} {row.get(name)} instead of {other.get(name)}"]
    return []

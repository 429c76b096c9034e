"""What a page says of a run, read from its folder; nothing here knows of HTML."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from job.config import CHOSEN_ELSEWHERE, FOLLOWS, LARGEST, RunConfig, draft
from job.exits import BadDataError, JobError
from job.keys import shown
from job.plan import FoundRun
from job.progress import note
from job.report.usual import Verdict, verdict_of
from job.runs import metrics, records
from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest, newest_sound
from job.runs.layout import MAX_IMAGES_SEEN, ObjectKind, places_in
from job.runs.metrics import Row
from job.runs.outlook import Outlook, Stretch, attempts_of, outlook_of, state_in, stretches
from job.runs.records import Status
from job.runs.samples import denoising_key, grid_key, label_of, moment_of
from job.runs.scores import Scores
from job.store import ObjectMissingError


@dataclass(frozen=True)
class Grid:
    """A sample grid, of the same seeds as all others of its run."""

    moment: str
    """Such as `epoch 80`."""
    key: str
    """Below the run."""


@dataclass(frozen=True)
class Facts:
    """A run at one moment."""

    found: FoundRun
    name: str
    status: Status | None
    outlook: Outlook
    attempts: list[Stretch]
    rows: list[Row]
    """Of the metrics, those of one moment as one, in order."""
    grids: list[Grid]
    """Oldest first."""
    denoising: str
    """Key of the GIF of the newest moment; empty if there is none."""
    others: list[str]
    """Keys of all other pictures."""
    scores: list[Scores]
    parameters: int
    """Of the network, about; 0 where there is no checkpoint yet."""
    checkpoints: list[str]
    """Moments of those that are there."""
    state: str = field(default="not started")

    @cached_property
    def verdict(self) -> Verdict | None:
        """How the run goes beside others of its preset; None where there is nothing to compare."""
        return verdict_of(self.config, self.rows, self.found.index)

    @property
    def config(self) -> RunConfig:
        """As it was last changed."""
        return self.found.config

    @property
    def epoch_images(self) -> int | None:
        """None where nobody knows how long an epoch is."""
        return self.found.index.images if self.found.index else None

    @property
    def go_on(self) -> str:
        """What is typed to go on; empty for a run that cannot be trained."""
        data = self.config.data
        if not data.dataset:
            return ""
        more = ["--epochs", str(2 * self.config.train.epochs)] if self.state == "finished" else []
        return shlex.join(["ddpm", "train", *self._about(self.name), *more])

    @property
    def make_again(self) -> str:
        """What is typed to make another run like it."""
        if not self.config.data.dataset or self.config.imported:
            return ""
        exact = {"data.size": self.config.data.size, "train.precision": self.config.train.precision}
        chosen = exact | {key: ours for key, (_, ours) in self.differing.items()}
        sets = [word for key, value in chosen.items() for word in ("--set", f"{key}={shown(value)}")]
        preset = ["--preset", self.config.preset] if self.config.preset else []
        # A name has 63 characters at most.
        return shlex.join(["ddpm", "train", *self._about(f"{self.name[:57]}-again"), *preset, *sets])

    def _about(self, run: str) -> list[str]:
        return ["--dataset", self.config.data.dataset, "--run", run, "--bucket", self.found.bucket.uri]

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """How the configuration differs from its preset, by key: the preset's value, and the run's."""
        try:
            usual = draft(self.config.preset, {"model.kind": self.config.model.kind}).flat()
        except JobError:
            return {}
        ours = self.config.flat()
        keys = [key for key in ours if key not in (*CHOSEN_ELSEWHERE, *FOLLOWS)]
        if usual["train.precision"] == "auto":
            # What that was is the machine's.
            keys.remove("train.precision")
        if self.config.model.num_classes == 0 and self.found.index and self.found.index.classes:
            keys.append("model.num_classes")
        return {key: (usual.get(key), ours[key]) for key in keys if usual.get(key) != ours[key]}


def facts_of(
    found: FoundRun,
    name: str,
    rows: Sequence[Row] | None = None,
    status: Status | None = None,
    say: Callable[[str], None] = note,
    only_loss: bool = False,
) -> Facts:
    """What a page says.

    Args:
        found: the run.
        name: of it.
        rows: of the metrics; None: those that the newest checkpoint names.
        status: how it is going; None: as its status says.
        say: told what could not be read.
        only_loss: of the metrics that are read.
    """
    run, config = found.run, found.config
    status = status or records.read_status(run)
    refs = list_checkpoints(run)
    manifest = _manifest(found, say)
    if rows is None:
        rows = metrics.read_rows(run, manifest.metrics, say, only_loss) if manifest else []
    places = places_in(run, ObjectKind.PICTURE.folder, ObjectKind.SCORES.folder)
    attempts = stretches(attempts_of(run), status)
    epoch_images, batch_size, how = found.dataset_images, config.train.batch_size, config.sample.name(found.own)

    def label(images_seen: int) -> str:
        return label_of(images_seen, epoch_images, batch_size)

    moments = {key: place for key, place in places.items() if place.kind is ObjectKind.PICTURE}
    grids = [(key, _moment_in(key)) for key in moments]
    own = [Grid(moment_of(at), key) for key, at in sorted(grids, key=_order) if at and key == grid_key(at, how)]
    gifs = [denoising_key(at, how) for _, at in sorted(grids, key=_order, reverse=True) if at]
    gif = next((key for key in gifs if key in moments), "")
    shown = {grid.key for grid in own} | {gif}
    scores = []
    for key, place in places.items():
        if place.kind is ObjectKind.SCORES:
            try:
                scores.append(Scores.load(run, key))
            except (BadDataError, ObjectMissingError) as error:
                say(f"the page is without {error}")
    return Facts(
        found=found,
        name=name,
        status=status,
        outlook=outlook_of(attempts, status),
        attempts=attempts,
        rows=merged(rows),
        grids=own,
        denoising=gif,
        others=[key for key in sorted(moments) if key not in shown],
        scores=sorted(scores, key=lambda each: (each.ref.images_seen, each.batch)),
        parameters=_parameters(manifest),
        checkpoints=[moment_of(label(ref.images_seen)) for ref in sorted(refs, key=lambda ref: ref.images_seen)],
        state=state_in(run, status),
    )


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of one moment as one, in order; of what a resumed run logged again the last counts."""
    at: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        # What is no number that can be drawn is left out.
        sound = {name: value for name, value in row.items() if value is not None and -LARGEST < value < LARGEST**2}
        at.setdefault(row["images_seen"], {}).update(sound)
    return [at[images_seen] for images_seen in at if images_seen <= MAX_IMAGES_SEEN]


def _moment_in(key: str) -> str:
    """`epoch-0080` of `samples/epoch-0080-ddim-100.png`; empty if there is none."""
    words = key.rpartition("/")[2].removeprefix("denoising-").split("-")
    is_moment = len(words) > 2 and words[0] in ("epoch", "images") and words[1].isdecimal()
    return "-".join(words[:2]) if is_moment else ""


def _order(grid: tuple[str, str]) -> tuple[str, int]:
    unit, _, number = grid[1].partition("-")
    return unit, int(number or 0)


def _manifest(found: FoundRun, say: Callable[[str], None]) -> Manifest | None:
    with suppress(ObjectMissingError):
        if ref := newest_sound(found.run, list_checkpoints(found.run)):
            try:
                return load_manifest(found.run, ref)
            except BadDataError as error:
                say(f"the page is without {error}")
    return None


def _parameters(manifest: Manifest | None) -> int:
    if manifest is None:
        return 0
    # Four bytes each; what a file says of its tensors is small beside them.
    return sum(file.size_bytes for file in manifest.files if manifest.group_of(file) == "model") // 4

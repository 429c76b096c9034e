"""What a page says of a run, read from its folder; nothing here knows of HTML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from job.config import RunConfig
from job.exits import BadDataError
from job.keys import shown
from job.plan import FoundRun
from job.progress import note
from job.report.usual import Verdict, differing, verdict_of
from job.runs import metrics, records
from job.runs.checkpoints import Manifest, by_progress, list_checkpoints, newest_sound
from job.runs.layout import ObjectKind, places_in
from job.runs.metrics import Row
from job.runs.outlook import AttemptSpan, Outlook, attempts_of, outlook_of, spans_of, state_in
from job.runs.records import Status
from job.runs.samples import denoising_key, grid_key, label_of, moment_of
from job.runs.scores import Scores
from job.store import ObjectMissingError

_LABEL = "LABEL"


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
    attempts: list[AttemptSpan]
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
        return differing(self.config, self.found.index)


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
    manifest = newest_sound(run, refs)
    if rows is None:
        rows = metrics.read_rows(run, manifest.metrics, say, only_loss) if manifest else []
    places = places_in(run, ObjectKind.PICTURE.folder, ObjectKind.SCORES.folder)
    attempts = spans_of(attempts_of(run), status)
    pictures, how = [key for key in places if places[key].kind is ObjectKind.PICTURE], config.sample.name(found.own)
    grids = [Grid(moment_of(label), key) for label, key in _in_order(pictures, grid_key(_LABEL, how))]
    gifs = [key for _, key in _in_order(pictures, denoising_key(_LABEL, how))]
    shown = {*(grid.key for grid in grids), *gifs[-1:]}
    labels = [label_of(seen, found.dataset_images, config.train.batch_size) for seen in by_progress(refs)]
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
        rows=metrics.merged(rows),
        grids=grids,
        denoising=gifs[-1] if gifs else "",
        others=[key for key in sorted(pictures) if key not in shown],
        scores=sorted(scores, key=lambda each: (each.ref.images_seen, each.batch)),
        parameters=_parameters(manifest),
        checkpoints=[moment_of(label) for label in labels],
        state=state_in(run, status),
    )


def _in_order(keys: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """Labels and keys of the pictures that are called so, with any label in the place of `_LABEL`; the oldest first."""
    matches = (re.fullmatch(re.escape(pattern).replace(_LABEL, r"((epoch|images)-(\d+))"), key) for key in keys)
    found = sorted((match[2], int(match[3]), match[1], match[0]) for match in matches if match)
    return [(label, key) for _, _, label, key in found]


def _parameters(manifest: Manifest | None) -> int:
    if manifest is None:
        return 0
    # Four bytes each; what a file says of its tensors is small beside them.
    return sum(file.size_bytes for file in manifest.files if manifest.group_of(file) == "model") // 4

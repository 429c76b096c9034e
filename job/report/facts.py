"""The facts about a run that its page shows, read from its folder; independent of HTML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from job.config import CHOSEN_ELSEWHERE, FOLLOWS, RunConfig, draft
from job.exits import BadDataError, JobError, State
from job.plan import RunHandle
from job.progress import note
from job.runs import metric_rows, records
from job.runs.checkpoints import Manifest, by_progress, list_checkpoints, newest_sound
from job.runs.layout import ObjectKind, places_in
from job.runs.metric_rows import Row
from job.runs.outlook import AttemptSpan, Outlook, attempts_of, outlook_of, spans_of, state_in
from job.runs.records import Status
from job.runs.samples import Scores, denoising_key, grid_key, label_at, moment_of
from job.store import ObjectMissingError

_LABEL = "LABEL"
"""A label in the patterns of `_in_order`."""


@dataclass(frozen=True)
class DatedGrid:
    """A sample grid; all grids of a run have the same seeds."""

    moment: str
    """The moment of its weights, such as `epoch 80`."""
    key: str
    """The key below the run."""


@dataclass(frozen=True)
class Facts:
    """The state of a run at one moment."""

    handle: RunHandle
    name: str
    status: Status | None
    outlook: Outlook
    attempts: list[AttemptSpan]
    rows: list[Row]
    """The merged rows of the metrics, in order."""
    grids: list[DatedGrid]
    """Oldest first."""
    newest_gif: str
    """The key of the newest denoising GIF; empty without one."""
    own_pictures: list[str]
    """The keys of the pictures that `ddpm sample` made."""
    scores: list[Scores]
    parameters: int
    """The approximate number of the network's parameters; 0 before the first checkpoint."""
    checkpoints: list[str]
    """The moments of the checkpoints."""
    state: str
    """See `job.runs.outlook.state_in`."""
    median_images_per_second: float | None
    """The median of all rows; None without rows."""

    @property
    def config(self) -> RunConfig:
        """Returns the configuration as it was last changed."""
        return self.handle.config

    @property
    def epoch_images(self) -> int | None:
        """Returns the images of an epoch; None if the dataset is missing."""
        return self.handle.index.images if self.handle.index else None

    @property
    def is_running(self) -> bool:
        """Returns whether an attempt writes the run now."""
        return self.state == State.RUNNING

    @property
    def go_on(self) -> str:
        """Returns the command that goes on with the run; empty if it cannot be trained."""
        data = self.config.data
        if not data.dataset:
            return ""
        more = ["--epochs", str(2 * self.config.train.epochs)] if self.state == State.FINISHED else []
        about = ["--dataset", data.dataset, "--run", self.name, "--bucket", self.handle.bucket.uri]
        return shlex.join(["ddpm", "train", *about, *more])

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Returns the values that differ from the preset, by key: the preset's, and the run's."""
        config, index = self.config, self.handle.index
        try:
            of_kind = draft(config.preset, {"model.kind": config.model.kind}).flat()
            theirs = of_kind | {"model.kind": draft(config.preset, {}).model.kind}
        except JobError:
            return {}
        ours = config.flat()
        keys = [key for key in ours if key not in (*CHOSEN_ELSEWHERE, *FOLLOWS)]
        if theirs["train.precision"] == "auto":
            # The machine chose the precision.
            keys.remove("train.precision")
        if config.model.num_classes == 0 and index and index.classes:
            keys.append("model.num_classes")
        return {key: (theirs.get(key), ours[key]) for key in keys if theirs.get(key) != ours[key]}


def facts_of(
    handle: RunHandle,
    name: str,
    rows: Sequence[Row] | None = None,
    status: Status | None = None,
    say: Callable[[str], None] = note,
    brief: bool = False,
) -> Facts:
    """Collects the facts about a run.

    Args:
        handle: the run.
        name: of the run.
        rows: of the metrics; None: those of the newest checkpoint.
        status: of the run; None: the one in its folder.
        say: receives messages about objects that cannot be read.
        brief: read only the most important metrics; see `read_rows`.
    """
    run, config = handle.run, handle.config
    status = status or records.read_status(run)
    refs = list_checkpoints(run)
    if rows is None:
        manifest, rows = metric_rows.newest_rows(run, say, brief)
    else:
        manifest = newest_sound(run, refs)
    places = places_in(run, ObjectKind.PICTURE.folder, ObjectKind.SCORES.folder)
    attempts = spans_of(attempts_of(run), status)
    pictures = [key for key in places if places[key].kind in (ObjectKind.PICTURE, ObjectKind.GRID)]
    how = config.sample.name(handle.first_sample)
    grids = [DatedGrid(moment_of(label), key) for label, key in _in_order(pictures, grid_key(_LABEL, how))]
    gifs = [key for _, key in _in_order(pictures, denoising_key(_LABEL, how))]
    made_by_run = {*(grid.key for grid in grids), *gifs}
    rows = metric_rows.merged(rows)
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    labels = [label_at(seen, handle.dataset_images, config.train.batch_size) for seen in by_progress(refs)]
    scores = []
    for key, place in places.items():
        if place.kind is ObjectKind.SCORES:
            try:
                scores.append(Scores.load(run, key))
            except (BadDataError, ObjectMissingError) as error:
                say(f"the page is without {error}")
    return Facts(
        handle=handle,
        name=name,
        status=status,
        outlook=outlook_of(attempts, status),
        attempts=attempts,
        rows=rows,
        grids=grids,
        newest_gif=gifs[-1] if gifs else "",
        own_pictures=sorted(set(pictures) - made_by_run, key=_newest_first),
        scores=sorted(scores, key=lambda each: (each.ref.images_seen, each.name)),
        parameters=_parameters(manifest),
        checkpoints=[moment_of(label) for label in labels],
        state=state_in(run, status),
        median_images_per_second=median(speeds) if speeds else None,
    )


def _in_order(keys: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """Returns the labels and keys that match `pattern`, in which `_LABEL` is any label; the oldest first."""
    matches = (re.fullmatch(re.escape(pattern).replace(_LABEL, r"((epoch|images)-(\d+))"), key) for key in keys)
    found = sorted((match[2], int(match[3]), match[1], match[0]) for match in matches if match)
    return [(label, key) for _, _, label, key in found]


def _newest_first(key: str) -> tuple[float, str]:
    """Returns the order of a picture's key: first those of several checkpoints, then from the newest checkpoint on."""
    match = re.search(r"(?:epoch|images)-(\d{1,12})", key)
    return -int(match[1]) if match else -inf, key


def _parameters(manifest: Manifest | None) -> int:
    if manifest is None:
        return 0
    # A parameter has four bytes; the headers of the files are small.
    return sum(file.size_bytes for file in manifest.files if manifest.group_of(file) == "model") // 4

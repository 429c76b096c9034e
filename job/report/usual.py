"""What is usual for a preset on its own dataset: a band of losses by epoch, and where a run is to it.

The bands lie in `presets/`, below `usual`, and come from `python -m benchmarks.usual`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from job.config import CHOSEN_ELSEWHERE, FOLLOWS, FREE, FREE_SECTIONS, RunConfig, draft, usual_of
from job.data.shards import DatasetIndex
from job.exits import JobError
from job.runs.metrics import Row

BEHIND = 1.5
"""Times the upper end of the band: a loss above that is of a run that does not learn what others do."""


@dataclass(frozen=True)
class Verdict:
    """How a run is going, beside others like it."""

    word: str
    """`on track`, `behind` or `broken`; empty where it is too early to tell."""
    reason: str
    epochs: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """The band of the loss at these epochs."""


def verdict_of(config: RunConfig, rows: Sequence[Row], index: DatasetIndex | None) -> Verdict | None:
    """Where a run is to the band of its preset; None where there is none for such a run.

    Args:
        config: of the run.
        rows: of its metrics, in order.
        index: of its dataset.
    """
    usual = usual_of(config.preset)
    if usual is None or index is None or index.dataset_id != usual.dataset_id or not _learns_as_preset(config, index):
        return None
    band = (usual.epochs, usual.low, usual.high)
    losses = [(row["images_seen"] / index.images, row["loss"]) for row in rows if row.get("loss") is not None]
    if not losses or losses[-1][0] < usual.epochs[0]:
        return Verdict("", f"too early to tell: the band begins at epoch {usual.epochs[0]:g}", *band)
    epoch = losses[-1][0]
    # As the band was made: the mean of the last epoch.
    loss = float(np.mean([loss for at, loss in losses if at > epoch - 1]))
    low, high = (float(np.interp(epoch, usual.epochs, ends)) for ends in (usual.low, usual.high))
    word = "on track" if loss <= high else "behind" if loss <= BEHIND * high else "broken"
    said = f"loss {loss:.4g} over the last epoch; {low:.4g} to {high:.4g} is usual at epoch {epoch:.1f}"
    return Verdict(word, said, *band)


def differing(config: RunConfig, index: DatasetIndex | None) -> dict[str, tuple[Any, Any]]:
    """How a configuration differs from its preset, by key: the preset's value, and its own."""
    kind = config.model.kind
    try:
        usual = draft(config.preset, {}).flat()
        usual = draft(config.preset, {"model.kind": kind}).flat() | {"model.kind": usual["model.kind"]}
    except JobError:
        return {}
    ours = config.flat()
    keys = [key for key in ours if key not in (*CHOSEN_ELSEWHERE, *FOLLOWS)]
    if usual["train.precision"] == "auto":
        # What that was is the machine's.
        keys.remove("train.precision")
    if config.model.num_classes == 0 and index and index.classes:
        keys.append("model.num_classes")
    return {key: (usual.get(key), ours[key]) for key in keys if usual.get(key) != ours[key]}


def _learns_as_preset(config: RunConfig, index: DatasetIndex) -> bool:
    """Whether nothing that decides what is learnt differs from the preset."""
    free = {*FREE, "train.precision", "train.seed"}
    decides = [key for key in differing(config, index) if key not in free and key.split(".")[0] not in FREE_SECTIONS]
    return not decides and config.model.num_classes == len(index.classes)

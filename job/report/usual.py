"""The usual losses of a preset on its dataset, as a band by epoch, and the verdict on a run's loss.

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
from job.runs.metric_rows import Row

BEHIND = 1.5
"""A loss above this multiple of the band's upper end counts as broken."""


@dataclass(frozen=True)
class Verdict:
    """The loss of a run among those of other runs of its preset."""

    word: str
    """`on track`, `behind` or `broken`; empty before the band begins."""
    reason: str
    epochs: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """The band of the loss at these epochs."""


def verdict_of(config: RunConfig, rows: Sequence[Row], index: DatasetIndex | None) -> Verdict | None:
    """Compares a run's loss with the band of its preset; returns None if no band fits the run.

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
    # The mean of the last epoch, as in the band.
    loss = float(np.mean([loss for at, loss in losses if at > epoch - 1]))
    low, high = (float(np.interp(epoch, usual.epochs, ends)) for ends in (usual.low, usual.high))
    word = "on track" if loss <= high else "behind" if loss <= BEHIND * high else "broken"
    reason = f"loss {loss:.4g} over the last epoch; {low:.4g} to {high:.4g} is usual at epoch {epoch:.1f}"
    return Verdict(word, reason, *band)


def differing(config: RunConfig, index: DatasetIndex | None) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ from the preset, by key: the preset's, and the configuration's."""
    kind = config.model.kind
    try:
        usual = draft(config.preset, {}).flat()
        usual = draft(config.preset, {"model.kind": kind}).flat() | {"model.kind": usual["model.kind"]}
    except JobError:
        return {}
    ours = config.flat()
    keys = [key for key in ours if key not in (*CHOSEN_ELSEWHERE, *FOLLOWS)]
    if usual["train.precision"] == "auto":
        # The machine chose the precision.
        keys.remove("train.precision")
    if config.model.num_classes == 0 and index and index.classes:
        keys.append("model.num_classes")
    return {key: (usual.get(key), ours[key]) for key in keys if usual.get(key) != ours[key]}


def _learns_as_preset(config: RunConfig, index: DatasetIndex) -> bool:
    """Returns whether all settings that decide what is learnt are those of the preset."""
    free = {*FREE, "train.precision", "train.seed"}
    decides = [key for key in differing(config, index) if key not in free and key.split(".")[0] not in FREE_SECTIONS]
    return not (decides or config.parent.run) and config.model.num_classes == len(index.classes)

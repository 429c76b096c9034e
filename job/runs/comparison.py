"""`ddpm runs compare`: the losses of two runs against each other, row by row.

Runs of one seed on one dataset see the same image with the same noise and timestep at each step, however many processes
and attempts they took. Their losses therefore share the random part, and a paired difference shows in a few rows what
would otherwise take many runs.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from job.config import RunConfig
from job.exits import BadRequestError, MissingInputError
from job.progress import note
from job.runs import metric_rows, records
from job.runs.listing import print_table
from job.store import Store, open_store

PAIRED_BY = ("data.dataset_id", "data.order", "data.shuffle_block_images", "train.seed", "train.batch_size")
"""Keys that must be equal, so that image n of both runs is the same, with the same noise and timestep."""
SAME_LOSS = ("diffusion.", "data.size", "data.channels")
"""Sections and keys that must be equal, so that the losses have the same objective."""
_PARTS = ("", "_q0", "_q1", "_q2", "_q3")
LOSSES = (*(f"{name}{part}" for name in ("loss", "val_loss") for part in _PARTS), "val_bits_per_dim")
"""The compared losses: of all timesteps and of each quarter of them."""
FEWEST_ROWS = 3


def compare_runs(bucket_uri: str, first: str, second: str, since_epoch: float) -> None:
    """Prints the mean differences between the losses of `second` and `first`, with standard errors.

    Args:
        bucket_uri: where both lie.
        first: a run.
        second: another one.
        since_epoch: rows up to this epoch are left out.

    Raises:
        MissingInputError: the bucket lacks a run, or they have too few rows in common.
        BadRequestError: they do not see the same images in the same order.
    """
    from rich.table import Table

    bucket, names = open_store(bucket_uri), (first, second)
    configs = [records.existing_config(bucket, name) for name in names]
    differing = _differing(*configs)
    if unpaired := [key for key in PAIRED_BY if key in differing]:
        values = "; ".join(f"{key} is {differing[key][0]} and {differing[key][1]}" for key in unpaired)
        raise BadRequestError(f"runs {first!r} and {second!r} do not see the same images with the same noise: {values}")
    rows = [_rows(bucket, name) for name in names]
    images = sorted(rows[0].keys() & rows[1].keys())
    epoch_images = records.dataset_images_of(bucket, configs[0])
    images = [seen for seen in images if seen > since_epoch * epoch_images]
    if len(images) < FEWEST_ROWS:
        raise MissingInputError(
            f"runs {first!r} and {second!r} have {len(images)} rows at the same image"
            f"{f' after epoch {since_epoch:g}' if since_epoch else ''}, of at least {FEWEST_ROWS}: "
            "train them on, and with the same log.every_images"
        )
    for key, (ours, theirs) in differing.items():
        print(f"{key}: {ours} and {theirs}")
    if any(key.startswith(SAME_LOSS) for key in differing):
        note("their losses have different objectives: only a lower val_bits_per_dim means a better run")
    print(f"means from image {images[0]:,} to {images[-1]:,}; ± is one standard error of the mean difference")
    table = Table("", first, second, f"{second} − {first}", "±", box=None)
    for name in LOSSES:
        pairs = [(rows[0][seen][name], rows[1][seen][name]) for seen in images if all(name in r[seen] for r in rows)]
        if len(pairs) >= FEWEST_ROWS:
            ours, theirs = zip(*pairs, strict=True)
            differences = [after - before for before, after in pairs]
            numbers = (fmean(ours), fmean(theirs), fmean(differences), stdev(differences) / math.sqrt(len(pairs)))
            table.add_row(name, *(f"{number:.5g}" for number in numbers))
    print_table(table, "they have no losses in common")


def _differing(first: RunConfig, second: RunConfig) -> dict[str, tuple[object, object]]:
    """Returns the values that differ, by key, but for the settings of sampling."""
    ours, theirs = first.flat(), second.flat()
    keys = dict.fromkeys([*ours, *theirs])
    pairs = {key: (ours.get(key, "nothing"), theirs.get(key, "nothing")) for key in keys}
    return {key: values for key, values in pairs.items() if values[0] != values[1] and not key.startswith("sample.")}


def _rows(bucket: Store, name: str) -> dict[int, metric_rows.Row]:
    """Returns the merged rows of a run up to its newest checkpoint, by images seen."""
    run = records.run_store(bucket, name)
    manifest, rows = metric_rows.newest_rows(run)
    if manifest is None:
        raise MissingInputError(f"run {name!r} has no checkpoint yet, and no losses")
    return {row["images_seen"]: row for row in metric_rows.merged(rows)}

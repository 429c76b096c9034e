"""Two runs against each other, row by row.

Runs of one seed on one dataset see the same image with the same noise at the same point at each step, however they were
split and interrupted. What luck adds to their losses is then the same in both, and their difference tells in a few rows
what would otherwise take many runs.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev

from job.config import RunConfig
from job.exits import BadRequestError, MissingInputError
from job.progress import note
from job.runs import metrics, records
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.overview import print_table
from job.store import Store, open_store

PAIRED_BY = ("data.dataset_id", "data.order", "data.shuffle_block_images", "train.seed", "train.batch_size")
"""With these equal, image n of one run is image n of the other, with the same noise and draw of a point."""
SAME_LOSS = ("diffusion.", "data.size", "data.channels")
"""With these equal, the losses are of the same kind."""
FEWEST_ROWS = 3


def compare_runs(bucket_uri: str, first: str, second: str, since_epoch: float) -> None:
    """Prints by how much the losses of `second` are above those of `first`, and how sure that is.

    Args:
        bucket_uri: where both lie.
        first: a run.
        second: another one.
        since_epoch: rows up to then are left out.

    Raises:
        MissingInputError: there is no such run, or too few rows that both have.
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
        note("their losses are of different objectives: only of val_bits_per_dim is a lower one that of a better run")
    print(f"means from image {images[0]:,} to {images[-1]:,}; ± is one standard error of the mean difference")
    table = Table("", first, second, f"{second} − {first}", "±", box=None)
    for name in (
        "loss",
        *(f"loss_q{i}" for i in range(4)),
        "val_loss",
        *(f"val_loss_q{i}" for i in range(4)),
        "val_bits_per_dim",
    ):
        pairs = [(rows[0][seen][name], rows[1][seen][name]) for seen in images if all(name in r[seen] for r in rows)]
        if len(pairs) >= FEWEST_ROWS:
            ours, theirs = zip(*pairs, strict=True)
            differences = [after - before for before, after in pairs]
            numbers = (fmean(ours), fmean(theirs), fmean(differences), stdev(differences) / math.sqrt(len(pairs)))
            table.add_row(name, *(f"{number:.5g}" for number in numbers))
    print_table(table, "they have no losses in common")


def _differing(first: RunConfig, second: RunConfig) -> dict[str, tuple[object, object]]:
    """Values that differ, by key, of those that may decide what is learnt."""
    ours, theirs = first.flat(), second.flat()
    keys = dict.fromkeys([*ours, *theirs])
    told = {key: (ours.get(key, "nothing"), theirs.get(key, "nothing")) for key in keys}
    return {key: values for key, values in told.items() if values[0] != values[1] and not key.startswith("sample.")}


def _rows(bucket: Store, name: str) -> dict[int, metrics.Row]:
    """All rows of a run up to its newest checkpoint, those of one moment as one, by images seen."""
    run = records.run_store(bucket, name)
    if not (refs := list_checkpoints(run)):
        raise MissingInputError(f"run {name!r} has no checkpoint yet, and no losses")
    rows = metrics.merged(metrics.read_rows(run, load_manifest(run, max(refs)).metrics))
    return {row["images_seen"]: row for row in rows}

"""`ddpm runs seen`: how often a run has learnt an image, when, and which checkpoints know it."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from job.data.cache import uncached_images
from job.data.keys import find_image
from job.data.order import order_of
from job.data.shards import load_index
from job.exits import BadDataError
from job.progress import note
from job.runs import records
from job.runs.layout import located
from job.runs.lineage import Lineage
from job.runs.listing import print_json, print_table
from job.runs.metric_rows import read_rows
from job.sealed import MOMENT_FORMAT
from job.store import open_store


def show_seen(bucket_uri: str, name: str, key: str, *, as_json: bool = False) -> None:
    """Prints where the run has learnt the image with this key, and the checkpoints and snapshots after that.

    Raises:
        MissingInputError: no such run, dataset, checkpoint or image.
        BadDataError: a record is damaged, or the dataset has other images now.
    """
    from rich.table import Table

    bucket = open_store(bucket_uri)
    config, run = records.existing_config(bucket, name), records.run_store(bucket, name)
    index = load_index(bucket, dataset_key := records.dataset_key_of(config))
    if index.dataset_id != config.data.dataset_id:
        raise BadDataError(f"{bucket.uri}/{dataset_key} has other images than those that run {name!r} learnt")
    lineage = Lineage.of(run, config)
    newest, seen = lineage.newest, lineage.newest.images_seen
    image = find_image(uncached_images(bucket, dataset_key, index).source, key)
    numbers = order_of(index, config).numbers_of(image, -(-seen // index.images))
    numbers = numbers[numbers < seen]
    rows = read_rows(run, newest.metrics, note, brief=True)
    known = [(row["images_seen"], row["time"]) for row in rows if row["time"]]
    moments = [*((one.first_image, one.attempt.started) for one in lineage.stretches), (seen, newest.created)]
    known += [(images_seen, datetime.fromisoformat(moment).timestamp()) for images_seen, moment in moments]
    times = np.interp(numbers, *np.array(sorted(known)).T)
    columns, learnt = ("image", "epoch", "attempt", "time"), []
    for number, seconds in zip(numbers.tolist(), times.tolist(), strict=True):
        fence, moment = lineage.stretch_of(number).attempt.fence, datetime.fromtimestamp(seconds, UTC)
        learnt.append((number, round(number / index.images, 3), fence, moment.strftime(MOMENT_FORMAT)))
    refs = {ref.key: ref for ref in lineage.checkpoints}
    refs |= {f"snapshots/{ref}": ref for ref in sorted({located(file.key).checkpoint for file in newest.snapshots})}
    times_in = {place: int(np.searchsorted(numbers, ref.images_seen)) for place, ref in refs.items()}
    if as_json:
        rows = [dict(zip(columns, row, strict=True)) for row in learnt]
        print_json({"key": key, "index": image, "images_seen": seen, "learnt": rows, "checkpoints": times_in})
        return
    print(f"image {key} ({image:,} in {index.name}-{index.size}): learnt {len(learnt):,} times in {seen:,} images")
    table = Table(*columns, box=None)
    for row in learnt:
        table.add_row(*map(str, row))
    print_table(table, "")
    for place, count in times_in.items():
        print(f"{run.uri}/{place}  {f'{count:,} times' if count else 'without it'}")

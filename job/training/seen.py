"""`ddpm runs seen`: how often a run has learnt an image, when, and which checkpoints know it."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from job.data.cache import uncached_images
from job.data.keys import find_image
from job.data.order import order_of
from job.data.shards import dataset_key
from job.plan import open_run
from job.progress import note
from job.runs.layout import located
from job.runs.lineage import Lineage
from job.runs.listing import print_json, print_table
from job.runs.metric_rows import read_rows
from job.sealed import MOMENT_FORMAT


def show_seen(bucket_uri: str, name: str, key: str, *, as_json: bool = False) -> None:
    """Prints where the run has learnt the image with this key, and the checkpoints and snapshots after that.

    Raises:
        MissingInputError: no such run, dataset, checkpoint or image.
        BadDataError: a record is damaged.
        BadRequestError, BadConfigError: as `RunHandle.learnt`.
    """
    from rich.table import Table

    of_run = open_run(bucket_uri, name)
    run, config, index = of_run.run, of_run.stored, of_run.learnt()
    lineage = Lineage.of(run, config)
    newest, seen, imported = lineage.newest, lineage.newest.images_seen, lineage.imported_images
    image = find_image(uncached_images(of_run.bucket, dataset_key(index.name, index.size), index).source, key)
    numbers = order_of(index, config).numbers_of(image, -(-seen // index.images))
    numbers = numbers[(imported <= numbers) & (numbers < seen)]
    rows = read_rows(run, newest.metrics, note, brief=True)
    known = [(row["images_seen"], row["time"]) for row in rows if row["time"]]
    moments = [*((one.first_image, one.attempt.started) for one in lineage.stretches), (seen, newest.created)]
    known += [(images_seen, datetime.fromisoformat(moment).timestamp()) for images_seen, moment in moments]
    times = np.interp(numbers, *np.array(sorted(known)).T)
    columns, learnt = ("image", "epoch", "attempt", "time"), []
    for number, seconds in zip(numbers.tolist(), times.tolist(), strict=True):
        fence, moment = lineage.stretch_of(number).attempt.fence, datetime.fromtimestamp(seconds, UTC)
        learnt.append((number, round(number / index.images, 3), fence, moment.strftime(MOMENT_FORMAT)))
    refs = {ref.key: ref for ref in lineage.checkpoints(run)}
    refs |= {f"snapshots/{ref}": ref for ref in sorted({located(file.key).checkpoint for file in newest.snapshots})}
    times_in = {place: int(np.searchsorted(numbers, ref.images_seen)) for place, ref in refs.items()}
    if as_json:
        rows = [dict(zip(columns, row, strict=True)) for row in learnt]
        told = {"key": key, "index": image, "images_seen": seen, "imported_at": imported if imported >= 0 else None}
        print_json(told | {"learnt": rows, "checkpoints": times_in})
        return
    print(f"image {key} ({image:,} in {index.name}-{index.size}): learnt {len(learnt):,} times in {seen:,} images")
    if imported >= 0:
        print(f"The weights were imported at image {imported:,}: this count leaves out all that they learnt before.")
    table = Table(*columns, box=None)
    for row in learnt:
        table.add_row(*map(str, row))
    print_table(table, "")
    never = "without it" if imported < 0 else "not since the import"
    for place, count in times_in.items():
        print(f"{run.uri}/{place}  {f'{count:,} times' if count else never}")

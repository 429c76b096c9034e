"""What is in a bucket, told to a person: runs, their state, and where their pictures lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.config import RunConfig
from job.data.shards import dataset_key, load_index
from job.exits import BadDataError, BadRequestError, JobError
from job.runs import records
from job.runs.checkpoints import by_progress, list_checkpoints
from job.runs.lease import LEASE
from job.runs.records import RUNS, Status, read_status, run_store
from job.sampling.pieces import GRID
from job.store import Store, open_store

if TYPE_CHECKING:
    from rich.table import Table

STALE_SECONDS = 120.0
"""A run that calls itself running but has not said so for this long was cut off."""
PIPE_COLUMNS = 1000
"""Width where no terminal sets one: nothing is cut short that another program may look for."""


def list_runs(bucket_uri: str) -> None:
    """Prints a table of the runs in the bucket."""
    from rich.table import Table

    bucket = open_store(bucket_uri)
    table = Table("run", "state", "epoch", "images seen", "loss", "images/s", "newest checkpoint", box=None)
    for name in bucket.folders(RUNS):
        try:
            run = run_store(bucket, name)
        except BadRequestError:
            # A folder that somebody else put there.
            continue
        if all(entry.key == LEASE for entry in run.list()):
            # All that is left of a run that was deleted.
            continue
        refs, status = list_checkpoints(run), read_status(run)
        newest = f"{max(refs).images_seen:,}" if refs else "-"
        if status is None:
            table.add_row(name, "not started", "-", "-", "-", "-", newest)
            continue
        progress = f"{status.images_seen:,}/{status.target_images:,}"
        table.add_row(
            name,
            state_of(status),
            f"{status.epoch:.1f}",
            progress,
            "-" if status.loss is None else f"{status.loss:.4f}",
            "-" if status.images_per_second is None else f"{status.images_per_second:.1f}",
            newest,
        )
    if table.row_count:
        print_table(table)
    else:
        print(f"no runs in {bucket.uri} yet: start one with `ddpm train --dataset NAME`")


def print_table(table: Table) -> None:
    """Prints a table as wide as the terminal, or as it needs to be."""
    from rich.console import Console

    # A licence may hold what Rich would read as [/MARKUP].
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(table)


def show_run(bucket_uri: str, name: str) -> None:
    """Prints everything a person asks about one run."""
    bucket = open_store(bucket_uri)
    run = run_store(bucket, name)
    config = records.existing_config(bucket, name)
    status, refs = read_status(run), by_progress(list_checkpoints(run))
    lines = [f"run         {name}  ({run.uri})", f"dataset     {config.data.dataset}-{config.data.size}"]
    if status is not None:
        lines.append(f"state       {state_of(status)}, as of {status.updated}, attempt {status.fence}")
        lines.append(f"images seen {status.images_seen:,} of {status.target_images:,} (epoch {status.epoch:.2f})")
        if status.loss is not None:
            lines.append(f"loss        {status.loss:.4f}")
        if status.images_per_second is not None:
            lines.append(f"speed       {status.images_per_second:.1f} images/s")
    if refs:
        newest = max(refs.values())
        lines.append(f"newest      {newest.key}, {newest.images_seen:,} images seen")
        lines.append(f"checkpoints {len(refs)}: {_labels(bucket, config, sorted(refs))}")
    lines.append(describe_outputs(run))
    print("\n".join(lines))


def verify_named_run(bucket_uri: str, name: str) -> None:
    """Checks every object of a run and prints a line for each bad one.

    Raises:
        MissingInputError: there is no such run.
        BadDataError: there are bad objects.
    """
    from job.progress import Progress
    from job.runs.verification import verify_run

    bucket = open_store(bucket_uri)
    with Progress(f"verifying {name}", unit="bytes") as bar:
        findings = verify_run(bucket, name, lambda done, total: bar.update(done, total=total))
    for problem in findings.problems:
        print(problem)
    uri, looked_at = run_store(bucket, name).uri, f"{findings.objects:,} objects, {findings.size_bytes:,} bytes"
    if findings.leftovers:
        left = f"{len(findings.leftovers):,} objects, {sum(findings.leftovers.values()):,} bytes"
        print(f"{uri}: {left} that killed attempts left behind harm nobody: `ddpm runs prune {name}` deletes them")
    if count := len(findings.problems):
        raise BadDataError(
            f"{uri}: {count} {'problem' if count == 1 else 'problems'} in {looked_at}; each is named above"
        )
    print(f"{uri}: {looked_at}: all as they were written")


def state_of(status: Status) -> str:
    """The state as a person should read it: a run that fell silent while running was cut off."""
    if status.state != "running":
        return status.state
    return "running" if records.age_seconds(status) < STALE_SECONDS else "cut off (the same command goes on)"


def describe_outputs(run: Store) -> str:
    """Where the run's checkpoints and pictures lie, a line each."""
    keys = [entry.key for folder in ("samples", "figures") for entry in run.list(folder)]
    # The images of a batch are not shown one by one.
    pictures = [key for key in keys if key.endswith((".png", ".gif")) and (key.count("/") == 1 or key.endswith(GRID))]
    lines = [f"checkpoints {run.uri}/checkpoints"]
    return "\n".join([*lines, *(f"picture     {run.uri_of(key)}" for key in pictures)])


def _labels(bucket: Store, config: RunConfig, images_seen: list[int]) -> str:
    from ddpm.epochs import epochs_completed_by

    try:
        assert config.data.size is not None
        dataset_images = load_index(bucket, dataset_key(config.data.dataset, config.data.size)).images
    except JobError:
        return ", ".join(f"{images:,} images" for images in images_seen)
    labels = []
    for images in images_seen:
        epochs = epochs_completed_by(images, dataset_images, config.train.batch_size)
        labels.append(f"epoch {epochs[-1]}" if epochs else f"{images:,} images")
    return ", ".join(labels)

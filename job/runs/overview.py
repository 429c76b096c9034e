"""What is in a bucket, told to a person: runs, their state, and where their pictures lie."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from job.exits import BadDataError, BadRequestError
from job.runs import records
from job.runs.checkpoints import by_progress, list_checkpoints, newest_sound
from job.runs.layout import PICTURES, RUNS, SAMPLES, ObjectKind, places_in
from job.runs.lease import LEASE_KEY
from job.runs.outlook import attempts_of, outlook_of, state_of, stretches
from job.runs.records import Status, read_status, run_store
from job.store import Store, open_store

if TYPE_CHECKING:
    from rich.table import Table

PIPE_COLUMNS = 1000
"""Width where no terminal sets one: nothing is cut short that another program may look for."""


def run_names(bucket: Store) -> list[str]:
    """The runs in the bucket; neither folders that somebody else put there, nor what is left of deleted runs."""
    names = []
    for name in bucket.folders(RUNS):
        with suppress(BadRequestError):
            if any(entry.key != LEASE_KEY for entry in run_store(bucket, name).list()):
                names.append(name)
    return names


def list_runs(bucket_uri: str) -> None:
    """Prints a table of the runs in the bucket."""
    from rich.table import Table

    bucket = open_store(bucket_uri)
    table = Table("run", "state", "epoch", "images seen", "loss", "images/s", "newest checkpoint", box=None)
    for name in run_names(bucket):
        run = run_store(bucket, name)
        newest, status = newest_sound(run, list_checkpoints(run)), read_status(run)
        cells = ["not started", *"----"]
        if status is not None:
            seen = f"{status.images_seen:,}/{status.target_images:,}"
            cells = [state_of(status), f"{status.epoch:.1f}", seen, *_loss_and_speed(status)]
        table.add_row(name, *cells, f"{newest.images_seen:,}" if newest else "-")
    print_table(table, f"no runs in {bucket.uri} yet: start one with `ddpm train --dataset NAME`")


def _loss_and_speed(status: Status) -> list[str]:
    """Before the first row of the metrics nobody knows them."""
    shown = ((status.loss, ".4f"), (status.images_per_second, ",.1f"))
    return ["-" if value is None else format(value, how) for value, how in shown]


def print_table(table: Table, without_rows: str) -> None:
    """Prints a table as wide as the terminal, or as it needs to be; one that has no rows in words."""
    from rich.console import Console

    if not table.row_count:
        print(without_rows)
        return
    # A licence may hold what Rich would read as [/MARKUP].
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(table)


def show_run(bucket_uri: str, name: str) -> None:
    """Prints everything a person asks about one run."""
    from ddpm.epochs import epochs_completed_by

    bucket = open_store(bucket_uri)
    run = run_store(bucket, name)
    config = records.existing_config(bucket, name)
    print(f"run         {name}  ({run.uri})")
    print(f"dataset     {config.data.dataset}-{config.data.size}" if config.data.dataset else "dataset     none")
    if (status := read_status(run)) is not None:
        print(f"state       {state_of(status)}, as of {status.updated}, attempt {status.fence}")
        print(f"images seen {status.images_seen:,} of {status.target_images:,} (epoch {status.epoch:.2f})")
        loss, speed = _loss_and_speed(status)
        print(f"loss        {loss}\nspeed       {speed} images/s")
        for what, said in outlook_of(stretches(attempts_of(run), status), status).words.items():
            print(f"{what:<11} {said}")
    if refs := by_progress(list_checkpoints(run)):
        newest, dataset_images = newest_sound(run, list_checkpoints(run)), records.dataset_images_of(bucket, config)
        ends = {images: epochs_completed_by(images, dataset_images, config.train.batch_size) for images in refs}
        labels = [f"epoch {epochs[-1]}" if epochs else f"{images:,} images" for images, epochs in ends.items()]
        seen = f"{newest.key}, {newest.images_seen:,} images seen" if newest else "none that can be read"
        print(f"newest      {seen}")
        print(f"checkpoints {len(refs):,}: {', '.join(labels)}")
    for fence in records.attempt_fences(run):
        try:
            attempt = records.load_attempt(run, fence)
            where = f"{attempt.host}, {attempt.world_size} × {attempt.device}, code {attempt.code_version}"
            imported = f"imported from {attempt.imported} " * bool(attempt.imported)
            print(f"attempt {fence:<3} {attempt.started} {imported}on {where}")
        except BadDataError as error:
            print(f"attempt {fence:<3} cannot be read: {error}")
    print(describe_outputs(run))


def verify_named_run(bucket_uri: str, name: str) -> None:
    """Checks every object of a run and prints a line for each bad one.

    Raises:
        MissingInputError: there is no such run.
        BadDataError: there are bad objects.
    """
    from job.runs.verification import verify_run

    bucket = open_store(bucket_uri)
    findings = verify_run(bucket, name)
    for problem in findings.problems:
        print(problem)
    uri, looked_at = run_store(bucket, name).uri, f"{findings.objects:,} objects, {findings.size_bytes:,} bytes"
    if findings.leftovers:
        left = f"{len(findings.leftovers):,} objects, {sum(findings.leftovers.values()):,} bytes"
        print(f"{uri}: {left} that killed attempts left behind harm nobody: `ddpm runs prune {name}` deletes them")
    if count := len(findings.problems):
        raise BadDataError(f"{uri}: {count:,} problem{'s' * (count > 1)} in {looked_at}; each is named above")
    print(f"{uri}: {looked_at}: all as they were written")


def describe_outputs(run: Store) -> str:
    """Where the run's page, its checkpoints and pictures lie, a line each."""
    page = ObjectKind.PAGE.value
    lines = [f"page        {run.uri_of(page)}"] if run.exists(page) else []
    # The images of a batch are not shown one by one.
    places = places_in(run, SAMPLES, ObjectKind.FIGURE.folder, ObjectKind.SCORES.folder).items()
    what = {**dict.fromkeys(PICTURES, "picture    "), ObjectKind.SCORES: "scores     "}
    shown = (f"{what[place.kind]} {run.uri_of(key)}" for key, place in places if place.kind in what)
    return "\n".join([*lines, f"checkpoints {run.uri}/checkpoints", *shown])

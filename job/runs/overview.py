"""What is in a bucket, told to a person: runs, their state, and where their pictures lie."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from job.exits import BadDataError, BadRequestError
from job.processes.lease import LEASE_KEY
from job.runs import records
from job.runs.checkpoints import by_progress, list_checkpoints, newest_sound
from job.runs.layout import PICTURES, RUNS, SAMPLES, ObjectKind, places_in
from job.runs.outlook import CUT_OFF, attempts_of, duration, outlook_of, spans_of, state_in
from job.runs.records import read_status, run_store
from job.runs.samples import label_of, moment_of
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


def list_runs(bucket_uri: str, *, as_json: bool = False) -> None:
    """Prints a table of the runs in the bucket."""
    from rich.table import Table

    bucket = open_store(bucket_uri)
    runs = [summary_of(bucket, name) for name in run_names(bucket)]
    if as_json:
        print_json(runs)
        return
    titles = ("run", "state", "epoch", "images seen", "loss", "images/s", "to the end", "newest checkpoint")
    table = Table(*titles, box=None)
    for run in runs:
        newest = f"{run['newest_images_seen']:,}" if run["newest_images_seen"] is not None else "-"
        table.add_row(run["name"], *progress_cells(run), newest)
    print_table(table, f"no runs in {bucket.uri} yet: start one with `ddpm train --dataset NAME`")


def summary_of(bucket: Store, name: str) -> dict[str, Any]:
    """A run as a few values: what nobody knows is None."""
    run = run_store(bucket, name)
    newest, status = newest_sound(run, list_checkpoints(run)), read_status(run)
    outlook = outlook_of(spans_of(attempts_of(run), status), status)
    told = dict.fromkeys(("epoch", "images_seen", "target_images", "loss", "images_per_second", "updated", "fence"))
    told |= {key: getattr(status, key) for key in told if status is not None}
    return {
        "name": name,
        "uri": run.uri,
        "state": state_in(run, status),
        **told,
        "newest": newest.ref.key if newest else None,
        "newest_images_seen": newest.images_seen if newest else None,
        **asdict(outlook),
        "outlook": outlook.words,
    }


def progress_cells(run: dict[str, Any]) -> list[str]:
    """State, epoch, images seen, loss, speed and what is left, of a `summary_of` a run."""
    seen = f"{run['images_seen']:,}/{run['target_images']:,}" if run["images_seen"] is not None else "-"
    shown = ((run["epoch"], ".1f"), (run["loss"], ".4f"), (run["images_per_second"], ",.1f"))
    epoch, loss, speed = ("-" if value is None else format(value, how) for value, how in shown)
    left = "-" if run["hours_left"] is None else duration(run["hours_left"])
    return [run["state"], epoch, seen, loss, speed, left]


def print_json(document: Any) -> None:
    """For programs: moments are ISO 8601, and what is no finite number is null."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=lambda moment: moment.isoformat()))


def _finite(document: Any) -> Any:
    match document:
        case float():
            return document if math.isfinite(document) else None
        case dict():
            return {key: _finite(value) for key, value in document.items()}
        case list() | tuple():
            return [_finite(value) for value in document]
    return document


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


def show_run(bucket_uri: str, name: str, *, as_json: bool = False) -> None:
    """Prints everything a person asks about one run."""
    bucket = open_store(bucket_uri)
    config = records.existing_config(bucket, name)
    run, told = run_store(bucket, name), summary_of(bucket, name)
    dataset_images, batch_size = records.dataset_images_of(bucket, config), config.train.batch_size
    labels = [label_of(seen, dataset_images, batch_size) for seen in by_progress(list_checkpoints(run))]
    moments, attempts = [moment_of(label) for label in labels], list(_attempts(run))
    if as_json:
        more = {"dataset": config.data.dataset, "size": config.data.size, "checkpoints": moments, "attempts": attempts}
        print_json(told | more | {"outputs": [uri for _, uri in outputs_of(run)]})
        return
    print(f"run         {name}  ({run.uri})")
    print(f"dataset     {config.data.dataset}-{config.data.size}" if config.data.dataset else "dataset     none")
    if told["updated"] is not None:
        _, _, _, loss, speed, _ = progress_cells(told)
        again = " (the same command goes on)" if told["state"] == CUT_OFF else ""
        print(f"state       {told['state']}{again}, as of {told['updated']}, attempt {told['fence']}")
        print(f"images seen {told['images_seen']:,} of {told['target_images']:,} (epoch {told['epoch']:.2f})")
        print(f"loss        {loss}\nspeed       {speed} images/s")
        for what, said in told["outlook"].items():
            print(f"{what:<11} {said}")
    if moments:
        seen = f"{told['newest']}, {told['newest_images_seen']:,} images seen" if told["newest"] else "none to read"
        print(f"newest      {seen}")
        print(f"checkpoints {len(moments):,}: {', '.join(moments)}")
    for attempt in attempts:
        print(f"attempt {attempt['fence']:<3} {attempt['said']}")
    print(describe_outputs(run))


def _attempts(run: Store) -> Iterator[dict[str, Any]]:
    for fence in records.attempt_fences(run):
        try:
            attempt = records.load_attempt(run, fence)
        except BadDataError as error:
            yield {"fence": fence, "said": f"cannot be read: {error}"}
            continue
        where = f"{attempt.host}, {attempt.world_size} × {attempt.device}, code {attempt.code_version}"
        imported = f"imported from {attempt.imported} " * bool(attempt.imported)
        said = f"{attempt.started} {imported}on {where}"
        yield attempt.model_dump(mode="json", exclude={"sha256"}) | {"said": said}


def verify_named_run(bucket_uri: str, name: str, *, as_json: bool = False) -> None:
    """Checks every object of a run and prints a line for each bad one.

    Raises:
        MissingInputError: there is no such run.
        BadDataError: there are bad objects.
    """
    from job.runs.verification import verify_run

    bucket = open_store(bucket_uri)
    findings = verify_run(bucket, name)
    uri, looked_at = run_store(bucket, name).uri, f"{findings.objects:,} objects, {findings.size_bytes:,} bytes"
    if as_json:
        print_json({"uri": uri, **asdict(findings)})
    else:
        for problem in findings.problems:
            print(problem)
        if findings.leftovers:
            left = f"{len(findings.leftovers):,} objects, {sum(findings.leftovers.values()):,} bytes"
            deletes = f"`ddpm runs prune {name}` deletes them"
            print(f"{uri}: {left} that killed attempts left behind harm nobody: {deletes}")
    if count := len(findings.problems):
        raise BadDataError(f"{uri}: {count:,} problem{'s' * (count > 1)} in {looked_at}; each is named above")
    if not as_json:
        print(f"{uri}: {looked_at}: all as they were written")


def describe_outputs(run: Store) -> str:
    """Where the run's page, its checkpoints and pictures lie, a line each."""
    return "\n".join(f"{what:<11} {uri}" for what, uri in outputs_of(run))


def outputs_of(run: Store) -> Iterator[tuple[str, str]]:
    """What people look at, and where it lies."""
    if run.exists(page := ObjectKind.PAGE.value):
        yield "page", run.uri_of(page)
    yield "checkpoints", f"{run.uri}/checkpoints"
    what = {**dict.fromkeys(PICTURES, "picture"), ObjectKind.SCORES: "scores"}
    # The images of a batch are not shown one by one.
    for key, place in places_in(run, SAMPLES, ObjectKind.FIGURE.folder, ObjectKind.SCORES.folder).items():
        if place.kind in what:
            yield what[place.kind], run.uri_of(key)

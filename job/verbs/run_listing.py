"""`ddpm runs list`, `show` and `compare`: the runs of a bucket for people, as tables, lines or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from job.coordination.lease import LEASE_KEY
from job.exits import BadDataError, BadRequestError, MissingInputError, State
from job.printing import in_lines, print_json, print_table
from job.progress import note
from job.runs import metric_rows, records
from job.runs.checkpoints import by_progress, list_checkpoints, newest_sound
from job.runs.layout import RUNS, ObjectKind
from job.runs.outlook import attempts_of, duration, outlook_of, spans_of, state_in
from job.runs.records import Status, read_status, run_store, validated_run_name
from job.runs.run import label_at, moment_of
from job.store import Store, open_store

RUNS_AT_ONCE = 32
"""Each takes a request, which waits for the bucket."""
PAIRED_BY = ("data.dataset_id", "data.order", "data.shuffle_block_images", "train.seed", "train.batch_size")
"""Keys that must be equal, so that image n of both runs is the same, with the same noise and timestep."""
SAME_LOSS = ("diffusion.", "data.size", "data.channels")
"""Sections and keys that must be equal, so that the losses have the same objective."""
_PARTS = ("", "_q0", "_q1", "_q2", "_q3")
LOSSES = (*(f"{name}{part}" for name in ("loss", "val_loss") for part in _PARTS), "val_bits_per_dim")
"""The compared losses: of all timesteps and of each quarter of them."""
FEWEST_ROWS = 3


def run_names(bucket: Store) -> list[str]:
    """Returns the runs in the bucket, also deleted ones, of which the lease remains, but no other folders."""
    names = []
    for name in bucket.folders(RUNS):
        with suppress(BadRequestError):
            names.append(validated_run_name(name))
    return names


def list_runs(bucket_uri: str, *, as_json: bool = False) -> None:
    """Prints a table of the runs in the bucket."""
    from rich.table import Table

    bucket = open_store(bucket_uri)
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        runs = list(filter(None, pool.map(lambda name: _progress_of(bucket, name), run_names(bucket))))
    if as_json:
        print_json(runs)
        return
    table = Table("run", "state", "epoch", "images seen", "loss", "images/s", "to the end", "as of", box=None)
    for run in runs:
        table.add_row(run["name"], *progress_cells(run), run["updated"] or "-")
    print_table(table, f"no runs in {bucket.uri} yet: start one with `ddpm train --dataset NAME`")


def summary_of(bucket: Store, name: str) -> dict[str, Any]:
    """Returns a run as a few values, None where unknown."""
    run = run_store(bucket, name)
    newest, status = newest_sound(run, list_checkpoints(run)), read_status(run)
    outlook = outlook_of(spans_of(attempts_of(run), status), status)
    return {
        **_progress(run, status),
        "newest": newest.ref.key if newest else None,
        "newest_images_seen": newest.images_seen if newest else None,
        **asdict(outlook),
        "outlook": outlook.words,
    }


def _progress_of(bucket: Store, name: str) -> dict[str, Any] | None:
    """Returns what one request tells of a run, its status; None for what remains of a deleted run."""
    run = run_store(bucket, name)
    status = read_status(run)
    if status is None and all(entry.key == LEASE_KEY for entry in run.list()):
        return None
    return {**_progress(run, status), "hours_left": outlook_of([], status).hours_left}


def _progress(run: Store, status: Status | None) -> dict[str, Any]:
    names = ("epoch", "images_seen", "target_images", "loss", "images_per_second", "updated", "fence")
    told = {"name": run.uri.rpartition("/")[2], "uri": run.uri, "state": state_in(run, status)}
    return told | {name: getattr(status, name, None) for name in names}


def progress_cells(run: dict[str, Any]) -> list[str]:
    """Returns the state, epoch, images seen, loss, speed and time left of a run in a listing."""
    seen = f"{run['images_seen']:,}/{run['target_images']:,}" if run["images_seen"] is not None else "-"
    shown = ((run["epoch"], ".1f"), (run["loss"], ".4f"), (run["images_per_second"], ",.1f"))
    epoch, loss, speed = ("-" if value is None else format(value, how) for value, how in shown)
    left = "-" if run["hours_left"] is None else duration(run["hours_left"])
    return [run["state"], epoch, seen, loss, speed, left]


def show_run(bucket_uri: str, name: str, *, as_json: bool = False) -> None:
    """Prints a run: its state, progress, checkpoints and attempts, and the URI of its page."""
    bucket = open_store(bucket_uri)
    config = records.existing_config(bucket, name)
    run, summary = run_store(bucket, name), summary_of(bucket, name)
    dataset_images, batch_size = records.dataset_images_of(bucket, config), config.train.batch_size
    labels = [label_at(seen, dataset_images, batch_size) for seen in by_progress(list_checkpoints(run))]
    moments, attempts = [moment_of(label) for label in labels], list(_attempts(run))
    if as_json:
        data = config.data.model_dump(include={"dataset", "size"}) | {"from": config.parent.model_dump()}
        print_json(summary | data | {"checkpoints": moments, "attempts": attempts})
        return
    lines = [("run", f"{name}  ({run.uri})")]
    lines += [("dataset", f"{config.data.dataset}-{config.data.size}" if config.data.dataset else "none")]
    if config.parent.run:
        lines += [("from", f"{config.parent.words}, sha256 {config.parent.sha256:.16}…")]
    if summary["updated"] is not None:
        state, _, _, loss, speed, _ = progress_cells(summary)
        again = " (the same command goes on)" if state == State.CUT_OFF else ""
        seen = f"{summary['images_seen']:,} of {summary['target_images']:,} (epoch {summary['epoch']:.2f})"
        lines += [("state", f"{state}{again}, as of {summary['updated']}, attempt {summary['fence']}")]
        lines += [("images seen", seen), ("loss", loss), ("speed", f"{speed} images/s"), *summary["outlook"].items()]
    if moments:
        newest, images_seen = summary["newest"], summary["newest_images_seen"]
        lines += [("newest", f"{newest}, {images_seen:,} images seen" if newest else "no readable one")]
        lines += [("checkpoints", f"{len(moments):,}: {', '.join(moments)}")]
    lines += [(f"attempt {attempt['fence']}", attempt["summary"]) for attempt in attempts]
    if run.exists(page := ObjectKind.PAGE.value):
        lines += [("page", run.uri_of(page))]
    print(in_lines(lines))


def _attempts(run: Store) -> Iterator[dict[str, Any]]:
    for fence in records.attempt_fences(run):
        try:
            attempt = records.load_attempt(run, fence)
        except BadDataError as error:
            yield {"fence": fence, "summary": f"cannot be read: {error}"}
            continue
        where = f"{attempt.host}, {attempt.world_size} × {attempt.device}, code {attempt.code_version}"
        imported = f"imported from {attempt.imported} " * bool(attempt.imported)
        summary = f"{attempt.started} {imported}on {where}"
        yield attempt.model_dump(mode="json", exclude={"sha256"}) | {"summary": summary}


def differing(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns flat configurations without the values that are the same in all of them."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differ = [key for key in keys if len({repr(config.get(key)) for config in configs.values()}) > 1]
    return {name: {key: config[key] for key in differ if key in config} for name, config in configs.items()}


def compare_runs(bucket_uri: str, first: str, second: str, since_epoch: float) -> None:
    """Prints the mean differences between the losses of `second` and `first`, with standard errors.

    Runs of one seed on one dataset see the same image with the same noise and timestep at each step, however many
    processes and attempts they took. Their losses share the random part, so that a paired difference shows in few rows.

    Args:
        bucket_uri: where both lie.
        first: a run.
        second: another one.
        since_epoch: rows up to this epoch are left out.

    Raises:
        MissingInputError: the bucket lacks a run, or they have too few rows in common.
        BadDataError: the metrics of one are damaged.
        BadRequestError: they do not see the same images in the same order.
    """
    from rich.table import Table

    bucket, names = open_store(bucket_uri), (first, second)
    configs = [records.existing_config(bucket, name) for name in names]
    ours, theirs = differing({"first": configs[0].flat(), "second": configs[1].flat()}).values()
    pairs = {key: f"{key}: {ours.get(key, 'nothing')} and {theirs.get(key, 'nothing')}" for key in ours | theirs}
    if unpaired := "; ".join(pairs[key] for key in PAIRED_BY if key in pairs):
        raise BadRequestError(
            f"runs {first!r} and {second!r} do not see the same images with the same noise: {unpaired}"
        )
    rows = [_rows(bucket, name) for name in names]
    since_images = since_epoch * records.dataset_images_of(bucket, configs[0])
    images = [seen for seen in sorted(rows[0].keys() & rows[1].keys()) if seen > since_images]
    if len(images) < FEWEST_ROWS:
        raise MissingInputError(
            f"runs {first!r} and {second!r} have {len(images)} rows at the same image"
            f"{f' after epoch {since_epoch:g}' if since_epoch else ''}, of at least {FEWEST_ROWS}: "
            "train them on, and with the same log.every_images"
        )
    print(*(text for key, text in pairs.items() if not key.startswith("sample.")), sep="\n")
    if any(key.startswith(SAME_LOSS) for key in pairs):
        note("their losses have different objectives: only a lower val_bits_per_dim means a better run")
    print(f"means from image {images[0]:,} to {images[-1]:,}; ± is one standard error of the mean difference")
    table = Table("", first, second, f"{second} − {first}", "±", box=None)
    for name in LOSSES:
        both = np.array(
            [[row[seen][name] for row in rows] for seen in images if all(name in row[seen] for row in rows)]
        )
        if len(both) >= FEWEST_ROWS:
            differences = both[:, 1] - both[:, 0]
            error = differences.std(ddof=1) / len(both) ** 0.5
            table.add_row(name, *(f"{number:.5g}" for number in (*both.mean(axis=0), differences.mean(), error)))
    print_table(table, "they have no losses in common")


def _rows(bucket: Store, name: str) -> dict[int, metric_rows.Row]:
    """Returns the merged rows of a run up to its newest checkpoint, by images seen."""
    problems = list[str]()
    manifest, rows = metric_rows.newest_rows(records.run_store(bucket, name), problems.append)
    if problems:
        raise BadDataError(f"run {name!r} cannot be compared: {problems[0]}")
    if manifest is None:
        raise MissingInputError(f"run {name!r} has no checkpoint yet, and no losses")
    return {row["images_seen"]: row for row in metric_rows.merged(rows)}

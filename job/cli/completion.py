"""Shell completion of names, from the bucket if it answers in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import typer

SECONDS = 3.0
"""The longest time that a bucket has to answer after a press of Tab."""


def _offered(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _in_bucket(folder: str) -> Callable[[typer.Context, str], list[str]]:
    def complete(context: typer.Context, incomplete: str) -> list[str]:
        from job.cli.options import usual_bucket
        from job.store import open_store

        # An error message in the middle of a command line would disturb more than it helps.
        with suppress(Exception):
            bucket = open_store(usual_bucket(context, context.params.get("bucket") or ""))
            return _offered(bucket.within(SECONDS).folders(folder), incomplete)
        return []

    return complete


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns what completes one of these names."""

    def complete(incomplete: str) -> list[str]:
        return _offered(known, incomplete)

    return complete


runs = _in_bucket("runs")
jobs = _in_bucket("jobs")


def datasets(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of datasets, without the size that their folders end with."""
    folders = _in_bucket("datasets")(context, "")
    return _offered((folder.rpartition("-")[0] for folder in folders), incomplete)


def presets(incomplete: str) -> list[str]:
    """Returns the names of the presets."""
    from job.config import preset_names

    return _offered(preset_names(), incomplete)


def targets(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of the targets."""
    from job.jobs.targets import load_targets

    with suppress(Exception):
        return _offered(load_targets(context.params.get("targets")), incomplete)
    return []


def keys(incomplete: str) -> list[str]:
    """Returns the settings that `--set` takes."""
    from job.config import CHOSEN_ELSEWHERE, known_keys

    return _offered((f"{key}=" for key in {*known_keys()} - CHOSEN_ELSEWHERE.keys()), incomplete)

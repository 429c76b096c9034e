"""What a shell offers for names: of what is there, as far as that can be seen in a moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress

import typer

from job import DEFAULT_BUCKET

SECONDS = 3.0
"""For a bucket to answer: who presses Tab does not wait for longer."""


def _offered(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _in_bucket(folder: str) -> Callable[[typer.Context, str], list[str]]:
    def complete(context: typer.Context, incomplete: str) -> list[str]:
        from job.store import open_store

        uri = context.params.get("bucket") or os.environ.get("DDPM_BUCKET") or DEFAULT_BUCKET
        # Whatever is wrong with a bucket, a shell is no place to say it.
        with suppress(Exception):
            return _offered(open_store(str(uri)).within(SECONDS).folders(folder), incomplete)
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
    """Without the size, which is no part of a name."""
    folders = _in_bucket("datasets")(context, "")
    return _offered((folder.rpartition("-")[0] for folder in folders), incomplete)


def presets(incomplete: str) -> list[str]:
    """Those that come with the program."""
    from job.config import preset_names

    return _offered(preset_names(), incomplete)


def targets(context: typer.Context, incomplete: str) -> list[str]:
    """Those of the targets file."""
    from job.jobs.targets import load_targets

    with suppress(Exception):
        return _offered(load_targets(context.params.get("targets")), incomplete)
    return []


def keys(incomplete: str) -> list[str]:
    """Returns the settings that `--set` takes."""
    from job.config import CHOSEN_ELSEWHERE, known_keys

    return _offered((f"{key}=" for key in {*known_keys()} - CHOSEN_ELSEWHERE.keys()), incomplete)

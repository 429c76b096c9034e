"""The engines that run jobs: each renders a spec, and talks to its engine about it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from job.exits import MissingInputError, how_to_install
from job.jobs.backends.base import Backend
from job.jobs.targets import Target

_EXTRAS = {"kubernetes": "kubernetes", "vm": "google", "batch": "google"}
"""Of this package: what brings the libraries of each engine that needs some."""


@contextmanager
def backend_for(target: Target) -> Iterator[Backend]:
    """The engine of a target. Libraries of other engines need not be there.

    Raises:
        MissingInputError: its own are missing, there or when they are first used; the message says how to get them.
    """
    name, extra = target.backend, _EXTRAS.get(target.backend, "")
    try:
        yield getattr(importlib.import_module(f"job.jobs.backends.{name}"), f"{name.title()}Backend")(target)
    except ImportError as error:
        if not extra or (error.name or "").partition(".")[0] in ("job", "ddpm"):
            raise
        lacking = f"target {target.name!r} needs more than is installed ({error})"
        raise MissingInputError(f"{lacking}: {how_to_install(extra)}") from None

"""The backends: each describes its targets, renders a job, and talks to one engine about it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_type_hints

from job.exits import MissingInputError, how_to_install
from job.jobs.backends.base import Backend
from job.jobs.backends.target import Target

BACKENDS = ("local", "container", "kubernetes", "vm", "batch", "slurm")
"""Each has a module of its name; the backend `vm` is the class `VmBackend` in it, whose attribute `target` is typed."""


def backend_class(name: str) -> type[Backend]:
    """Returns the class of a backend, without importing the client library of its engine."""
    found: type[Backend] = getattr(importlib.import_module(f"{__name__}.{name}"), f"{name.title()}Backend")
    return found


def target_class(name: str) -> type[Target]:
    """Returns the class of a backend's targets."""
    found: type[Target] = get_type_hints(backend_class(name))["target"]
    return found


@contextmanager
def backend_for(target: Target) -> Iterator[Backend]:
    """Yields the backend of a target.

    Raises:
        MissingInputError: its client library is missing, at once or when it is first used; the message has the remedy.
    """
    kind = backend_class(target.backend)
    try:
        yield kind(target)
    except ImportError as error:
        if not kind.extra or (error.name or "").partition(".")[0] in ("job", "ddpm"):
            raise
        how = how_to_install(kind.extra)
        raise MissingInputError(f"target {target.name!r} needs more than is installed ({error}): {how}") from None

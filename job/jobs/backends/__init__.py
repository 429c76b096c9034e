"""The backends: each describes its targets, renders a job, and talks to one engine about it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from job.code_version import how_to_install
from job.exits import MissingInputError
from job.jobs.backends.base import Backend
from job.jobs.backends.target import Target

BACKENDS = {
    "local": "LocalBackend",
    "container": "ContainerBackend",
    "kubernetes": "KubernetesBackend",
    "vm": "VmBackend",
    "batch": "BatchBackend",
}
"""The class of each backend, in the module of the backend's name."""


def backend_class(name: str) -> type[Backend]:
    """Returns the class of a backend, without importing the client library of its engine."""
    found: type[Backend] = getattr(importlib.import_module(f"{__name__}.{name}"), BACKENDS[name])
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
        what = f"target {target.name!r} needs more than is installed ({error})"
        raise MissingInputError(f"{what}: {how_to_install(kind.extra)}") from None

"""The engines that run jobs: each renders a spec, and talks to its engine about it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from job.exits import MissingInputError
from job.jobs.backends.base import Backend
from job.jobs.targets import Target

_PLACES = {
    "local": ("job.jobs.backends.local", "LocalBackend"),
    "container": ("job.jobs.backends.container", "ContainerBackend"),
    "kubernetes": ("job.jobs.backends.kubernetes", "KubernetesBackend"),
    "vm": ("job.jobs.backends.vm", "VmBackend"),
    "batch": ("job.jobs.backends.batch", "BatchBackend"),
}
_EXTRAS = {"kubernetes": "kubernetes", "vm": "google", "batch": "google"}


def backend_for(target: Target) -> Backend:
    """The engine of a target. Libraries of other engines need not be there.

    Raises:
        MissingInputError: its own are missing; the message says how to install them.
    """
    module, name = _PLACES[target.backend]
    with extra_named(target):
        made: Backend = getattr(importlib.import_module(module), name)(target)
    return made


@contextmanager
def extra_named(target: Target) -> Iterator[None]:
    """Has a library that is missing named together with what to install.

    Raises:
        MissingInputError: instead of an `ImportError` that is about a library of the target's engine.
    """
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(target.backend)
        if extra is None or (error.name or "").partition(".")[0] in ("job", "ddpm"):
            raise
        raise MissingInputError(
            f"target {target.name!r} needs more than is installed ({error}): pip install 'ddpm-job[{extra}]'"
        ) from None

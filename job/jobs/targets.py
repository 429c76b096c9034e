"""Named places for jobs, by the file `targets.yaml`, and their engines. `local` and `container` exist without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.config import parse_mapping, read_settings
from job.exits import BadConfigError, BadRequestError, did_you_mean
from job.jobs.backends import Target
from job.progress import printable
from job.store import URIS, is_remote
from job.store.files import os_errors

TARGETS_FILE = "targets.yaml"
TARGETS_VARIABLE = "DDPM_TARGETS"
"""The variable that names the file, if it is not `targets.yaml` in the working folder."""
BUILT_IN = ("local", "container")
"""The targets that exist without a file, which may only change their keys."""
BACKENDS = {
    "local": "LocalTarget",
    "container": "ContainerTarget",
    "kubernetes": "KubernetesTarget",
    "vm": "VmTarget",
    "batch": "BatchTarget",
    "slurm": "SlurmTarget",
}
"""The class of each engine's targets, in the module of its name in `backends`, without its client library."""


def target_class(backend: str) -> type[Target]:
    """Returns the class of an engine's targets."""
    found: type[Target] = getattr(import_module(f"job.jobs.backends.{backend}"), BACKENDS[backend])
    return found


def load_targets(path: Path | None = None, on: str = "", say: Callable[[str], object] = str) -> dict[str, Target]:
    """Returns the valid targets by name: `local` and `container`, and those of the file.

    Args:
        path: the file; None is `$DDPM_TARGETS`, else `./targets.yaml` if that exists.
        on: the target that is needed; empty if one may do without any of them.
        say: gets a line about each other target that is not valid; `note` prints it.

    Raises:
        MissingInputError: the named file does not exist.
        BadConfigError: it is not a mapping, or `on` is not valid; the message names the target and the key.
    """
    targets = {name: _target(name, {}, name) for name in BUILT_IN}
    variable = os.environ.get(TARGETS_VARIABLE)
    file = path or Path(variable or TARGETS_FILE)
    option = "--targets " if path else f"{TARGETS_VARIABLE} " if variable else ""
    with os_errors(f"{option}{file}"):
        if not option and not file.exists():
            return targets
        text = read_settings(file)
    return targets | parse_targets(text, str(file), on, say)


def parse_targets(text: str, where: str, on: str = "", say: Callable[[str], object] = str) -> dict[str, Target]:
    """Returns the valid targets in the text of a file, which messages call `where`; for `say` see `load_targets`.

    Raises:
        BadConfigError: the text is not a mapping, or the target `on` is not valid; the message names the key.
    """
    targets = {}
    for name, block in parse_mapping(text, where, "names to targets, such as `gke: {backend: kubernetes}`").items():
        try:
            targets[str(name)] = _target(str(name), block, f"{where}: target {str(name)!r}")
        except BadConfigError as error:
            if on == str(name):
                raise
            say(f"left out: {error}")
    return targets


def target_on(name: str, path: Path | None = None, say: Callable[[str], object] = str) -> Target:
    """Returns the target of that name; see `load_targets` for `path`, `say` and further errors.

    Raises:
        BadRequestError: the name is unknown; the message has the known ones.
    """
    targets = load_targets(path, name, say)
    if name not in targets:
        raise BadRequestError(f"unknown target {name!r}{did_you_mean(name, targets)} (known: {', '.join(targets)})")
    return targets[name]


def _target(name: str, block: Any, where: str) -> Target:
    if not isinstance(block, dict):
        raise BadConfigError(f"{where} must be a mapping of keys such as `backend:`")
    backend = str(block.get("backend", name if name in BUILT_IN else ""))
    if backend not in BACKENDS:
        raise BadConfigError(f"{where}: `backend:` must be one of {', '.join(BACKENDS)} (got {backend!r})")
    if name in BUILT_IN and backend != name:
        raise BadConfigError(f"{where} is always the {name} backend: choose another name for one on {backend}")
    model = target_class(backend)
    keys = [key for key in model.model_fields if key != "name"]
    for unknown in (str(key) for key in block if key not in keys):
        known = f"({backend} has {', '.join(keys)})"
        raise BadConfigError(f"{where}: unknown key {unknown!r}{did_you_mean(unknown, keys)} {known}")
    try:
        target = model.model_validate({**block, "backend": backend, "name": name})
    except ValidationError as error:
        raise BadConfigError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from None
    if not target.has_files and target.bucket and not is_remote(target.bucket):
        raise BadConfigError(f"{where}: bucket: {target.bucket!r} is a folder of this machine: use {URIS}")
    return target


def _problem(problem: Any) -> str:
    """Returns pydantic's message about one value, with its key."""
    got = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r:.200})"
    key = ".".join(printable(str(part)) for part in problem["loc"])
    return f"{key}: ".removeprefix(": ") + problem["msg"].removeprefix("Value error, ") + got

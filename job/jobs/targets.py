"""Named places for jobs, by the file `targets.yaml`, and their engines. `local` and `container` exist without it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from job.config import parse_mapping, read_settings
from job.exits import BadConfigError, BadRequestError, MissingInputError, did_you_mean, how_to_install
from job.jobs.machines import Hourly
from job.stop import SPOT_GRACE_SECONDS
from job.store import KINDS, URIS, check_uri, is_remote
from job.store.files import os_errors

if TYPE_CHECKING:
    from job.jobs.backends import Backend
    from job.jobs.spec import JobSpec

TARGETS_FILE = "targets.yaml"
TARGETS_VARIABLE = "DDPM_TARGETS"
"""The variable that names the file, if it is not `targets.yaml` in the working folder."""
BUILT_IN = ("local", "container")
"""The targets that exist without a file, which may only change their keys."""
BACKENDS = {
    "local": ("LocalTarget", "LocalBackend"),
    "container": ("ContainerTarget", "ContainerBackend"),
    "kubernetes": ("KubernetesTarget", "KubernetesBackend"),
    "vm": ("VmTarget", "VmBackend"),
    "batch": ("BatchTarget", "BatchBackend"),
    "slurm": ("SlurmTarget", "SlurmBackend"),
}
"""The classes of each engine, in the module of its name in `backends`, without its client library."""

_SECRET = re.compile(
    r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!IZ)|PWD|KEYS?(_|$)|SAS_|CONNECTION_STRING|FSSPEC_[A-Z0-9]+$|FSSPEC_\w*(KWARGS|HEADERS|PASS)"
)
_NO_SECRET = re.compile("|".join([r"\w+_(FILE|PATH|DIR)|(OLD)?PWD", *(name for kind in KINDS for name in kind.files)]))
"""The names that look like those of secrets, and hold a path."""


def _not_secret(variable: str) -> str:
    if _SECRET.search(variable) and not _NO_SECRET.fullmatch(variable):
        raise ValueError(f"{variable} looks like a secret, which lists would show: use the job's service account")
    return variable


def _uri(text: str) -> str:
    try:
        check_uri(text)
    except BadRequestError as error:
        raise ValueError(str(error)) from None
    return text


Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Image = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,400})?$")]
Word = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._:/@,=-]{0,400})?$")]
"""Part of a command or of a path: neither an option nor the path of another place."""
_Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$"), AfterValidator(_not_secret)]


class Terms(NamedTuple):
    """The facts about a job on a target that a person reads before it is sent.

    Attributes:
        machine: the type of its machines.
        place: where they are.
        limit: what `max_hours` count for, and who ends the job then.
        attempts: how often these hours may pass; None without bound.
        kind: whether its machines may be taken away, if `spot` does not tell.
    """

    machine: str
    place: tuple[str, ...]
    limit: str
    attempts: int | None = 1
    kind: str = ""


class Target(BaseModel):
    """A place for jobs, as `targets.yaml` describes it. Each backend has a subclass with keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    is_remote: ClassVar[bool] = True
    """Whether its jobs run on other machines."""
    is_in_place: ClassVar[bool] = False
    """Whether its jobs have the files, libraries and variables of this program."""
    has_groups: ClassVar[bool] = False
    """Whether several of its machines can train together."""
    limits_attempts: ClassVar[bool] = False
    """Whether `max_hours` end one attempt, after which the engine itself begins the next."""
    is_expected: ClassVar[bool] = True
    """Whether a list of all jobs reports that its engine does not answer."""

    name: str = Field("", pattern=r"^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Its key in the file."""
    backend: str
    image: Image = ""
    """By tag, `REGISTRY/NAME:TAG`, or by digest, `REGISTRY/NAME@sha256:…`."""
    bucket: Annotated[str, AfterValidator(_uri)] = ""
    """Where datasets and runs lie, unless `--bucket` or `DDPM_BUCKET` says otherwise."""
    gpus: int = Field(1, ge=0, le=64)
    """Per node, unless `--gpus` says otherwise."""
    gpu_type: LabelValue = ""
    spot: bool = True
    max_hours: float = Field(24.0, ge=0.017, le=720)
    price_per_hour: float | None = Field(None, ge=0)
    """In dollars, of one machine with all its GPUs, as the user pays it."""
    preempted_every_hours: float | None = Field(None, gt=0, le=1e6)
    """The mean time between two interruptions of one of its machines, as the user knows it."""
    env: dict[_Variable, str] = Field(default_factory=dict)
    """Variables of the job, without secrets, because lists and logs show them."""

    @property
    def software(self) -> str:
        """Returns where its machines find the program: the image, or what stands for one."""
        return self.image

    @property
    def has_files(self) -> bool:
        """Returns whether its machines have the files of this one, at the same paths."""
        return not self.is_remote

    @property
    def usual_bucket(self) -> str:
        """Returns the bucket of a command without `--bucket`: `DDPM_BUCKET`, else the target's, else ./bucket."""
        return os.environ.get("DDPM_BUCKET", "") or self.bucket or "./bucket"

    @property
    def notice_seconds(self) -> float:
        """Returns the time between the notice that a machine is taken away and its end."""
        return SPOT_GRACE_SECONDS

    @property
    def selects_machines(self) -> bool:
        """Returns whether the GPU type and `spot` decide about the machine."""
        return True

    def terms(self, spec: JobSpec) -> Terms:
        """Returns the facts about a job on a remote target."""
        raise NotImplementedError

    def list_price(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine by the table that comes with the program; None if it is unknown."""
        return None

    def hourly(self, spec: JobSpec) -> Hourly | None:
        """Returns the price of one machine: the target's own wins."""
        own = self.price_per_hour
        return self.list_price(spec) if own is None else Hourly(own, "as the target says")


def target_class(backend: str) -> type[Target]:
    """Returns the class of an engine's targets."""
    found: type[Target] = getattr(import_module(f"job.jobs.backends.{backend}"), BACKENDS[backend][0])
    return found


def backend_class(backend: str) -> type[Backend]:
    """Returns the class of an engine."""
    found: type[Backend] = getattr(import_module(f"job.jobs.backends.{backend}"), BACKENDS[backend][1])
    return found


@contextmanager
def backend_for(target: Target) -> Iterator[Backend]:
    """Yields the engine of a target.

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
    for key, value in block.items():
        _check_printable(value, f"{where}: {key}")
    try:
        # Through JSON, whose arrays may be tuples, which YAML's lists may not.
        target = model.model_validate_json(json.dumps({**block, "backend": backend, "name": name}, default=str))
    except ValidationError as error:
        raise BadConfigError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from None
    if not target.has_files and target.bucket and not is_remote(target.bucket):
        raise BadConfigError(f"{where}: bucket: {target.bucket!r} is a folder of this machine: use {URIS}")
    return target


def _problem(problem: Any) -> str:
    """Returns pydantic's message about one value, with its key."""
    got = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r:.200})"
    key = "".join(f"{part}." for part in problem["loc"]).removesuffix(".")
    return f"{key}: ".removeprefix(": ") + problem["msg"].removeprefix("Value error, ") + got


def _check_printable(value: Any, where: str) -> None:
    """Checks that all text in a value can be part of a command, a label or a terminal's line, and all keys are text.

    Raises:
        BadConfigError: the message names the key.
    """
    if isinstance(value, str) and not value.isprintable():
        raise BadConfigError(f"{where}: {value!r:.200} has characters that cannot be printed: leave them out")
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict) and not isinstance(key, str):
            raise BadConfigError(f"{where}: the key {key} is not text: put it in quotes")
        _check_printable(key, where)
        _check_printable(each, f"{where}.{key}")

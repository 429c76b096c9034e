"""Code of the user: a network that a command names, and the errors of code that is not ours.

A bucket keeps the text of a run's network for people. The program executes a file only if a command names it: by its
path, or in a job by its SHA-256, which `ddpm submit` puts among the job's words.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from job.exits import BadConfigError, BadDataError, BadRequestError, JobError, MissingInputError, did_you_mean
from job.progress import detail
from job.stop import StopSignal
from job.store import ObjectExistsError, ObjectMissingError, Store, open_store

if TYPE_CHECKING:
    from torch import nn

_NAMED = re.compile(r"(.+):([A-Za-z_]\w{0,99})(?:@([0-9a-f]{64}))?", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z_][\w-]{0,99}\.py", re.ASCII)
_GIVEN = ("image_shape", "num_classes", "out_channels", "augmentation_labels", "condition_channels", "vector_size")
"""The arguments of a network that are no settings: `ddpm.networks.adapter.GIVEN`."""
_INPUTS = ("labels", "x_start", "augmentation", "image", "image_noise", "vector")
"""The inputs of `ddpm.objective.Condition`."""
_KEY = "networks/{}.py"
_here: dict[str, OwnNetwork] = {}
"""The networks that this process may execute, by the SHA-256 of their files."""


@dataclass(frozen=True)
class OwnNetwork:
    """A network of the user: a class in one file. Its settings follow from the text, which is not executed for that."""

    path: Path
    class_name: str
    text: bytes

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def named(self) -> str:
        """The name in the words of a job."""
        return f"{self.path.name}:{self.class_name}@{self.sha256}"

    @property
    def key(self) -> str:
        """The key of the file in the bucket of a job."""
        return _KEY.format(self.sha256)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The settings `network.NAME` of the class, with their defaults.

        Raises:
            BadRequestError: the file has no such class, or an argument of its `__init__` is not a setting.
        """
        found = {name: value for name, value in self._parameters("__init__").items() if name not in _GIVEN}
        for name, default in found.items():
            if default is ...:
                said = f"{name} of {self.class_name}.__init__ is a setting of the run"
                raise BadRequestError(f"{self.path}: {said}: give it a default, a number, a text or a list of these")
        return {f"network.{name}": default for name, default in found.items()}

    def section(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Returns the section `model` of a configuration with this network, if `changes` fit its settings.

        Raises:
            BadRequestError: see `defaults`.
            BadConfigError: a change names no setting, or has a value of another type than its default.
        """
        for key, value in changes.items():
            if key.startswith("network.") and key not in self.defaults:
                raise BadConfigError(f"{key}: {self.class_name} has no such argument{did_you_mean(key, self.defaults)}")
            if key in self.defaults and not _is_like(value, self.defaults[key]):
                raise BadConfigError(f"{key}={value!r:.100}: its default is {self.defaults[key]!r:.100}")
        inputs = [name for name in self._parameters("forward") if name in _INPUTS]
        about = {"kind": "own", "file": self.path.name, "network": self.class_name, "sha256": self.sha256}
        without = {} if "labels" in inputs else {"model.num_classes": 0}
        return {f"model.{key}": value for key, value in about.items()} | {"model.inputs": inputs} | without

    def _parameters(self, method: str) -> dict[str, Any]:
        """Returns the arguments of a method with their defaults; `...` stands for one without, or of code."""
        with faults_of(f"--network {self.path.name}", self.path, f"see {self.path}"):
            tree = ast.parse(self.text, self.path.name)
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if self.class_name not in classes:
            there = did_you_mean(self.class_name, classes)
            raise BadRequestError(f"--network: {self.path} has no class {self.class_name!r}{there}")
        for node in classes[self.class_name].body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                takes = node.args
                ours = [*takes.posonlyargs, *takes.args][1:]
                defaults = [*[None] * (len(ours) - len(takes.defaults)), *takes.defaults, *takes.kw_defaults]
                pairs = zip([*ours, *takes.kwonlyargs], defaults, strict=True)
                return {argument.arg: _value(default) for argument, default in pairs}
        raise BadRequestError(f"--network: {self.class_name} in {self.path} needs a method {method} of its own")

    def load(self) -> type[nn.Module]:
        """Executes the file, and returns the class."""
        module = ModuleType(f"network_{self.sha256[:16]}")
        module.__file__ = str(self.path)
        # Dataclasses of the file look their module up.
        sys.modules[module.__name__] = module
        with self.faults():
            exec(compile(self.text, self.path, "exec"), module.__dict__)  # noqa: S102 -- the user named the file
            found: type[nn.Module] = getattr(module, self.class_name)
            return found

    def faults(self) -> AbstractContextManager[None]:
        """Returns the context in which the network's code runs."""
        return faults_of(f"--network {self.path.name}:{self.class_name}", self.path, f"see {self.path}")


def _value(node: ast.expr | None) -> Any:
    """Returns the value of a literal; `...` for none, and for anything else."""
    with suppress(ValueError, TypeError, SyntaxError, RecursionError):
        value = ast.literal_eval(node) if node else ...
        many = value if isinstance(value, tuple | list) else [value]
        if all(isinstance(each, bool | int | float | str | None) for each in many):
            return [*many] if isinstance(value, tuple) else value
    return ...


def _is_like(value: Any, default: Any) -> bool:
    """Returns whether a value fits an argument with this default."""
    if default is None or isinstance(default, float):
        return default is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return type(value) is type(default)


def named_network(named: str, bucket_uri: str) -> OwnNetwork:
    """Returns the network that a command names, which this process may execute from now on.

    Args:
        named: `FILE.py:CLASS` or `package.module:Class`; in a job with `@` and the SHA-256 of the file.
        bucket_uri: has the file of a job.

    Raises:
        BadRequestError: another form.
        BadDataError: the file of the job has another hash.
        MissingInputError: no such file.
    """
    if not (match := _NAMED.fullmatch(named)):
        raise BadRequestError(f"--network {named!r:.200}: use mynet.py:MyNet, or package.module:Class")
    place, class_name, sha256 = match.groups()
    if sha256 and sha256 in _here:
        return _here[sha256]
    path = Path(place).expanduser().absolute() if place.endswith(".py") else _module_path(place)
    if not _FILE_NAME.fullmatch(path.name):
        raise BadRequestError(f"--network {named!r:.200}: name the file of a Python module, such as mynet.py")
    # A file of that name beside a job may have changed since.
    own = OwnNetwork(path, class_name, _of_job(sha256, bucket_uri) if sha256 else _read(place, path))
    _here[own.sha256] = own
    return own


def _read(place: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingInputError(f"--network {place}: {error.strerror}") from None


def _of_job(sha256: str, bucket_uri: str) -> bytes:
    """Returns the file of a job's network, which has this hash."""
    store, key = open_store(bucket_uri), _KEY.format(sha256)
    try:
        text = store.read(key).data
    except ObjectMissingError:
        raise MissingInputError(f"{store.uri_of(key)} is gone: submit the job again") from None
    if hashlib.sha256(text).hexdigest() != sha256:
        raise BadDataError(f"{store.uri_of(key)} has another hash than its name: delete it, and submit the job again")
    return text


def name_of(network: type[nn.Module]) -> str:
    """Returns the name of a class for `--network`.

    Raises:
        BadRequestError: it lies in no file, such as one of a notebook's cell.
    """
    file = getattr(sys.modules.get(network.__module__), "__file__", None)
    # Executed as a module, a script would begin again.
    if not file or network.__module__ == "__main__" or "." in network.__qualname__:
        raise BadRequestError(f"network={network.__qualname__}: put the class into a file of its own, such as mynet.py")
    return f"{file}:{network.__name__}"


def _module_path(module: str) -> Path:
    spec = None
    # A name of several parts imports the packages before the last one.
    with faults_of(f"--network {module}", Path(f"{module}.py"), "name an installed module, or a file that ends in .py"):
        spec = importlib.util.find_spec(module)
    if not spec or not spec.origin:
        raise MissingInputError(f"--network {module}: no such module is installed; a file ends in .py")
    return Path(spec.origin)


def keep_network(bucket: Store, own: OwnNetwork) -> None:
    """Puts the file of a job's network into its bucket."""
    with suppress(ObjectExistsError):
        bucket.create(own.key, own.text)


def network_named(sha256: str, file: str, class_name: str) -> OwnNetwork:
    """Returns the network with this hash, which a command has named; the other arguments are for the message.

    Raises:
        BadRequestError: no command has.
    """
    if sha256 not in _here:
        said = "the network is a file of yours, and no code from a bucket is executed"
        raise BadRequestError(f"{said}: add --network {file}:{class_name}")
    return _here[sha256]


def other_network() -> OwnNetwork | None:
    """Returns the network that a command has named last, if any."""
    return [*_here.values()][-1] if _here else None


@contextmanager
def faults_of(
    said_of: str, file: Path, otherwise: str, is_ours: Callable[[BaseException], object] = lambda _: False
) -> Iterator[None]:
    """Turns any error of the user's code, also `SystemExit`, into one line with its place, else with `otherwise`.

    `ddpm -v` prints the traceback. Errors of the program pass: its own, and those that `is_ours` returns true for.
    """
    try:
        yield
    except BaseException as error:
        # The function may have caught an error of the program, such as a stop, and raised another one.
        for each in (error, error.__context__):
            if each and (isinstance(each, JobError | StopSignal) or is_ours(each)):
                raise each from None
        detail("".join(traceback.format_exception(error)).rstrip)
        frames = [at for at in traceback.extract_tb(error.__traceback__) if Path(at.filename).name == file.name]
        place = f"see {frames[-1].filename}, line {frames[-1].lineno}" if frames else otherwise
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        raise BadRequestError(f"{said_of}: {said:.500}; {place}") from None

"""A sampler of somebody's own, which a command names as `module:function`; no file from a bucket can name one."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from job.exits import BadRequestError, JobError
from job.processes.launched import lost_peer
from job.progress import detail
from job.stop import StopSignal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ddpm.process import Point
    from ddpm.samplers import Denoiser, NoiseAt, Sampler

_PROGRAM = (Path(__file__).parents[2] / package for package in ("job", "ddpm"))
_NOT_THEIRS = ("<", *(f"{path}{os.sep}" for path in (*_PROGRAM, *map(sysconfig.get_path, ("stdlib", "purelib")))))
"""Prefixes of the paths of files that are not the user's: the program's, the libraries' and Python's."""


@dataclass(frozen=True)
class CustomSampler:
    """The function, and what decides what it does."""

    name: str
    function: Sampler
    """See `ddpm.samplers.Sampler`."""
    sha256: str
    """Of the file of its module."""
    place: str
    """Where it is defined, for people."""
    _evaluations: dict[tuple[Point[float], ...], int] = field(default_factory=dict, compare=False)
    """How often it evaluates the network, by the points that it visits."""

    @classmethod
    def load(cls, name: str) -> CustomSampler:
        """Imports it, from where the command runs if it is not installed.

        Raises:
            BadRequestError: there is no such function, its module cannot be imported, or its arguments are others.
        """
        module_name, _, function_name = name.partition(":")
        # At the end, so that a file beside it cannot take the place of a library.
        sys.path.append(str(Path.cwd()))
        with _refused(name, "name a function of a module that is installed or lies where the command runs"):
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
            sha256 = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            code = getattr(inspect.unwrap(function), "__code__", None)
            place = f"see {code.co_filename}, line {code.co_firstlineno}" if code else f"see {module.__file__}"
        # A compiled function may have no signature.
        with _refused(name, f"it is given (denoise, x, points, noise_at); {place}"), suppress(ValueError):
            inspect.signature(function).bind("denoise", "x", "points", "noise_at")
        return cls(name, function, sha256, place)

    @property
    def words(self) -> str:
        """Part of a picture's name."""
        return f"{self.name.replace(':', '.')}-{self.sha256[:8]}"

    def __call__(self, denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt) -> Tensor:
        """Calls it.

        Raises:
            BadRequestError: it raises an error, gives anything but finite numbers of the shape of x, or evaluates the
                network more or less often than before at the same points. Processes wait for each other by that number.
            JobError: from `denoise`, such as `StoppedError`.
        """
        import torch

        # The shape and the points from before the call, which may change both.
        evaluations, usual, shape = 0, self._evaluations.get(key := tuple(points)), x.shape
        varies = BadRequestError(
            f"--sampler {self.name} evaluates the network more or less often than the {usual} times that it took at "
            f"these points before: the number may depend on the points alone; {self.place}"
        )

        def evaluate(x_t: Tensor, point: Point[float]) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            if usual is not None and evaluations > usual:
                raise varies
            return denoise(x_t, point)

        with _refused(self.name, self.place):
            drawn = self.function(evaluate, x, points, noise_at)
        if evaluations != self._evaluations.setdefault(key, evaluations):
            raise varies
        is_tensor = isinstance(drawn, torch.Tensor)
        if not is_tensor or drawn.shape != shape or not drawn.is_floating_point() or not drawn.isfinite().all():
            what = f"a tensor {[*drawn.shape]}, {drawn.dtype}" if is_tensor else type(drawn).__name__
            what += f": finite numbers {[*shape]} are wanted, as x; {self.place}"
            raise BadRequestError(f"--sampler {self.name} gave {what}")
        return drawn.detach().float()


@contextmanager
def _refused(name: str, otherwise: str) -> Iterator[None]:
    """Turns any error of the user's code, `SystemExit` too, into one line with its place, or `otherwise`.

    Raises:
        BadRequestError: it raised something; the traceback is a detail.
    """
    try:
        yield
    except BaseException as error:
        causes = [error]
        # Once each: an error may be its own context.
        while (context := causes[-1].__context__) and context not in causes:
            causes.append(context)
        for cause in causes:
            # An error of the program, such as a stop, which the user's code may have caught and replaced by its own.
            if isinstance(cause, JobError | StopSignal) or lost_peer(cause):
                raise cause from None
        detail("".join(traceback.format_exception(error)).rstrip)
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"see {at.filename}, line {at.lineno}" for at in frames if not at.filename.startswith(_NOT_THEIRS)]
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        raise BadRequestError(f"--sampler {name}: {said:.500}; {[otherwise, *places][-1]}") from None

"""A sampler of the user, which a command names as `module:function`; no file of a bucket can name one."""

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
"""Prefixes of the paths of other files than the user's: those of the program, the libraries and Python."""


@dataclass(frozen=True)
class CustomSampler:
    """The function, with the hash of its module."""

    name: str
    function: Sampler
    """See `ddpm.samplers.Sampler`."""
    sha256: str
    """The hash of its module's file."""
    place: str
    """The place of its definition, for people."""
    _evaluations: dict[tuple[Point[float], ...], int] = field(default_factory=dict, compare=False)
    """The number of its evaluations of the network, by points."""

    @classmethod
    def load(cls, name: str) -> CustomSampler:
        """Imports the function: an installed one, or one in the working folder.

        Raises:
            BadRequestError: no such function, its module cannot be imported, or it takes other arguments.
        """
        module_name, _, function_name = name.partition(":")
        # At the end of the path, so that a file of the working folder cannot replace a library.
        sys.path.append(str(Path.cwd()))
        with _refused(name, "name a function of a module that is installed or lies in the working folder"):
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
            sha256 = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            code = getattr(inspect.unwrap(function), "__code__", None)
            place = f"see {code.co_filename}, line {code.co_firstlineno}" if code else f"see {module.__file__}"
        # A compiled function may have no signature.
        with _refused(name, f"its arguments must be (denoise, x, points, noise_at); {place}"), suppress(ValueError):
            inspect.signature(function).bind("denoise", "x", "points", "noise_at")
        return cls(name, function, sha256, place)

    @property
    def words(self) -> str:
        """Its part of a picture's name."""
        return f"{self.name.replace(':', '.')}-{self.sha256[:8]}"

    def __call__(self, denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt) -> Tensor:
        """Calls the function.

        Raises:
            BadRequestError: it raises an error, returns anything but finite numbers of the shape of x, or evaluates the
                network more or less often than before at the same points: then other processes would wait for ever.
            JobError: an error from `denoise`, such as `StoppedError`.
        """
        import torch

        # Taken before the call, which may change both the shape and the points.
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
            what += f": it must return finite numbers {[*shape]}, as x; {self.place}"
            raise BadRequestError(f"--sampler {self.name} returned {what}")
        return drawn.detach().float()


@contextmanager
def _refused(name: str, otherwise: str) -> Iterator[None]:
    """Turns any error of the user's code, also `SystemExit`, into one line with its place, else with `otherwise`.

    Raises:
        BadRequestError: the code raised something; `ddpm -v` prints the traceback.
    """
    try:
        yield
    except BaseException as error:
        causes = [error]
        # An error may be its own context: without this check the loop would not end.
        while (context := causes[-1].__context__) and context not in causes:
            causes.append(context)
        for cause in causes:
            # The user's code may have caught an error of the program, such as a stop, and raised another one.
            if isinstance(cause, JobError | StopSignal) or lost_peer(cause):
                raise cause from None
        detail("".join(traceback.format_exception(error)).rstrip)
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"see {at.filename}, line {at.lineno}" for at in frames if not at.filename.startswith(_NOT_THEIRS)]
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        raise BadRequestError(f"--sampler {name}: {said:.500}; {[otherwise, *places][-1]}") from None

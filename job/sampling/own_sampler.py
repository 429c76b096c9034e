"""A sampler of somebody's own, which a command names as `module:function`; no file from a bucket can name one."""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.exits import BadRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ddpm.process import Point
    from ddpm.samplers import Denoiser, NoiseAt, Sampler


@dataclass(frozen=True)
class OwnSampler:
    """The function, and what decides what it does."""

    name: str
    function: Sampler
    """See `ddpm.samplers.Sampler`."""
    sha256: str
    """Of the file of its module."""

    @classmethod
    def load(cls, name: str) -> OwnSampler:
        """Imports it, from where the command runs if it is not installed.

        Raises:
            BadRequestError: there is no such function.
        """
        module_name, _, function_name = name.partition(":")
        if (here := str(Path.cwd())) not in sys.path:
            # At the end, so that a file beside it cannot take the place of a library.
            sys.path.append(here)
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
            sha256 = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        # A module of somebody's own may fail in any way.
        except Exception as error:
            raise BadRequestError(
                f"--sampler {name}: {type(error).__name__}: {error}; name a function of a module that is installed or "
                "lies where the command runs"
            ) from None
        if not callable(function):
            raise BadRequestError(f"--sampler {name}: it is no function, but {type(function).__name__}")
        return cls(name, function, sha256)

    @property
    def words(self) -> str:
        """Part of a picture's name."""
        return f"{self.name.replace(':', '.')}-{self.sha256[:8]}"

    def __call__(self, denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt) -> Tensor:
        """Calls it.

        Raises:
            BadRequestError: it gives anything but finite numbers of the shape of x.
        """
        import torch

        drawn = self.function(denoise, x, points, noise_at)
        if not isinstance(drawn, torch.Tensor) or drawn.shape != x.shape or not drawn.isfinite().all():
            what = f"a tensor {[*drawn.shape]}" if isinstance(drawn, torch.Tensor) else type(drawn).__name__
            raise BadRequestError(f"--sampler {self.name} gave {what}: finite numbers {[*x.shape]} are wanted, as x")
        return drawn

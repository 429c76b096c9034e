"""The science: schedules, networks, objectives, samplers. Knows tensors; knows nothing of buckets or command lines.

`ddpm.load(folder).sample(16, seed=0)` samples from a diffusers folder. `load` and `Model` are imported, together with
PyTorch, on their first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.loading import load as load
    from ddpm.model import Model as Model

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddpm import loading

    return getattr(loading, name)

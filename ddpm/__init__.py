"""The science: schedules, networks, objectives, samplers. Knows tensors; knows nothing of buckets or command lines.

`ddpm.load(folder).sample(16, seed=0)` draws from a diffusers folder. `load` and `Model` are imported, together with
PyTorch, on their first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.model import Model as Model
    from ddpm.model import load as load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddpm import model

    return getattr(model, name)

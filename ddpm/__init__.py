"""The science: schedules, networks, objectives, samplers. Knows tensors; knows nothing of buckets or command lines.

`ddpm.load(folder).sample(16, seed=0)` draws from a diffusers folder. The names below are imported, together with
PyTorch, on their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.catalogue import Diffusion as Diffusion
    from ddpm.ema import EMA as EMA
    from ddpm.ema import Exponential as Exponential
    from ddpm.ema import PowerFunction as PowerFunction
    from ddpm.generation import Sampling as Sampling
    from ddpm.generation import generate as generate
    from ddpm.generation import make_denoiser as make_denoiser
    from ddpm.generation import noise_of as noise_of
    from ddpm.grids import make_grid as make_grid
    from ddpm.guidance import Guidance as Guidance
    from ddpm.image_size import ImageSize as ImageSize
    from ddpm.model import Model as Model
    from ddpm.model import load as load
    from ddpm.networks.dit import DiT as DiT
    from ddpm.networks.dome import DomeUNet as DomeUNet
    from ddpm.networks.edm2 import EDM2 as EDM2
    from ddpm.networks.unet import UNet as UNet
    from ddpm.objective import Condition as Condition
    from ddpm.objective import Objective as Objective
    from ddpm.prediction import Prediction as Prediction
    from ddpm.process import Point as Point
    from ddpm.process import RectifiedFlow as RectifiedFlow
    from ddpm.process import VarianceExploding as VarianceExploding
    from ddpm.process import VariancePreserving as VariancePreserving
    from ddpm.process import make_process as make_process
    from ddpm.samplers import ancestral as ancestral
    from ddpm.samplers import ddim as ddim
    from ddpm.samplers import deis as deis
    from ddpm.samplers import dpmpp_2m as dpmpp_2m
    from ddpm.samplers import dpmpp_3m as dpmpp_3m
    from ddpm.samplers import dpmpp_sde_2m as dpmpp_sde_2m
    from ddpm.samplers import heun as heun
    from ddpm.samplers import ipndm as ipndm
    from ddpm.samplers import unipc as unipc

_MODULES = {
    "ddpm.catalogue": ("Diffusion",),
    "ddpm.ema": ("EMA", "Exponential", "PowerFunction"),
    "ddpm.generation": ("Sampling", "generate", "make_denoiser", "noise_of"),
    "ddpm.grids": ("make_grid",),
    "ddpm.guidance": ("Guidance",),
    "ddpm.image_size": ("ImageSize",),
    "ddpm.model": ("Model", "load"),
    "ddpm.networks.dit": ("DiT",),
    "ddpm.networks.dome": ("DomeUNet",),
    "ddpm.networks.edm2": ("EDM2",),
    "ddpm.networks.unet": ("UNet",),
    "ddpm.objective": ("Condition", "Objective"),
    "ddpm.prediction": ("Prediction",),
    "ddpm.process": ("Point", "RectifiedFlow", "VarianceExploding", "VariancePreserving", "make_process"),
    "ddpm.samplers": ("ancestral", "ddim", "deis", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde_2m", "heun", "ipndm", "unipc"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

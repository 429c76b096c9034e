"""A stand-in for Apple's GPU on the CPU: `with stand_in(): …` computes on `mps`, and refuses what MPS lacks.

Tensors of `mps` are of a class of their own, which passes from the operands of a function to its results. A function
that gets one may use no operation of ATen without a kernel for MPS in PyTorch's own list, `native_functions.yaml`; no
float64 and no complex128; and no tensor of the host beside it. Values of other dtypes are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.resources import files
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)
DOUBLE = torch.float64, torch.complex128
OF_CPU = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_attention_math_for_mps",
}
"""Operations that PyTorch chooses for the CPU, by what it chooses for MPS."""
WAYS = {"copy_", "_foreach_copy_", "__setitem__", "__set__", "_has_compatible_shallow_copy_type"}
"""Functions that may have operands of both devices."""


NOT_ALL = {"grid_sampler_2d": lambda x, grid, mode, padding, *_: "bicubic" * (mode == 2) + "border" * (padding == 1)}
"""Operations whose kernel for MPS lacks an option (GridSampler.mm), with what of a call it lacks."""


class OnMps(Tensor):
    """A tensor of `mps`, which lies on the CPU."""


@cache
def operations() -> dict[str, bool]:
    """Whether each operation of ATen has a kernel for MPS, or consists of others, by name with overload."""
    text = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    listed = {each["func"].partition("(")[0]: each for each in yaml.load(text, yaml.CSafeLoader)}

    def runs(name: str) -> bool:
        if "structured_delegate" in listed[name]:
            return runs(listed[name]["structured_delegate"])
        # Without a list it consists of others.
        keys = ",".join(listed[name].get("dispatch", {"CompositeImplicitAutograd": ""}))
        return "MPS" in keys.replace("SparseMPS", "").replace("SparseCsrMPS", "") or "Composite" in keys

    return {name: runs(name) for name in listed}


class Refusing(TorchDispatchMode):
    """Refuses operations that MPS lacks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        base, overload = OF_CPU.get(name, name), func._schema.overload_name
        full = f"{base}.{overload}" if overload else base
        if not operations().get(full, not func._schema.name.startswith("aten::")):
            raise NotImplementedError(f"MPS has no {full}")
        if lacking := NOT_ALL.get(base, lambda *_: "")(*args):
            raise NotImplementedError(f"{full} of MPS has no {lacking}")
        result = func(*args, **kwargs or {})
        for one in tree_leaves((args, kwargs, result)):
            # Numbers of Python are tensors without dimensions.
            if isinstance(one, Tensor) and one.ndim and one.dtype in DOUBLE:
                raise TypeError(f"MPS has no {one.dtype}: {full}")
        return result


class StandIn(TorchFunctionMode):
    """Keeps the tensors of `mps` apart; `functions` counts those that had one."""

    functions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        given = [one for one in tensors if isinstance(one, OnMps)]
        if name == "_parse_to":
            return func(*args, **kwargs)
        if given and func == Tensor.device.__get__:
            return MPS
        if name == "numpy" and given:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__") and given:
            return func(*(plain(one) for one in args), **kwargs)
        wants = {one.type for one in tree_leaves((args, kwargs)) if isinstance(one, torch.device)}
        wants |= {one for one in (kwargs.get("device"), *args[1:2]) if isinstance(one, str) and one in ("cpu", "mps")}
        wants |= {"cpu"} if name == "cpu" else set()
        if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            wants |= {"mps" if isinstance(args[1], OnMps) else "cpu"}
        if given and not wants and name not in WAYS:
            others = [one for one in tensors if not isinstance(one, OnMps) and one.ndim]
            if others:
                raise RuntimeError(f"{name} has tensors of mps and of the host")
        host = tree_map(lambda one: torch.device("cpu") if is_mps(one) else one, (args, kwargs))
        if not given and "mps" not in wants:
            return func(*args, **kwargs)
        if kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]):
            raise RuntimeError("a copy beside the host gives wrong values on mps")
        self.functions += 1
        if "cpu" in wants:
            result = func(*tree_map(plain, host[0]), **tree_map(plain, host[1]))
            return result.clone() if any(result is plain(one) for one in given) else result
        with Refusing():
            result = func(*host[0], **host[1])
        if any(result is one for one in tensors if not isinstance(one, OnMps)):
            # What was moved is another tensor.
            result = result.detach().clone()
        return tree_map(taken, result)


def taken(one: Any) -> Any:
    """The result of a function on `mps`."""
    if isinstance(one, Tensor) and one.dtype in DOUBLE:
        raise TypeError(f"MPS has no {one.dtype}")
    return one.as_subclass(OnMps) if type(one) is Tensor else one


def is_mps(one: object) -> bool:
    return (isinstance(one, str) and one == "mps") or (isinstance(one, torch.device) and one.type == "mps")


def plain(one: Any) -> Any:
    """The tensor of the CPU behind one of `mps`."""
    with torch._C.DisableTorchFunctionSubclass():
        return one.as_subclass(Tensor) if isinstance(one, OnMps) else one


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Gives this thread an Apple GPU."""
    replaced: dict[str, Callable[..., Any] | object] = {
        "torch.backends.mps.is_available": lambda: True,
        "torch.backends.mps.is_built": lambda: True,
        "torch.accelerator.current_accelerator": lambda *_, **__: torch.device("mps"),
        "torch.backends.mps.get_name": lambda: "Apple M0",
        "torch.mps.driver_allocated_memory": lambda: 7 << 20,
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for name, function in replaced.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(mock.patch.dict("os.environ", ACCELERATE_USE_CPU="false"))
        yield stack.enter_context(StandIn())

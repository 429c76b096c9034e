"""An allocator that refuses, in a process of a test or of the program."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LittleMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that live, and refuses more than `limit_bytes`."""

    def __init__(self, limit_bytes: float = math.inf) -> None:
        super().__init__()
        self.limit_bytes, self.live_bytes, self.peak_bytes, self.refused_in = limit_bytes, 0, 0, list[str]()
        self._known = set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.limit_bytes:
            self.refused_in.append(str(function))
            raise torch.OutOfMemoryError(f"{self.live_bytes:,} bytes")
        return result

    def _free(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size_bytes


def refusing(work: Callable[..., Any], share: float, after_calls: int) -> Callable[..., Any]:
    """`work`, which then gets this share of the memory that the last of these calls took; below 0 none at all."""
    calls, peak_bytes = count(), list[int]()

    def work_with_little_memory(*args: Any, **named: Any) -> Any:
        has_little = next(calls) >= after_calls
        with LittleMemory(share * (peak_bytes[after_calls - 1] + 1) if has_little else math.inf) as memory:
            result = work(*args, **named)
        peak_bytes.append(memory.peak_bytes)
        return result

    return work_with_little_memory

"""Work that goes on in smaller batches when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

_WORDS = (
    *("can't allocate memory", "could not create a primitive", "MPS backend out of memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""The words of bare RuntimeErrors about memory: of PyTorch, oneDNN and CUDA's libraries."""


def ran_out(error: BaseException) -> bool:
    """Returns whether an error says that the memory of a device ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )


def free() -> None:
    """Frees what an abandoned pass left; called outside of `except`, because a traceback holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_halves(work: Callable[[Any], T], items: Sequence[Any] | np.ndarray) -> list[T]:
    """Returns what `work` makes of the items, of each half alone where memory runs out; raises if one does not fit."""
    try:
        return [work(items)]
    except RuntimeError as error:
        if len(items) == 1 or not ran_out(error):
            raise
    free()
    middle = (len(items) + 1) // 2
    return in_halves(work, items[:middle]) + in_halves(work, items[middle:])

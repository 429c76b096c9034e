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


class Fitting:
    """Does work in parts that fit memory, and begins with the size that fitted before.

    Attributes:
        most_items: of a part; None before memory ran out.
    """

    def __init__(self) -> None:
        self.most_items: int | None = None

    def in_parts(self, work: Callable[[Any], T], items: Sequence[Any] | np.ndarray) -> list[T]:
        """Returns what `work` makes of the items, of half as many at once whenever memory runs out.

        Raises:
            RuntimeError: one item does not fit, or another error.
        """
        made, done = list[T](), 0
        while done < len(items):
            part = items[done : done + (self.most_items or len(items))]
            try:
                made.append(work(part))
                done += len(part)
                continue
            except RuntimeError as error:
                if len(part) == 1 or not ran_out(error):
                    raise
            free()
            self.most_items = (len(part) + 1) // 2
        return made

"""CPU threads that share images by parts.

PyTorch's own threads share each operation, and meet at its end: hundreds of times in a step. Beside busy processes each
meeting waits until the operating system runs all of them again, and a step with two threads takes several times as long
as with one. These threads meet once in a step. The settings alone decide what a part holds, and how many of PyTorch's
threads compute it, so that any number of threads and processes gives equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from ddpm.objective import Condition, Network

T = TypeVar("T")
Part = TypeVar("Part")

GROUP_IMAGES = 8
"""The most images of a group: fewer cost speed, more leave threads without a group."""


def group_of(images: int) -> int:
    """Returns the size of a group: `images` make an even number of groups of nearly equal size."""
    return ceil(images / (2 * ceil(images / (2 * GROUP_IMAGES))))


class Threads:
    """Threads that compute one part at a time each, with `each` of PyTorch's threads."""

    def __init__(self, count: int, each: int = 1) -> None:
        self.each = each
        self._pool = ThreadPoolExecutor(count, "compute")

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Gives the operations outside of `map`, such as the optimiser's, as many threads as a part has."""
        usual = torch.get_num_threads()
        torch.set_num_threads(self.each)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    def map(self, work: Callable[[Part], T], parts: Iterable[Part]) -> Iterator[T]:
        """Yields what `work` makes of each part, in their order; raises its first error."""

        def compute(part: Part) -> T:
            # The setting is that of this thread.
            torch.set_num_threads(self.each)
            return work(part)

        return self._pool.map(compute, parts)

    def sharing(
        self, network: Network, autocast: Callable[[], AbstractContextManager[None]], group_images: int
    ) -> Network:
        """Returns the network, evaluated under its autocast in groups of images, without gradients."""

        def answer(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            # Both are settings of the thread.
            is_inference = torch.is_inference_mode_enabled()

            def answer_of(images: slice) -> Tensor:
                own = Condition(*(None if values is None else values[images] for values in condition))
                with torch.inference_mode(is_inference), torch.no_grad(), autocast():
                    return network(x[images], t[images], own)

            groups = (slice(start, start + group_images) for start in range(0, len(x), group_images))
            return torch.cat(list(self.map(answer_of, groups)))

        return answer


@cache
def threads_of(device: torch.device, each: int = 1) -> Threads | None:
    """Returns threads that use all of PyTorch's on a CPU, `each` of them for a part; None on a GPU."""
    return Threads(max(1, torch.get_num_threads() // each), each) if device.type == "cpu" else None

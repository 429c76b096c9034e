"""CPU threads that share a batch by images.

PyTorch's own threads share each operation, and meet at its end: hundreds of times in a step. Beside busy processes each
meeting waits until the operating system runs all of them again, and a step with two threads takes several times as long
as with one. These threads meet once in a step. How the images are shared depends on the number of threads alone, so
that equal machines give equal bits, busy or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ddpm.objective import Condition, Network

T = TypeVar("T")

_MOST_PARTS = 8
"""Each part has gradients of its own, as large as the network: a machine of many cores takes several for a part."""


class Threads:
    """Threads that share images, and compute alone."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "compute")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Leaves one thread to the operations outside of `map` as well, such as the optimiser's."""
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    def map(self, work: Callable[[slice], T], images: slice) -> list[T]:
        """Returns what `work` makes of each thread's part of the images, in their order; raises its first error."""
        start, count = images.start, images.stop - images.start
        parts = min(self.count // -(-self.count // _MOST_PARTS), count)
        ends = [start + count * part // parts for part in range(parts + 1)]

        def alone(part: slice) -> T:
            # The setting is that of this thread; with fewer parts than threads each part gets several.
            torch.set_num_threads(self.count // parts)
            return work(part)

        return list(self._pool.map(alone, [slice(*part) for part in pairwise(ends)]))

    def sharing(self, network: Network, autocast: Callable[[], AbstractContextManager[None]]) -> Network:
        """Returns the network, evaluated by all threads under its autocast, without gradients."""

        def answer(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            # Both are settings of the thread.
            is_inference = torch.is_inference_mode_enabled()

            def answer_of(images: slice) -> Tensor:
                own = Condition(*(None if values is None else values[images] for values in condition))
                with torch.inference_mode(is_inference), torch.no_grad(), autocast():
                    return network(x[images], t[images], own)

            return torch.cat(self.map(answer_of, slice(0, len(x))))

        return answer


@cache
def threads_of(device: torch.device) -> Threads | None:
    """Returns threads as many as PyTorch has on a CPU; None if that is one, and on a GPU."""
    count = torch.get_num_threads()
    return Threads(count) if device.type == "cpu" and count > 1 else None

"""The processes of a run, and their messages outside the training step."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from ddpm.device import best_device
from job.processes.group import rendezvous_seconds
from job.stop import NEVER, Stop, count_of

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""The main process may wait for a lease or a bucket. Its death ends the others at once: it closes the connection."""
_COLLECTIVE_POLL_SECONDS = 0.002


class Ranks:
    """All processes of a run, as one of them sees them."""

    def __init__(self, state: PartialState, stop: Stop = NEVER) -> None:
        """Collective. While this process waits for others it calls `stop`, which is its heartbeat."""
        self.state, self.stop = state, stop
        self.rank, self.world_size, self.device = state.process_index, state.num_processes, state.device
        self.is_main = state.is_main_process
        # NCCL would need device tensors, and would fail after the timeout of a training step.
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if self.world_size > 1 else None

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main process and hands its picklable result, or its error, to every process.

        Raising on all of them alike keeps the others from waiting in a collective call that never comes. Collective.
        """
        if self._group is None:
            return work()
        outcome: tuple[Any, BaseException | None] = (None, None)
        data = torch.empty(0, dtype=torch.uint8)
        if self.is_main:
            try:
                outcome = (work(), None)
            except Exception as failure:
                outcome = (None, failure)
            data = torch.frombuffer(bytearray(_pickled(outcome)), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._wait(dist.broadcast(size, src=0, group=self._group, async_op=True))
        data.resize_(int(size))
        self._wait(dist.broadcast(data, src=0, group=self._group, async_op=True))
        if not self.is_main:
            # These bytes come from a connected process of this run, never from a bucket.
            outcome = pickle.loads(data.numpy().tobytes())  # noqa: S301
        result, error = outcome
        if error is not None:
            raise error
        return cast(T, result)

    def only_on_main(self, make: Callable[[], T]) -> T | None:
        """Returns the result of `make` on the main process, None on the others; raises its error on all. Collective."""
        made: list[T] = []
        self.on_main(lambda: made.append(make()))
        return made[0] if made else None

    def sum(self, *numbers: int) -> tuple[int, ...]:
        """Returns the sums of every process's numbers. Collective."""
        if self._group is None:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.int64)
        self._wait(dist.all_reduce(sums, group=self._group, async_op=True))
        return tuple(sums.tolist())

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Gives all processes the main one's values, on a GPU or in host memory, which NCCL cannot send. Collective."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0, group=self._group if tensor.device.type == "cpu" else None)

    def _wait(self, work: dist.Work) -> None:
        while not work.is_completed():
            self.stop()
            time.sleep(_COLLECTIVE_POLL_SECONDS)
        work.wait()


def own_device() -> torch.device:
    """Returns the device of this process of the run."""
    return best_device(count_of("WORLD_SIZE", 1))


def meet(stop: Stop) -> Ranks:
    """Returns the processes of this run once they have met; a stop before that ends this one at once. Collective."""
    patience_seconds = rendezvous_seconds() if count_of("WORLD_SIZE", 1) > 1 else 0.0
    with stop.waiting(patience_seconds):
        # The import takes a second, in which `waiting` sends the heartbeat.
        from accelerate import PartialState

        torch.backends.cudnn.benchmark = torch.cuda.is_available()
        timeout = timedelta(seconds=rendezvous_seconds())
        return Ranks(PartialState(cpu=own_device().type == "cpu", timeout=timeout), stop)


def build_accelerator(deterministic: bool = False) -> Accelerator:
    """Returns the accelerator that wraps a network for training on the processes that have met.

    Args:
        deterministic: use kernels of a GPU that give equal bits each time.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # A CPU has no others, and the setting would import the compiler.
    if deterministic and own_device().type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return Accelerator(
        cpu=own_device().type == "cpu",
        # The caller's autocast knows fp16 on a CPU too, and its loss scale is a part of the state.
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


class Agreement:
    """Flags that hold once any process raised them, exchanged without waiting.

    Each step starts an exchange and reads the previous one: the answer is one step late, and the same on every process.
    """

    def __init__(self, world_size: int, flags: int) -> None:
        self._world_size, self._flags = world_size, flags
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        if world_size > 1:
            # NCCL would need a device tensor, and reading it would wait for the device.
            self._group = dist.new_group(backend="gloo")

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Sends this step's flags and returns those that any process sent in the step before.

        With one process the answer is immediate.
        """
        if self._world_size == 1:
            return flags
        agreed = self.finish()
        offered = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(offered, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, offered)
        return agreed

    def finish(self) -> tuple[bool, ...]:
        """Waits for the exchange under way, if there is one, and returns its flags."""
        if self._pending is None:
            return (False,) * self._flags
        work, offered = self._pending
        work.wait()
        self._pending = None
        return tuple(bool(flag) for flag in offered.tolist())


def _pickled(outcome: tuple[Any, BaseException | None]) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as failure:
        # The others must not wait for ever for a result that cannot be pickled.
        return pickle.dumps((None, RuntimeError(f"the main process has a result that cannot be sent: {failure!r}")))

"""Being stopped: a signal sets one flag that every phase polls, and that all processes of a run agree on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import Work


class StopFlag:
    """Set by SIGTERM or SIGINT. Calling it says whether to stop; `reason` says why.

    A second signal changes nothing: a signal to a process group reaches a process twice, directly and from its
    launcher, and must not cut the save short.
    """

    def __init__(self) -> None:
        self.reason = ""

    def install(self) -> StopFlag:
        """Takes over the two signals of this process (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def __call__(self) -> bool:
        """Whether a signal came."""
        return bool(self.reason)


class Agreement:
    """Flags that hold once any process raised them, agreed without waiting.

    Each step starts an exchange and reads the one before, so the answer is one step late and the same everywhere.
    """

    def __init__(self, world_size: int, flags: int) -> None:
        self._world_size = world_size
        self._flags = flags
        self._pending: tuple[Work, torch.Tensor] | None = None
        if world_size > 1:
            import torch.distributed as dist

            # NCCL would need a device tensor, and reading it would wait for the device.
            self._group = dist.new_group(backend="gloo")

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Offers this step's flags and returns those that any process offered in the step before.

        With one process the answer is immediate.
        """
        if self._world_size == 1:
            return flags
        import torch
        import torch.distributed as dist

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

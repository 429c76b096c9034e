"""A process under the launcher: it dies with its parent, shows its stacks on request, and reports a lost peer.

The same command under torchrun or accelerate is a rank of theirs. It saves and stops as well, but these two watch no
heartbeat, and end with 1 after every failure.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys

from job.exits import CRASHED, BadRequestError
from job.stop import STOP_SIGNALS, connect_heartbeat, count_of

LAUNCHED = "DDPM_LAUNCHED"
"""The variable that holds the launcher's process id, in the ranks it started."""
GATE = "DDPM_GATE"
"""The variable that holds the descriptor of a pipe, from which each rank gets a byte before it works."""

_PR_SET_PDEATHSIG = 1
_PEER_IS_AWAY = re.compile(
    r"(?i)(closed|reset) by peer|broken pipe|timed out|connection (refused|was likely closed)|ncclRemoteError"
    r"|remote process exited|communicator was aborted"
)

_gate: int | None = None
"""That descriptor, in a process that the launcher started."""


def is_launched() -> bool:
    """Returns whether this program's launcher started this process."""
    return LAUNCHED in os.environ


def is_rank() -> bool:
    """Returns whether this process does the work itself: this launcher, torchrun or accelerate started it.

    Raises:
        BadRequestError: the variables that describe its place in the group are not valid.
    """
    if not (is_launched() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()):
        return False
    for number, among in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number in os.environ:
            count_of(number, 0, most=count_of(among, 1 << 16, least=1) - 1)
    count_of("MASTER_PORT", 1, least=1, most=65_535)
    return True


def attach() -> None:
    """Ties this process to its launcher, if it has one; call it before anything that takes time.

    The rank requests the parent-death signal itself. The launcher's Python code between fork and exec could deadlock
    on a lock that another thread held at the fork. `getppid` shows whether the launcher died before the request.
    """
    if not is_launched():
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ[LAUNCHED]:
        raise BadRequestError(f"the launcher of this process is gone: unset {LAUNCHED} to run without one")
    # Until `Stop` handles it, Ctrl-C must end this process without a traceback, as SIGTERM does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connect_heartbeat()
    global _gate
    # Removed, because the number means nothing in processes that this one starts.
    if gate := os.environ.pop(GATE, ""):
        _gate = int(gate)


def await_go() -> None:
    """Waits until the launcher has checked the command; if it refuses the command, it kills this process.

    Raises:
        SystemExit: the launcher was killed. Its end of the pipe may close before the parent-death signal comes.
    """
    if _gate is not None and not os.read(_gate, 1):
        raise SystemExit(CRASHED)


def lost_peer(error: BaseException) -> str:
    """Returns the line in which a distributed backend reports a process that went away; empty for any other error."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return ""
    import torch.distributed as dist

    # Gloo raises plain RuntimeErrors that begin with the name of its source file.
    is_distributed = isinstance(error, dist.DistError) or "gloo" in str(error)
    text = " ".join(str(error).split())
    if not (is_distributed and _PEER_IS_AWAY.search(text)):
        return ""
    return re.sub(r"^\[\S+\] ", "", text).split(". ")[0][:200]

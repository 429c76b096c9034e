"""A process under the launcher: dies with its parent, shows its stacks when asked, tells a consequence from a cause.

The same command under torchrun or accelerate is a rank of theirs: it saves and stops as well, but nobody watches its
heartbeat, and whatever code it ends with, those two end with 1.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys

from job.exits import BadRequestError
from job.stop import connect_heartbeat, count_of

LAUNCHED = "DDPM_LAUNCHED"
"""Process id of the launcher, in the environment of the ranks it started."""
LOST_PEER = 68
"""Exit code of a rank that ended only because another one went away. It never leaves the launcher."""

_PR_SET_PDEATHSIG = 1
_PEER_IS_AWAY = re.compile(
    r"(?i)(closed|reset) by peer|broken pipe|timed out|connection (refused|was likely closed)|ncclRemoteError"
    r"|remote process exited|communicator was aborted"
)


def is_launched() -> bool:
    """Whether our launcher started this process."""
    return LAUNCHED in os.environ


def is_rank() -> bool:
    """Whether this process is to do the work itself: one that our launcher, torchrun or accelerate started.

    Raises:
        BadRequestError: the variables that tell such a process its place make no sense.
    """
    if not (is_launched() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()):
        return False
    for number, among in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number in os.environ:
            count_of(number, 0, most=count_of(among, 1 << 16, least=1) - 1)
    count_of("MASTER_PORT", 1, least=1, most=65_535)
    return True


def attach() -> None:
    """Ties this process to its launcher, if it has one; to be called before anything that takes time.

    The rank asks for the parent-death signal itself, and not the launcher between fork and exec: Python code there may
    deadlock on a lock that a thread of the launcher held at the fork. A launcher that died before shows in `getppid`.
    """
    if not is_launched():
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ[LAUNCHED]:
        raise BadRequestError(f"the launcher of this process is gone; without {LAUNCHED} it would need none")
    # Until `Stop` takes over, Ctrl-C is to end this process like SIGTERM does, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connect_heartbeat()


def lost_peer(error: BaseException) -> str:
    """What a distributed backend said of another process that went away, in one line; empty for any other error."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return ""
    import torch.distributed as dist

    # Gloo raises bare RuntimeErrors that begin with its source file.
    is_distributed = isinstance(error, dist.DistError) or "gloo" in str(error)
    text = " ".join(str(error).split())
    if not (is_distributed and _PEER_IS_AWAY.search(text)):
        return ""
    return re.sub(r"^\[\S+\] ", "", text).split(". ")[0][:200]

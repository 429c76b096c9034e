"""Which process of which machine somebody is, said so that another can tell for certain that it is dead."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

_STATE, _START = 0, 19
"""Fields 3 and 22 of `/proc/PID/stat` (proc_pid_stat(5)), counted from the end of the process's name."""


class ProcessIdentity(BaseModel):
    """A process, as one that comes later on the same machine can recognise it.

    Where there is no `/proc`, or not that of its PID namespace, `boot_id` and `pid_namespace` are empty, and the
    process counts as alive whatever happens to it.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int = Field(ge=1, lt=2**31)
    boot_id: str
    """Random number that the kernel draws when it starts."""
    pid_namespace: str
    """`pid:[INODE]`: in another one the same number means another process."""
    start_ticks: int = Field(ge=0)
    """When it started, in clock ticks since the machine did: a number that is used again has another."""

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """The process that asks."""
        host, pid = socket.gethostname(), os.getpid()
        with suppress(OSError):
            # A container that was given its host's /proc would look up its own numbers among the host's.
            if Path("/proc/self").readlink() == Path(str(pid)):
                start_ticks = int(_stat(pid)[_START])
                namespace = str(Path("/proc/self/ns/pid").readlink())
                boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                return cls(host=host, pid=pid, boot_id=boot_id, pid_namespace=namespace, start_ticks=start_ticks)
        return cls(host=host, pid=pid, boot_id="", pid_namespace="", start_ticks=0)

    def certainly_dead(self) -> bool:
        """Whether this very process has ended; False whenever that cannot be known from here."""
        here = ProcessIdentity.of_this_process()
        # Clones of one virtual machine share their boot id, but seldom their name.
        place = (self.host, self.boot_id, self.pid_namespace)
        if not self.boot_id or place != (here.host, here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass
        except ProcessLookupError:
            return True
        # A /proc that hides the processes of other users shows nothing here, which proves nothing.
        with suppress(OSError):
            stat = _stat(self.pid)
            # A zombie, or dead.
            return stat[_STATE] in b"ZXx" or int(stat[_START]) != self.start_ticks
        return False


def _stat(pid: int) -> list[bytes]:
    """What `/proc/PID/stat` says after the process's name, which may itself hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()

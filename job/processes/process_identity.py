"""The identity of a process on a machine, by which another process can prove that it is dead."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

_STATE, _START = 0, 19
"""Fields 3 and 22 of `/proc/PID/stat` (proc_pid_stat(5)), counted from the end of the process's name."""


class ProcessIdentity(BaseModel):
    """A process, as a later process of the same machine recognises it.

    Without `/proc`, or with that of another PID namespace, `boot_id` and `pid_namespace` are empty, and the process
    always counts as alive.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int = Field(ge=1, lt=2**31)
    boot_id: str
    """A random number that the kernel draws when it starts."""
    pid_namespace: str
    """`pid:[INODE]`: in another namespace the same number means another process."""
    start_ticks: int = Field(ge=0)
    """The start of the process, in clock ticks since that of the machine: a process that reuses `pid` has another."""

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        """Returns the identity of the calling process."""
        host, pid = socket.gethostname(), os.getpid()
        with suppress(OSError):
            # A container with its host's /proc would look up its own numbers among the host's.
            if Path("/proc/self").readlink() == Path(str(pid)):
                start_ticks = int(_stat(pid)[_START])
                namespace = str(Path("/proc/self/ns/pid").readlink())
                boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                return cls(host=host, pid=pid, boot_id=boot_id, pid_namespace=namespace, start_ticks=start_ticks)
        return cls(host=host, pid=pid, boot_id="", pid_namespace="", start_ticks=0)

    def certainly_dead(self) -> bool:
        """Returns whether this very process has ended; False if that cannot be known from here."""
        here = ProcessIdentity.of_this_process()
        # Clones of a virtual machine share their boot id, but seldom their host name.
        place = (self.host, self.boot_id, self.pid_namespace)
        if not self.boot_id or place != (here.host, here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass
        except ProcessLookupError:
            return True
        # A /proc may hide the processes of other users, which proves nothing.
        with suppress(OSError):
            stat = _stat(self.pid)
            # A zombie, or dead.
            return stat[_STATE] in b"ZXx" or int(stat[_START]) != self.start_ticks
        return False


def _stat(pid: int) -> list[bytes]:
    """Returns the fields of `/proc/PID/stat` after the process's name, which may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()

"""The only module that asks which system this is: what Linux has alone, and what takes its place on others.

It imports nothing of this package, so that every room may import it. Code beside it may look for a path, such as one
below `/proc`, if it copes without.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

WSL = "https://learn.microsoft.com/windows/wsl/install"
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""The file that holds a container's `QUOTA PERIOD` in microseconds (docs.kernel.org/admin-guide/cgroup-v2.html)."""
PARENT_POLL_SECONDS = 0.5
"""How often a process looks for its parent where the kernel sends no signal at the parent's end."""

_PR_SET_PDEATHSIG = 1
_ZEROS = bytes(1 << 20)


def check_system() -> None:
    """Ends the process with a line about WSL on Windows, which lacks what the program is built on.

    Raises:
        SystemExit: this is Windows; the code is that of a bad request.
    """
    if sys.platform == "win32":
        print(f"ddpm: it does not run on Windows itself: use WSL ({WSL})", file=sys.stderr)
        raise SystemExit(64)


def boot_clock() -> float:
    """Returns the seconds of a clock that never jumps, counts the time asleep, and is the same in all processes.

    macOS has no CLOCK_BOOTTIME: there CLOCK_MONOTONIC_RAW goes on while the machine sleeps (clock_gettime(3)), and
    `time.monotonic` stands still, as on Linux.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", None) or time.CLOCK_MONOTONIC_RAW)


def system_version() -> str:
    """Returns the system and its version, on which the kernels of an Apple GPU depend."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"


def usable_cores() -> int:
    """Returns the number of cores that this process may use at once: its affinity, or its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Without a limit the quota is the word "max".
    with suppress(OSError, ValueError):
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def shared_memory(size_bytes: int) -> int:
    """Returns the descriptor of zeros that processes which inherit it share; elsewhere than on Linux of a file."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ddpm")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    # A page without memory or disk would cause SIGBUS later.
    allocate(descriptor, size_bytes)
    return descriptor


def allocate(descriptor: int, size_bytes: int) -> None:
    """Makes a file at least so long, with blocks of the disk for all of it: a sparse one could cause SIGBUS.

    macOS has no posix_fallocate, and gets zeros after what the file holds.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)
        return
    while (left := size_bytes - os.fstat(descriptor).st_size) > 0:
        os.pwrite(descriptor, _ZEROS[:left], size_bytes - left)


def end_with_parent(number: int) -> None:
    """Lets this process get a signal when its parent ends; call it in the main thread.

    Linux sends the signal when the thread ends that started this process. Elsewhere a thread looks for another parent:
    the end may come half a second later, and waits for native code that holds the interpreter's lock.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()

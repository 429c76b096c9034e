"""What takes the place of Linux's own functions, and every command without them, as on macOS."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job import platform
from job.coordination.lease import ProcessIdentity
from tests.job.command_line import ddpm, environment, refused, settings, succeeded
from tests.job.hooked import hooked
from tests.job.launching import children, eventually, is_gone, ready_pids, start

ONLY_LINUX = {os: ("memfd_create", "posix_fallocate", "sched_getaffinity"), time: ("CLOCK_BOOTTIME",)}
WITHOUT = """
def without(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

without(os, "memfd_create", "posix_fallocate", "sched_getaffinity")
without(time, "CLOCK_BOOTTIME")
# What asks for Linux's functions by the name of the system finds none either.
readlink, CDLL = os.readlink, ctypes.CDLL

def no_proc(path, *args, **options):
    if str(path).startswith("/proc/"):
        raise FileNotFoundError(path)
    return readlink(path, *args, **options)

class NoPrctl(CDLL):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)

os.readlink, ctypes.CDLL = no_proc, NoPrctl
"""


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """Variables of processes that lack what only Linux has."""
    return {"PYTHONPATH": hooked(tmp_path / "hooks", job__platform=WITHOUT)}


@pytest.fixture(params=[False, True], ids=["Linux", "elsewhere"])
def here(request, monkeypatch) -> bool:
    """Whether this process lacks it."""
    if sys.platform != "linux" and not request.param:
        pytest.skip("this system lacks it")
    for module, names in ONLY_LINUX.items() if request.param else ():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    return request.param


@pytest.mark.slow
def test_every_command_runs_without_what_only_linux_has(tmp_path, elsewhere):
    """Also the resumed training, whose lease cannot know that its holder is dead: the lease expires."""
    source = Path(platform.__file__).parent / "datasets/landscape-sample.zip"
    place = ("--bucket", tmp_path / "bucket")
    variables = {**elsewhere, "DDPM_CACHE": str(tmp_path / "cache")}
    train = ("train", "--dataset", "tiles", "--run", "a", *place, *settings(), "--processes", 2, "--stop-after", "1h")
    evaluate = ("--extractor", "mobilenet", "--count", 12, "--references", 24, "--metrics", "fid")
    commands = (
        ("data", "pack", source, "tiles", "--size", 16, *place),
        (*train, "--epochs", 1),
        (*train, "--epochs", 2),
        ("sample", "--run", "a", *place, "--processes", 2),
        ("evaluate", "--run", "a", *place, *evaluate),
        ("submit", "sample", "--run", "a", *place, "--seeds", "4-7"),
        ("runs", "show", "a", *place),
        ("runs", "verify", "a", *place),
        ("export", "--run", "a", *place, "--to", tmp_path / "exported"),
        ("data", "verify", "tiles", *place),
        ("config", "--list"),
        ("doctor", *place),
    )
    for words in commands:
        succeeded(ddpm(*words, **variables))
    asks = "from job.coordination.lease import ProcessIdentity as P; print(P.of_this_process().model_dump_json())"
    asked = subprocess.run([sys.executable, "-c", asks], env=environment(**elsewhere), capture_output=True, check=True)
    # It has ended, and nobody can know that.
    gone = ProcessIdentity.model_validate_json(asked.stdout)
    assert (gone.boot_id, gone.certainly_dead()) == ("", False)


def test_ranks_end_with_a_killed_launcher(tmp_path, monkeypatch, elsewhere):
    monkeypatch.setenv("PYTHONPATH", elsewhere["PYTHONPATH"])
    child = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)")
    ranks = ready_pids(tmp_path)
    assert sorted(ranks) == sorted(children(child.pid))
    child.kill()
    child.wait()
    eventually(lambda: all(map(is_gone, ranks)))


def test_cores_and_clock(here, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "CPU_LIMIT", tmp_path / "none")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert (platform.usable_cores() == 64) == here
    other = "import time; print(time.clock_gettime(time.{}))".format(
        "CLOCK_MONOTONIC_RAW" if here else "CLOCK_BOOTTIME"
    )
    before = platform.boot_clock()
    between = float(subprocess.run([sys.executable, "-c", other], capture_output=True, check=True).stdout)
    assert before < between < platform.boot_clock()


@pytest.mark.parametrize(("holds", "size_bytes"), [(b"", 3 << 20), (b"kept", 5000), (b"longer", 3)])
def test_allocated_files_have_blocks(here, tmp_path, holds, size_bytes):
    path = tmp_path / "file"
    path.write_bytes(holds)
    # As the cache opens it, which goes on with a file that an earlier process left.
    with path.open("ab") as file:
        platform.allocate(file.fileno(), size_bytes)
    assert path.read_bytes() == holds.ljust(size_bytes, b"\0")
    assert path.stat().st_blocks * 512 >= size_bytes


def test_a_full_disk_is_an_error_and_no_signal(here, small_disk):
    with (small_disk / "file").open("ab") as file, pytest.raises(OSError, match="No space left"):
        platform.allocate(file.fileno(), 3 << 20)


def test_processes_share_memory(here):
    descriptor = platform.shared_memory(16)
    writes = f"import mmap; mmap.mmap({descriptor}, 0)[8:10] = b'hi'"
    subprocess.run([sys.executable, "-c", writes], pass_fds=[descriptor], check=True)
    assert mmap.mmap(descriptor, 0)[:] == bytes(8) + b"hi" + bytes(6)
    os.close(descriptor)


def test_windows_is_told_of_wsl():
    program = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; from job.__main__ import main; main()"
    how = {"capture_output": True, "text": True, "check": False}
    line = refused(subprocess.run([sys.executable, "-c", program, "--help"], **how), 64)
    assert line == f"ddpm: it does not run on Windows itself: use WSL ({platform.WSL})"


def test_nothing_else_asks_for_the_system():
    asks = re.compile(r"sys\.platform|mac_ver|memfd_create|posix_fallocate|sched_getaffinity|CLOCK_BOOT|prctl")
    checkout = Path(platform.__file__).parents[1]
    files = [path for room in ("job", "ddpm") for path in (checkout / room).rglob("*.py")]
    assert [path.name for path in files if asks.search(path.read_text())] == ["platform.py"]

"""Temporary folders, and what becomes of those of processes that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from job.exits import DiskFullError
from job.store import files
from job.store.files import scratch_folder

HOLD = """
import sys, time
from job.store.files import scratch_folder
with scratch_folder("save") as folder:
    (folder / "model.safetensors").write_bytes(b"1")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, which nobody has swept yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "_swept", set())
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def test_it_is_gone_at_the_end_whatever_happens(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder("pack") as folder:
        assert folder.parent == temporary
        (folder / "shard.tar").write_bytes(b"1")
        raise ZeroDivisionError
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_cleared_away_and_what_a_living_one_uses_is_not(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, left = holder()
    living, used = holder()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    theirs = temporary / "ddpm-notes"
    theirs.mkdir()
    link = temporary / "ddpm-tmp-link"
    link.symlink_to(theirs)
    with scratch_folder("save"), scratch_folder("save"):
        assert not left.exists()
        assert (used / "model.safetensors").exists()
        # A process that begins now finds three that are in use.
        monkeypatch.setattr(files, "_swept", set())
        with scratch_folder("save"):
            assert len(list(temporary.glob("ddpm-tmp-save-*"))) == 4
    living.kill()
    living.wait()
    assert theirs.is_dir()


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(DiskFullError, match="set TMPDIR"), scratch_folder("save"):
        pass

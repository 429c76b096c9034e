"""A bucket with a small dataset, and real commands that train on it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from job.runs.checkpoints import list_checkpoints
from job.store import Store, open_store
from tests.job.command_line import DDPM, settings, started
from tests.job.launching import eventually

Process = subprocess.Popen[str]
Words = tuple[str, ...]
ON_AND_ON = ("--epochs", 10_000, "--set", "checkpoint.every_minutes=0.005")


class Place:
    """The bucket, shared by all tests of this folder; each has runs of its own.

    Attributes:
        bucket: a folder, with the dataset `tiles`.
    """

    def __init__(self, tiles: Path, folder: Path) -> None:
        self.bucket, self._cache = folder / "bucket", folder / "cache"
        shutil.copytree(tiles, self.bucket)

    def run(self, name: str) -> Store:
        """The folder of a run."""
        return open_store(str(self.bucket)).sub(f"runs/{name}")

    def started(self, run: str, *words: object, program: Words = (DDPM,), **variables: str) -> Process:
        """A command that trains."""
        options = ("train", "--dataset", "tiles", "--run", run, "--bucket", self.bucket, *settings(), *words)
        return started(*options, program=program, DDPM_CACHE=str(self._cache), **variables)

    def begun(self, run: str, *words: object, program: Words = (DDPM,), **variables: str) -> Process:
        """One that goes on and on, as soon as it has committed a checkpoint."""
        process = self.started(run, *ON_AND_ON, *words, program=program, **variables)
        eventually(lambda: list_checkpoints(self.run(run)) or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        return process


@pytest.fixture(scope="session")
def place(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tiles, tmp_path_factory.mktemp("place"))

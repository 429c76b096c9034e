"""The image, built once for all tests of this folder, which `make test-containers` runs and nobody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.containers.podman import IMAGE, build_image, podman, settings
from tests.job.command_line import ddpm, succeeded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.containers)


@pytest.fixture(scope="session", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real Dockerfile's image; podman finds its settings in the environment of all that the tests start."""
    base = tmp_path_factory.getbasetemp()
    built = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "image-is-built"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings().items():
            patch.setenv(name, value)
        for name in ("DDPM_BUCKET", "DDPM_TARGETS", "TORCH"):
            patch.delenv(name, raising=False)
        # By the first of the test processes.
        with FileLock(f"{built}.lock"):
            if not built.exists():
                # What failed tests left behind.
                podman("pod", "rm", "--all", "--force", "--time", "0", check=False)
                podman("rm", "--all", "--force", "--time", "0", check=False)
                podman("volume", "rm", "--all", "--force", check=False)
                build_image()
                built.touch()
        yield IMAGE


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with the embedded images at 16 pixels."""
    bucket = tmp_path_factory.mktemp("packed") / "bucket"
    succeeded(ddpm("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", bucket))
    return bucket


@pytest.fixture
def place(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that bucket, in a working folder whose targets run the image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets.yaml").write_text(f"container:\n  image: {IMAGE}\n  env: {{OMP_NUM_THREADS: '1'}}\n")
    return Path(shutil.copytree(packed, tmp_path / "bucket"))

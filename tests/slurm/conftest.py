"""The cluster, once for all tests of this folder, and a bucket with images that its nodes see."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.runs import training
from tests.job.command_line import ddpm_here, succeeded
from tests.slurm.cluster import Cluster

NASTY = "a b'\"$(touch pwned);%j"
"""A folder whose name no shell may read."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            # All tests share the cluster and the undisturbed run, whose time is not the first one's.
            item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")).running() as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.variables.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture(scope="session")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder, and all its targets on the cluster; the bucket in it has the embedded images at 16 pixels."""
    folder = tmp_path_factory.mktemp("work")
    usual = {
        "backend": "slurm",
        "folder": f"{folder}/{NASTY}/output",
        "venv": str(Path(sys.executable).parents[1]),
        "bucket": f"{folder}/{NASTY}/bucket",
        "scratch": f"{folder}/cache-$SLURM_JOB_PARTITION",
        "gpus": 0,
        "cpus": 1,
        "env": {"OMP_NUM_THREADS": "1"},
    }
    targets = {
        "low": usual | {"partition": "low"},
        "first": usual | {"partition": "first"},
        "brief": usual | {"max_hours": 0.017},
        "too-long": usual | {"partition": "short"},
        "too-many": usual | {"gpus": 3, "gpu_type": "a100"},
        "no-driver": usual | {"gpus": 1, "gpu_type": "a100", "max_hours": 0.1},
        "elsewhere": usual | {"venv": f"{folder}/nothing"},
    }
    (folder / "targets.yaml").write_text(json.dumps(targets))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DDPM_TARGETS", raising=False)
        patch.setenv("DDPM_CACHE", f"{folder}/cache")
        succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", usual["bucket"]))
        yield folder


@pytest.fixture(scope="session")
def bucket(folder: Path) -> str:
    return f"{folder}/{NASTY}/bucket"


@pytest.fixture(scope="session")
def undisturbed(bucket: str) -> str:
    """A run that nothing stopped, on this machine."""
    succeeded(ddpm_here(*training("undisturbed", bucket)))
    return "undisturbed"

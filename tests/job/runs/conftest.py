"""Whole runs, to be damaged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from job.coordination import lease
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.runs import metric_rows, outlook, records, retention
from job.runs.checkpoints import list_checkpoints
from job.runs.layout import ObjectKind
from job.runs.retention import Reader
from job.store import Store, open_store
from tests.job.command_line import ddpm_here, succeeded
from tests.job.conftest import MadeOnce
from tests.job.launching import QUICK
from tests.job.runs.leased import train


@pytest.fixture(scope="session")
def bucket(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `r` of four checkpoints by two attempts, with images, averages and readers; how it goes on; a sister."""
    return shutil.copytree(made_once("whole-runs", _fill), tmp_path_factory.mktemp("rot") / "bucket")


def _fill(folder: Path) -> None:
    folder.mkdir()
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(folder)), PackRequest(str(source), "tiles", size=8))
    succeeded(train(folder, "other", 1, train__seed="5"))
    for epochs in (2, 4):
        succeeded(train(folder, "r", epochs))
    shutil.copytree(folder / "runs" / "r", folder / "runs" / "undisturbed")
    succeeded(train(folder, "undisturbed", 5))
    succeeded(ddpm_here("sample", "--run", "r", "--grid", "found", "--count", 20, "--bucket", folder))
    succeeded(ddpm_here("ema", "--run", "r", "--std", 0.2, "--checkpoints", "1,4", "--bucket", folder))
    few = ("--count", 12, "--references", 12, "--extractor", "mobilenet")
    succeeded(ddpm_here("evaluate", "--run", "r", "--bucket", folder, *few))
    run = open_store(str(folder)).sub("runs/r")
    for number, ref in enumerate(list_checkpoints(run)[:2]):
        reader = Reader(checkpoint=ref.key, until=time.time() + 3600)
        run.create(ObjectKind.READER.key(checkpoint=ref, unique=f"{number:032x}"), reader.to_json())


@pytest.fixture(scope="session")
def store(bucket: Path) -> Store:
    return open_store(str(bucket))


@pytest.fixture(scope="session")
def run(store: Store) -> Store:
    return store.sub("runs/r")


@pytest.fixture
def new_run(tmp_path: Path) -> Store:
    """One in a folder."""
    return open_store(str(tmp_path)).sub("runs/r")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process renews and looks often, and waits for the real expiry."""
    for name, value in QUICK.items():
        monkeypatch.setattr(lease, name, value)


@pytest.fixture
def any_run(bucket_uri: str) -> Store:
    """An empty run in each kind of bucket."""
    return open_store(bucket_uri).sub("runs/r")


@pytest.fixture(scope="session")
def keys(run: Store) -> list[str]:
    return [entry.key for entry in run.list()]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The notes of saving, from any thread; a test that expects one takes it out."""
    said: list[str] = []
    for module in (metric_rows, outlook, records, retention):
        monkeypatch.setattr(module, "note", said.append)
    yield said
    assert said == []

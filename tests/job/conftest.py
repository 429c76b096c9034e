"""What many tests begin with: images at 16 pixels, and a run that has learnt a little from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
from filelock import FileLock

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.store import open_store, retry
from tests import servers
from tests.conftest import new_bucket
from tests.faulty_proxy import FaultyProxy
from tests.job.command_line import ddpm_here, settings, succeeded


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of this test process and its children."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(folder))
        yield folder


@pytest.fixture(params=servers.KINDS)
def remote_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`gs://NAME` and so on, fresh and empty, on a real server."""
    return new_bucket(request.param, request, monkeypatch, tmp_path)


@pytest.fixture
def proxy(remote_bucket: str, started: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What lies between that bucket and its clients, who lose a second with a silent connection, and try again soon."""
    limits = {"FIRST_PAUSE_SECONDS": 0.05, "LONGEST_PAUSE_SECONDS": 0.2, "SILENCE_SECONDS": 1.0}
    for name, seconds in limits.items():
        monkeypatch.setattr(retry, name, seconds)
    with FaultyProxy(started(remote_bucket.partition("://")[0])) as proxy:
        point_at(proxy.url, monkeypatch)
        yield proxy


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all clients of buckets look for their server at this address."""
    for server in servers.SERVERS.values():
        for name, value in server.variables(url).items():
            monkeypatch.setenv(name, value)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Gives a folder that the first of the test processes fills and the others find; not to be changed."""

    def made_once(name: str, fill: Callable[[Path], object]) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                half = folder.with_suffix(".half")
                fill(half)
                half.rename(folder)
        return folder

    return made_once


@pytest.fixture(scope="session")
def tiles(made_once: MadeOnce) -> Path:
    """A local bucket with the embedded images as dataset `tiles`, 299 at 16 pixels; not to be changed."""
    source = resources.files("job") / "datasets" / "landscape-sample.zip"

    def fill(folder: Path) -> None:
        folder.mkdir()
        pack(open_store(str(folder)), PackRequest(str(source), "tiles", 16))

    return made_once("tiles", fill)


@pytest.fixture(scope="session")
def walked(tiles: Path, made_once: MadeOnce) -> Path:
    """The same with a run `walk` of three epochs, of which the first and the last are kept; not to be changed."""
    kept = {"checkpoint__keep_last": "1", "checkpoint__keep_epochs": "1", "sample__nearest": "false"}
    kept |= {"ema__stds": "0.1", "ema__snapshot_epochs": "1"}
    sets = settings(train__learning_rate="0.01", train__warmup_images="0", **kept)

    def fill(folder: Path) -> None:
        shutil.copytree(tiles, folder)
        words = ("--dataset", "tiles", "--run", "walk", "--bucket", folder, "--epochs", 3)
        succeeded(ddpm_here("train", *words, *sets))

    return made_once("walked", fill)


@pytest.fixture
def bucket(walked: Path, tmp_path: Path) -> Path:
    """A copy of `walked`, for one test."""
    return shutil.copytree(walked, tmp_path / "bucket")

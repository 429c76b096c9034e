"""Two nodes that reach each other over a network of their own, where the host's name leads nowhere."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from job.data.pack import pack
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import open_store
from tests.job.nodes import Nodes

pytestmark = pytest.mark.containers
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, and nothing else."""
    mark = secrets.token_hex(3)
    names = (f"ddpm-{mark}-0", f"ddpm-{mark}-1")
    ends = (f"d{mark}a", f"d{mark}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def test_two_nodes_meet_and_train(tmp_path: Path, namespaces: tuple[str, str]) -> None:
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(tmp_path / "bucket")), str(source), "tiles", size=16)
    nodes = Nodes(tmp_path, ADDRESSES[0], 29500, namespaces)
    together = nodes.together("walk", 2)
    assert [node.wait(200) for node in together] == [0, 0], nodes.said(together)
    run = open_store(str(nodes.bucket)).sub("runs/walk")
    assert load_manifest(run, max(list_checkpoints(run))).world_size == 2

"""Two nodes that reach each other over a network of their own, where the host's name leads nowhere."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from job.data.pack import PackRequest, pack
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import open_store
from tests.job.nodes import Nodes

ADDRESSES = ("192.168.77.1", "192.168.77.2")


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


@pytest.fixture
def named(namespaces: tuple[str, str]) -> Iterator[str]:
    """A name of node 0, which is a loopback address to itself, as Debian writes it into /etc/hosts."""
    for namespace, address in zip(namespaces, ("127.0.1.1", ADDRESSES[0]), strict=True):
        folder = Path("/etc/netns") / namespace
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} node0\n")
    ip("-n", namespaces[0], "route", "add", "default", "via", ADDRESSES[1])
    yield "node0"
    for namespace in namespaces:
        shutil.rmtree(Path("/etc/netns") / namespace)


def test_two_nodes_meet_by_name_and_train(tmp_path: Path, namespaces: tuple[str, str], named: str) -> None:
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(tmp_path / "bucket")), PackRequest(str(source), "tiles", size=16))
    nodes = Nodes(tmp_path, named, 29500, namespaces)
    together = nodes.together("walk", 2)
    assert [node.wait(200) for node in together] == [0, 0], nodes.said(together)
    run = open_store(str(nodes.bucket)).sub("runs/walk")
    assert load_manifest(run, max(list_checkpoints(run))).world_size == 2

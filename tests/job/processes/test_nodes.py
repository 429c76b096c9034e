"""Several nodes of one job, here launchers of one machine: who they are, and that they learn what one node does."""

from __future__ import annotations

import re
import signal
import socket
import time

import pytest

from job.exits import BadRequestError
from job.processes.group import Group
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.records import load_attempt
from tests.job.hooked import hooked
from tests.job.launching import eventually

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0.job", "MASTER_PORT": "1234"}


def test_the_environment_describes_the_group():
    group = Group.of(4, TWO)
    assert group == Group(4, nodes=2, node=1, address="node-0.job", port=1234)
    place = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert group.environment(1).items() >= (place | {"MASTER_ADDR": "node-0.job", "MASTER_PORT": "1234"}).items()
    # A machine that is alone is told of no others.
    alone = Group.of(1, {"NODE_RANK": "7", "MASTER_ADDR": "elsewhere"}).environment(0)
    assert alone.keys() == {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"}
    assert Group.of(2, {}).address == "127.0.0.1"
    for named, wrong in {
        **{f"('{name}')": {key: TWO[key] for key in TWO if key != name} for name in TWO if name[0] != "N"},
        "('NODE_RANK')": {"NNODES": "2"},
        "(NODE_RANK=2, NNODES=2, MASTER_PORT=1234)": TWO | {"NODE_RANK": "2"},
        "'two')": {"NNODES": "two"},
    }.items():
        with pytest.raises(BadRequestError, match=f"invalid group .*{re.escape(named)}: with NNODES, set NODE_RANK"):
            Group.of(1, wrong)


def test_threads_follow_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("job.processes.group.CPU_LIMIT", tmp_path / "cpu.max")
    for limit, processes, threads in (
        ("", 2, 32),
        ("max 100000", 1, 64),
        ("850000 100000", 2, 4),
        ("50000 100000", 1, 1),
    ):
        (tmp_path / "cpu.max").write_text(limit)
        environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
        assert Group(processes).environment(0).items() >= environment.items()
    # A person knows better.
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Group(2).environment(1)["OMP_NUM_THREADS"] == "7"


@pytest.fixture
def together(place):
    """Starts a run on two nodes of one process each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])

    def together(run, epochs, *words, **more):
        variables = more | TWO | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = ("--epochs", epochs, "--set", "checkpoint.every_epochs=1", *words)
        return [place.started(run, *words, **variables | {"NODE_RANK": str(node)}) for node in range(2)]

    return together


def codes(nodes):
    """How they end, and what the first one said."""
    said = [node.communicate(timeout=120)[0] for node in nodes]
    return [node.returncode for node in nodes], said[0]


@pytest.mark.slow
def test_a_preempted_node_stops_all(place, together):
    run = place.run("walk")
    nodes = together("walk", 10_000)
    eventually(lambda: list_checkpoints(run), 200)
    nodes[1].send_signal(signal.SIGTERM)
    found, said = codes(nodes)
    assert found == [75, 75], said
    stopped_at = max(list_checkpoints(run)).images_seen
    epochs = stopped_at // 299 + 1
    alone = place.started("one-node", "--epochs", epochs, "--set", "checkpoint.every_epochs=1", "--processes", 2)
    found, said = codes([*together("walk", epochs), alone])
    assert found == [0, 0, 0], said
    newest = max(list_checkpoints(run))
    assert newest.images_seen > stopped_at
    runs = run, place.run("one-node")
    learnt = [load_manifest(each, max(list_checkpoints(each))) for each in runs]
    assert [load_attempt(each, there.fence).world_size for each, there in zip(runs, learnt, strict=True)] == [2, 2]
    first, second = ({file.name: file.sha256 for file in there.files} for there in learnt)
    assert first == second
    # One that dies ends the others.
    nodes = together("walk", 10_000)
    eventually(lambda: max(list_checkpoints(run)) > newest, 200)
    nodes[1].kill()
    found, said = codes(nodes)
    assert found[0] not in (0, 75), said


OPENS_SLOWLY = """
import os
def slowly(bucket, index, budget_bytes, stop, opened=open_cache):
    stop.sleep(24 * int(os.environ["NODE_RANK"]))
    return opened(bucket, index, budget_bytes, stop)

open_cache = slowly
"""


@pytest.mark.slow
def test_a_slow_node_is_waited_for(together, tmp_path):
    hooks = hooked(tmp_path / "hooks", job__data__reading__cache=OPENS_SLOWLY)
    found, said = codes(together("decodes", 1, "--hang-after", "12", PYTHONPATH=hooks))
    assert found == [0, 0], said


@pytest.mark.slow
def test_a_waiting_node_can_be_stopped(place, together):
    (waiting, other) = together("waits", 2)
    other.kill()
    # Long enough to have begun to wait.
    time.sleep(8)
    assert waiting.poll() is None, codes([waiting])
    waiting.send_signal(signal.SIGTERM)
    found, said = codes([waiting])
    assert found == [75], said
    assert not place.run("waits").exists("lease.json")
    began = time.monotonic()
    (waiting, other) = together("waits", 2, "--stop-after", "40s", "--hang-after", "20")
    other.kill()
    found, said = codes([waiting])
    assert found == [75], said
    assert 40 <= time.monotonic() - began < 50
    assert "stopped by its deadline (--stop-after) before it began" in said

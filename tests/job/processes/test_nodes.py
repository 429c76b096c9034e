"""Several nodes of one job, each with a launcher of its own: who they are, and that they learn what one node does."""

from __future__ import annotations

import signal
import socket
import time
from importlib import resources
from pathlib import Path

import pytest

from job.data.pack import PackRequest, pack
from job.exits import BadRequestError
from job.processes.group import PORT, Group, interface_to
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import open_store
from tests.job.leases import eventually
from tests.job.nodes import Nodes


def test_the_environment_says_who_a_node_is():
    spellings = [
        ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
        ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
        ("NNODES", "JOB_COMPLETION_INDEX", "MASTER_ADDR", ""),
    ]
    for names in spellings:
        environment = dict(zip(names, ("3", "2", "node-0.job", "1234"), strict=True))
        group = Group.of(4, environment)
        assert group == Group(4, nodes=3, node=2, address="node-0.job", port=1234 if names[3] else PORT)
        variables = group.environment(1)
        place = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "4"}
        assert variables | place == variables
    # A machine that is alone is told nothing.
    assert Group.of(1, {"NODE_RANK": "7", "MASTER_ADDR": "elsewhere"}).environment(0) == {}
    assert Group.of(2, {}).address == "127.0.0.1"


def test_what_makes_no_group_is_named():
    two = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}
    wrong = {
        "MASTER_ADDR is not set": {"NNODES": "2", "NODE_RANK": "0"},
        "NODE_RANK or JOB_COMPLETION_INDEX is not set": {"NNODES": "2", "MASTER_ADDR": "a"},
        "NODE_RANK='2': give a number from 0 to 1": two | {"NODE_RANK": "2"},
        "NNODES='0': give a number from 1 to 1024": {"NNODES": "0"},
        "NNODES='two'": {"NNODES": "two"},
        "NNODES='²'": {"NNODES": "²"},
        "NNODES='1025'": {"NNODES": "1025"},
        "MASTER_PORT='65536'": two | {"MASTER_PORT": "65536"},
    }
    for named, environment in wrong.items():
        with pytest.raises(BadRequestError, match=named):
            Group.of(1, environment)


def test_the_interface_that_leads_to_a_node():
    assert [interface_to(address) for address in ("127.0.0.1", "localhost", "nowhere.invalid")] == ["lo", "lo", ""]


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(tmp_path / "bucket")), PackRequest(str(source), "tiles", size=16))
    return Nodes(tmp_path, "127.0.0.1", port)


@pytest.mark.slow
def test_two_nodes_learn_to_the_bit_what_two_processes_of_one_do(nodes):
    one = nodes.alone("alone", 2)
    two = nodes.together("together", 2)
    assert [node.wait(120) for node in two] == [0, 0], nodes.said(two)
    assert one.wait(120) == 0
    runs = [open_store(str(nodes.bucket)).sub(f"runs/{name}") for name in ("alone", "together")]
    manifests = [load_manifest(run, max(list_checkpoints(run))) for run in runs]
    assert [manifest.world_size for manifest in manifests] == [2, 2]
    alone, together = ({file.name: file.sha256 for file in manifest.files} for manifest in manifests)
    assert alone == together


@pytest.mark.slow
def test_a_node_that_is_preempted_stops_all_and_they_go_on_together(nodes):
    run = open_store(str(nodes.bucket)).sub("runs/walk")
    together = nodes.together("walk", 10_000)
    eventually(lambda: list_checkpoints(run), 200)
    together[1].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in together] == [75, 75], nodes.said(together)
    stopped_at = max(list_checkpoints(run)).images_seen
    together = nodes.together("walk", stopped_at // 299 + 1)
    assert [node.wait(60) for node in together] == [0, 0], nodes.said(together)
    assert max(list_checkpoints(run)).images_seen > stopped_at
    # One that dies ends the others.
    together = nodes.together("walk", 10_000)
    newest = max(list_checkpoints(run))
    eventually(lambda: max(list_checkpoints(run)) > newest, 200)
    together[1].kill()
    assert together[0].wait(60) not in (0, 75), nodes.said(together)


@pytest.mark.slow
def test_a_node_that_waits_for_another_can_be_stopped_keeps_to_its_deadline_and_is_not_taken_for_hung(nodes):
    (waiting, other) = nodes.together("walk", 2)
    other.kill()
    other.wait()
    # Long enough to have begun to wait.
    time.sleep(8)
    assert waiting.poll() is None, nodes.said([waiting])
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(10) == 75, nodes.said([waiting])
    assert not (nodes.bucket / "runs/walk/lease.json").exists()
    began = time.monotonic()
    (waiting, other) = nodes.together("walk", 2, "--stop-after", "40s", "--hang-after", "20")
    other.kill()
    other.wait()
    assert waiting.wait(70) == 75, nodes.said([waiting])
    assert 40 <= time.monotonic() - began < 50
    assert "stopped by its deadline (--stop-after) before it began" in nodes.said([waiting])

"""What the processes of a run tell each other: two real ones, over gloo, under the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.exits import BucketAwayError
from tests.job.launching import start

RANK = """
from job.processes import compute
from job.exits import BucketAwayError
from job.processes.ranks import Ranks
import json

from job.stop import Stop

class CountingStop(Stop):
    asked = 0
    def __call__(self):
        self.asked += 1
        return super().__call__()

stop = CountingStop()
ranks = Ranks(compute.build_accelerator("fp32"), stop)
told = {"places": [ranks.rank, ranks.world_size, ranks.is_main]}
def away():
    raise BucketAwayError("the bucket is away")
class Unspeakable(Exception):
    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()
def unspeakable():
    raise Unspeakable("a lock cannot be sent")
def slow():
    time.sleep(1)
    return {"by": ranks.rank, "numbers": list(range(1000))}
for name, work in (("away", away), ("unspeakable", unspeakable)):
    try:
        ranks.on_main(work)
    except Exception as error:
        told[name] = [type(error).__name__, str(error), getattr(error, "exit_code", 0)]
stop.asked = 0
told["slow"] = ranks.on_main(slow)
told["asked"] = stop.asked
told["not only the last"] = ranks.on_main(lambda: ranks.rank)
told["nothing"] = ranks.on_main(lambda: None)
Path(f"{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks has heard."""
    folder = tmp_path_factory.mktemp("ranks")
    child = start(folder, RANK)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 0, stderr
    return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_result_reaches_all(told: list[dict]) -> None:
    assert [there["places"] for there in told] == [[0, 2, True], [1, 2, False]]
    for there in told:
        assert there["slow"] == {"by": 0, "numbers": list(range(1000))}
        assert (there["not only the last"], there["nothing"]) == (0, None)


def test_an_error_reaches_all_with_its_exit_code(told: list[dict]) -> None:
    for there in told:
        assert there["away"] == ["BucketAwayError", "the bucket is away", BucketAwayError.exit_code]


def test_an_error_that_cannot_be_sent_leaves_nobody_waiting(told: list[dict]) -> None:
    main, other = told
    assert main["unspeakable"][:2] == ["Unspeakable", "a lock cannot be sent"]
    assert other["unspeakable"][0] == "RuntimeError"
    assert "cannot tell what came of it" in other["unspeakable"][1]


def test_waiting_for_the_main_process_asks_whether_to_stop(told: list[dict]) -> None:
    # At every fiftieth of a second; a busy machine gets round to fewer.
    assert told[1]["asked"] > 20

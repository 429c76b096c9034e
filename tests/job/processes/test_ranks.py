"""What the processes of a run tell each other: two real ones, over gloo, under the launcher."""

from __future__ import annotations

import json

import pytest

from job.exits import BucketAwayError
from job.processes.ranks import Agreement
from tests.job.launching import start

RANK = """
from job.exits import BucketAwayError
from job.processes.ranks import Agreement, meet
from job.stop import Stop
import json
import torch.distributed as dist

class CountingStop(Stop):
    asked = 0
    def __call__(self):
        self.asked += 1
        return super().__call__()
class Unspeakable(Exception):
    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()
def away():
    raise BucketAwayError("the bucket is away")
def unspeakable():
    raise Unspeakable("a lock cannot be sent")
def slow():
    time.sleep(1)
    return {"by": ranks.rank, "numbers": list(range(1000))}

stop = CountingStop()
ranks = meet(stop)
told = {"places": [ranks.rank, ranks.world_size, ranks.is_main], "sum": ranks.sum(10 + rank, 1)}
for name, work in (("away", away), ("unspeakable", unspeakable)):
    try:
        ranks.on_main(work)
    except Exception as error:
        told[name] = [type(error).__name__, str(error), getattr(error, "exit_code", 0)]
stop.asked = 0
told["slow"] = ranks.on_main(slow)
told["asked"] = stop.asked
told["last"] = ranks.on_main(lambda: ranks.rank)

agreement = Agreement(2, flags=2)
agreed = [agreement.finish()]
for step in range(6):
    agreed.append(agreement.exchange(rank == 1 and step == 2, rank == 0 and step >= 4))
agreed += [agreement.finish(), agreement.finish()]
# Who is ahead does not wait: the exchange of this step needs nobody yet.
dist.barrier()
if rank == 0:
    agreed.append(agreement.exchange(False, False))
    Path("ahead").touch()
else:
    while not Path("ahead").exists():
        time.sleep(0.01)
    agreed.append(agreement.exchange(True, False))
agreed.append(agreement.finish())
told["agreed"] = agreed
Path(f"{rank}.json").write_text(json.dumps(told))
# As the program ends: at a normal exit the threads of gloo may abort the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks has heard."""
    folder = tmp_path_factory.mktemp("ranks")
    child = start(folder, RANK)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 0, stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_result_reaches_all(told):
    assert [there["places"] for there in told] == [[0, 2, True], [1, 2, False]]
    for there in told:
        assert there["sum"] == [21, 2]
        assert there["slow"] == {"by": 0, "numbers": list(range(1000))}
        assert there["last"] == 0


def test_an_error_reaches_all(told):
    for there in told:
        assert there["away"] == ["BucketAwayError", "the bucket is away", BucketAwayError.exit_code]
    # One that cannot be sent leaves nobody waiting.
    main, other = told
    assert main["unspeakable"][:2] == ["Unspeakable", "a lock cannot be sent"]
    assert other["unspeakable"][0] == "RuntimeError"
    assert "has a result that cannot be sent" in other["unspeakable"][1]


def test_waiting_asks_for_a_stop(told):
    # At every fiftieth of a second; a busy machine gets round to fewer.
    assert told[1]["asked"] > 20


def test_two_processes_agree_one_step_late(told):
    no, first, second = [False, False], [True, False], [False, True]
    expected = [no, no, no, no, first, no, second, second, no, no, first]
    assert [there["agreed"] for there in told] == [expected, expected]
    alone = Agreement(1, flags=2)
    assert (alone.exchange(True, False), alone.finish()) == ((True, False), (False, False))

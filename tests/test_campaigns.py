"""The judges of the program find what is broken on purpose, and nothing else: crashes, interleavings, mutants."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.crash_campaign.__main__ import plan_lanes
from benchmarks.crash_campaign.history import Ending, History, differences, lost_images
from benchmarks.crash_campaign.points import POINTS, SABOTAGES
from benchmarks.crash_campaign.processes import Event
from benchmarks.exploration.__main__ import explore, found_after, replay
from benchmarks.exploration.mutations import MUTATIONS
from benchmarks.exploration.scenarios import all_scenarios

ROOT = Path(__file__).parent.parent
MOST = 1200
"""Schedules until a mutation must have shown; three times what the slowest one takes."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_campaign_passes_and_reports_broken_protocol(tmp_path: Path):
    words = {
        "sound": ("--points", "manifest,launcher-upload-2", "--kills", "1", "--epochs", "4"),
        **{sabotage: ("--sabotage", sabotage, "--epochs", "4") for sabotage in SABOTAGES},
    }
    command = [sys.executable, "-m", "benchmarks.crash_campaign", "--json"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    campaigns = {
        name: subprocess.Popen([*command, tmp_path / name, *words[name]], cwd=ROOT, **streams) for name in words
    }
    said = {name: campaign.communicate() for name, campaign in campaigns.items()}
    assert "Traceback" not in "".join(errors for _, errors in said.values()), said
    assert [campaign.returncode for campaign in campaigns.values()] == [0, 1, 1], said
    report, broken, shifted = (json.loads((tmp_path / name).read_text()) for name in words)

    assert (report["kills"], report["failures"]) == (3, [])
    assert report["resumes"] >= 3
    assert report["lost_images"] == report["bad_checkpoints"] == 0
    assert report["repeated_images"] > 0, "nothing of the epoch before `launcher-upload-2` was saved"
    assert 0 < report["recovery_seconds_median"] <= report["recovery_seconds_worst"]
    assert len(report["lanes"]) == 2
    for lane in report["lanes"].values():
        assert len(lane["undisturbed_hash"]) == 64
        assert set(lane["hashes"]) == {lane["undisturbed_hash"]}
    assert "Nothing was lost." in said["sound"][0]

    (failure,) = broken["failures"]
    assert "is committed, but" in failure and failure in said["manifest-first"][0]
    assert failure.endswith("is missing, though its manifest is there")
    assert re.search(r"image \d+ \(pixels, noise, point\) is missing$", shifted["failures"][0])


def test_each_point_is_met_once():
    names = [point.name for point in POINTS]
    assert len(set(names)) == len(names)
    for seed in range(5):
        lanes = plan_lanes(list(POINTS), 100, seed)
        assert sorted(point.name for _, _, points, _ in lanes for point in points) == sorted(names)
        assert all(point.processes == processes for processes, _, points, _ in lanes for point in points)
        moments = [moment for _, _, _, moments in lanes for moment in moments]
        kinds = {(moment.action, moment.target, moment.at_once) for moment in moments}
        assert (len(moments), len(kinds)) == (100, 12)
        used = {(processes, dropout) for processes, dropout, _, some in lanes if some}
        assert used == {(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)}


def _step(fence: int, images_seen: int, *numbers: int, digest: str = "image") -> Event:
    images = [[number, f"{digest} {number}"] for number in numbers]
    return {"event": "step", "fence": fence, "images_seen": images_seen, "images": images}


def _restored(fence: int, *ref: int) -> Event:
    return {"event": "restored", "fence": fence, "ref": list(ref)}


def _rows(*places: int) -> list[dict[str, float]]:
    return [{"images_seen": place, "loss": place / 7, "learning_rate": 1e-3, "time": 0.5} for place in places]


UNDISTURBED = [_step(1, 2, 0, 1), _step(1, 4, 2, 3), _step(1, 6, 4, 5)]
HASHES = dict.fromkeys(("model", "ema", "optimizer"), "h")
ENDING = Ending((1, 6), HASHES, [[1.0], [2.0]], _rows(2, 4, 6), {"a.png": "p"})
BEFORE, RESTORED = UNDISTURBED[:1], _restored(2, 1, 2)
SHIFTED = [*BEFORE, RESTORED, _step(2, 4, 3, 4), _step(2, 6, 5, 6)]
DOUBLED = [*BEFORE, RESTORED, _step(2, 4, 1, 2), _step(2, 6, 3, 4, 5)]
REPAINTED = [*UNDISTURBED[:2], _restored(2, 1, 4), _step(2, 6, 4, 5, digest="x")]


def _problems(events: list[Event], ending: Ending) -> list[str]:
    return differences(History.of(events), ending, History.of(UNDISTURBED), ENDING)


def test_judge_follows_checkpoints_through_attempts():
    # The second attempt goes on from 2, not from the 4 that the first one reached without saving.
    killed = [*UNDISTURBED[:2], _restored(2, 1, 2), _step(2, 4, 2, 3), _restored(3, 2, 4), _step(3, 6, 4, 5)]
    ending = replace(ENDING, ref=(3, 6))
    history = History.of(killed)
    assert _problems(killed, ending) == []
    assert (lost_images(history, ending), history.repeated_images) == (0, 2)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (SHIFTED, "image 2 (pixels, noise, point) is missing"),
        (SHIFTED, "image 6 (pixels, noise, point) is beyond the undisturbed run"),
        (DOUBLED, "image 1 (pixels, noise, point) is there twice"),
        (REPAINTED, "image 4 (pixels, noise, point) is another, and 1 more"),
    ],
)
def test_judge_names_wrong_images(events, said):
    assert said in _problems(events, replace(ENDING, ref=(2, 6)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hashes": HASHES | {"optimizer": "g"}}, "the tensors of optimizer is another"),
        ({"rows": _rows(2, 6)}, "the metrics at 4 images is missing"),
        ({"rows": _rows(2, 4, 4, 6)}, "the metrics at 4 images is there twice"),
        ({"rows": _rows(2, 6, 4)}, "the metrics are in another order"),
        ({"rows": [*_rows(2, 4), _rows(6)[0] | {"learning_rate": 2e-3}]}, "the metrics at 6 images is another"),
        ({"loss_sums": [[1.0 + 1e-15], [2.0]]}, "the last manifest's loss sums is another"),
        ({"pictures": {}}, "picture a.png is missing"),
        ({"pictures": {"a.png": "q"}}, "picture a.png is another"),
        ({"pictures": {"a.png": "p", "b.png": "of `ddpm sample`"}}, None),
    ],
)
def test_judge_names_other_differences(change, said):
    assert _problems(UNDISTURBED, replace(ENDING, **change)) == [*filter(None, [said])]


def test_judge_compares_what_was_committed_on_the_way():
    commit = {"event": "commit", "fence": 1, "ref": [1, 2], "loss_sums": [[1.0]]}
    history, other = History.of([*UNDISTURBED, commit]), History.of([*UNDISTURBED, commit | {"loss_sums": [[2.0]]}])
    assert differences(history, ENDING, other, ENDING) == ["the loss sums committed at 2 images is another"]


def test_few_interleavings_hold():
    report = explore(["pack", "train"], 60, seed=1, processes=1)
    assert report.failed == []
    assert report.schedules.total() == 60
    assert sum(map(len, report.distinct.values())) > 35


def test_a_schedule_repeats_itself():
    first, again = replay("sample:4z25,20C"), replay("sample:4z25,20C")
    assert (first.violation, first.trace) == ("", again.trace)
    assert [step.number for step in first.trace if "suspended" in step.outcome or "killed" in step.outcome] == [4, 20]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", all_scenarios())
def test_interleavings_hold(scenario):
    report = explore([scenario], 500, seed=2, processes=1)
    assert [(failed.schedule, failed.violation) for failed in report.failed] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_found(mutation):
    count, found = found_after(mutation, list(MUTATIONS[mutation].scenarios), MOST, seed=1)
    assert found is not None, f"not in {count:,} schedules"
    # A schedule that fails without the mutation, too, would prove nothing.
    assert replay(found.schedule).violation == ""


TINY = """
def checked(x):
    if x < 0:
        raise ValueError
    return x

def in_child(x):
    return x + 5

def never(x):
    return x
"""
TESTS = """
import subprocess, sys
import pytest, tiny

def test_checked():
    assert tiny.checked(3) == 3
    with pytest.raises(ValueError):
        tiny.checked(-2)

def test_in_child():
    subprocess.run([sys.executable, "-c", "import tiny; assert tiny.in_child(2) == 7"], check=True)
"""


@pytest.mark.slow
def test_known_mutants_die_and_live(tmp_path):
    """The tests of a package of three functions miss some of their mutants."""
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "test_tiny.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def mutants(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.mutants", "tiny.py", "--tests", "test_tiny.py", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = mutants("--json", "before.json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "before.json").read_text())
    by_test = {(one["mutant"]["before"], one["mutant"]["after"], one["mutant"]["number"]): one["test"] for one in found}
    checked, in_child = "test_tiny.py::test_checked", "test_tiny.py::test_in_child"
    assert by_test == {
        ("x < 0", "(x <= 0)", 0): "",
        ("0", "1", 0): "",
        ("raise ValueError", "pass", 0): checked,
        ("return x", "return None", 0): checked,
        ("return x + 5", "return None", 0): in_child,
        ("x + 5", "(x - 5)", 0): in_child,
        ("5", "6", 0): in_child,
        ("return x", "return None", 1): "",
    }
    assert "5 of 8 mutants were noticed" in done.stdout
    assert (tmp_path / "tiny.py").read_text() == TINY

    (tmp_path / "one.json").write_text(json.dumps([one for one in found if one["mutant"]["after"] == "pass"]))
    assert mutants("--like", "one.json").returncode == 0
    (tmp_path / "test_tiny.py").write_text(TESTS.replace("with pytest.raises(ValueError):", "if False:"))
    done = mutants("--like", "one.json")
    assert done.returncode == 1
    assert "WEAKER: tiny.py: 'raise ValueError' -> 'pass'" in done.stdout

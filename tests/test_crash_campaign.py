"""The crash campaign in small: two points and a random kill, a protocol broken on purpose, and its judge by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.crash_campaign.__main__ import Request, plan_lanes
from benchmarks.crash_campaign.history import Ending, History, differences, lost_images
from benchmarks.crash_campaign.points import POINTS, SABOTAGES
from benchmarks.crash_campaign.processes import Event

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_campaign_passes_and_reports_broken_protocol(tmp_path: Path):
    words = {
        "sound": ("--points", "upload-2,manifest", "--kills", "1", "--epochs", "4"),
        "broken": ("--sabotage", "manifest-first", "--epochs", "4"),
    }
    command = [sys.executable, "-m", "benchmarks.crash_campaign", "--json"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    campaigns = {
        name: subprocess.Popen([*command, tmp_path / name, *words[name]], cwd=ROOT, **streams) for name in words
    }
    said = {name: campaign.communicate() for name, campaign in campaigns.items()}
    assert "Traceback" not in said["sound"][1] + said["broken"][1], said
    report, broken = (json.loads((tmp_path / name).read_text()) for name in words)

    assert campaigns["sound"].returncode == 0, said
    assert (report["kills"], report["failures"]) == (3, [])
    assert report["resumes"] >= 3
    assert report["lost_images"] == report["bad_checkpoints"] == 0
    assert report["repeated_images"] > 0, "nothing of the epoch before `upload-2` was saved"
    assert 0 < report["recovery_seconds_median"] <= report["recovery_seconds_worst"]
    (lane,) = report["lanes"].values()
    assert len(lane["undisturbed_hash"]) == 64
    assert set(lane["hashes"]) == {lane["undisturbed_hash"]}
    assert "Nothing was lost." in said["sound"][0]

    assert campaigns["broken"].returncode == 1, said
    (failure,) = broken["failures"]
    assert "is committed, but" in failure and failure in said["broken"][0]
    assert failure.endswith("is missing, though its manifest is there")


def test_each_point_is_met_once():
    names = [point.name for point in POINTS]
    assert len(set(names)) == len(names)
    assert {name for names in SABOTAGES.values() for name in names} <= set(names)
    for seed in range(5):
        lanes = plan_lanes(Request(kills=100, seed=seed, epochs=10, points=()))
        assert sorted(point.name for _, _, points, _ in lanes for point in points) == sorted(names)
        assert [point.processes == processes for processes, _, points, _ in lanes for point in points]
        moments = [moment for _, _, _, moments in lanes for moment in moments]
        kinds = {(moment.action, moment.target, moment.at_once) for moment in moments}
        assert (len(moments), len(kinds)) == (100, 12)
        assert {(processes, dropout) for processes, dropout, _, some in lanes if some} == {
            (1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1),
        }  # fmt: skip


def _step(fence: int, images_seen: int, *numbers: int, digest: str = "image") -> Event:
    images = [[number, f"{digest} {number}"] for number in numbers]
    return {"event": "step", "fence": fence, "images_seen": images_seen, "images": images}


def _restored(fence: int, *ref: int) -> Event:
    return {"event": "restored", "fence": fence, "ref": list(ref)}


def _rows(*places: int) -> list[dict[str, float]]:
    return [{"images_seen": place, "loss": place / 7, "learning_rate": 1e-3, "time": 0.5} for place in places]


UNDISTURBED = [_step(1, 2, 0, 1), _step(1, 4, 2, 3), _step(1, 6, 4, 5)]
ENDING = Ending(
    (1, 6), dict.fromkeys(("model", "ema", "optimizer"), "h"), [[1.0], [2.0]], _rows(2, 4, 6), {"a.png": "p"}
)


def _problems(events: list[Event], ending: Ending) -> list[str]:
    return differences(History.of(events), ending, History.of(UNDISTURBED), ENDING)


def test_judge_follows_checkpoints_through_attempts():
    # The second attempt goes on from 2, not from the 4 that the first one reached without saving.
    killed = [*UNDISTURBED[:2], _restored(2, 1, 2), _step(2, 4, 2, 3), _restored(3, 2, 4), _step(3, 6, 4, 5)]
    ending = replace(ENDING, ref=(3, 6))
    history = History.of(killed)
    assert _problems(killed, ending) == []
    assert (lost_images(history, ending), history.repeated_images) == (0, 2)


def test_judge_names_wrong_images():
    killed, restored = UNDISTURBED[:1], _restored(2, 1, 2)
    shifted = [*killed, restored, _step(2, 4, 3, 4), _step(2, 6, 5, 6)]
    doubled = [*killed, restored, _step(2, 4, 1, 2), _step(2, 6, 3, 4, 5)]
    repainted = [*UNDISTURBED[:2], _restored(2, 1, 4), _step(2, 6, 4, 5, digest="x")]
    for events, said in (
        (shifted, "image 2 (pixels, noise, point) is missing"),
        (shifted, "image 6 (pixels, noise, point) is beyond the undisturbed run"),
        (doubled, "image 1 (pixels, noise, point) is there twice"),
        (repainted, "image 4 (pixels, noise, point) is another, and 1 more"),
    ):
        assert said in _problems(events, replace(ENDING, ref=(2, 6))), said


def test_judge_names_other_differences():
    for change, said in (
        ({"hashes": ENDING.hashes | {"optimizer": "g"}}, "the tensors of optimizer is another"),
        ({"rows": _rows(2, 6)}, "the metrics at 4 images is missing"),
        ({"rows": _rows(2, 4, 4, 6)}, "the metrics at 4 images is there twice"),
        ({"rows": _rows(2, 6, 4)}, "the metrics are in another order"),
        ({"rows": [*_rows(2, 4), _rows(6)[0] | {"learning_rate": 2e-3}]}, "the metrics at 6 images is another"),
        ({"loss_sums": [[1.0 + 1e-15], [2.0]]}, "the last manifest's loss sums is another"),
        ({"pictures": {}}, "picture a.png is missing"),
        ({"pictures": {"a.png": "q"}}, "picture a.png is another"),
    ):
        assert _problems(UNDISTURBED, replace(ENDING, **change)) == [said]
    assert _problems(UNDISTURBED, replace(ENDING, pictures=ENDING.pictures | {"b.png": "of `ddpm sample`"})) == []
    commit = {"event": "commit", "fence": 1, "ref": [1, 2], "loss_sums": [[1.0]]}
    history, other = History.of([*UNDISTURBED, commit]), History.of([*UNDISTURBED, commit | {"loss_sums": [[2.0]]}])
    assert differences(history, ENDING, other, ENDING) == ["the loss sums committed at 2 images is another"]

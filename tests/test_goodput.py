"""The goodput benchmark in small, and its account of runs whose truth is written down here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.goodput.accounting import Costs, gaps, lineage, lost_and_repeated

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quick_goodput_accounts_for_all_systems(tmp_path: Path):
    words = [sys.executable, "-m", "benchmarks.goodput", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "goodput.json").read_text())
    assert report["systems"].keys() == {"ours", "accelerate", "dcp"}
    windows = [figure["raw"] | figure for figure in report["figures"].values() if figure["raw"]["is_measured"]]
    assert len(windows) == 3
    for (name, system), window in zip(report["systems"].items(), windows, strict=True):
        assert min(system["costs"].values()) > 0, name
        assert len(window["gaps_seconds"]) == 2
        assert window["kept_images"] > 0, name
        # Seconds of the base, which beside other work may be slower ones than those of the window.
        productive_seconds = window["kept_images"] * window["image_seconds"]
        assert window["value"] == pytest.approx(100 * productive_seconds / sum(window["gaps_seconds"]), rel=0.2)
        rising = list(system["curve"].values())
        assert rising[0] < rising[-1] <= 100 and rising[-1] > 50
    assert (windows[0]["lost_images"], windows[0]["repeated_images"]) == (0, 0)
    assert "accelerate.save_state" in done.stdout
    with Image.open(tmp_path / "goodput.png") as picture:
        assert picture.size == (760, 480)


def event(kind: str, at: int, *images: tuple[int, str]) -> dict:
    return {"event": kind, "at": at, "images": images}


def test_lineage_follows_what_was_restored_and_counts_what_an_epoch_lacks():
    first = [event("step", 1, (0, "a"), (1, "b")), event("saving", 1), event("saved", 1), event("step", 2, (2, "c"))]
    # Killed; the second attempt sees `b` again instead of `c`, and its save of step 3 never ends.
    second = [
        event("restored", 1),
        event("step", 2, (2, "b")),
        event("saving", 2),
        event("step", 3, (3, "a")),
        event("saving", 3),
    ]
    third = [event("restored", 2), event("step", 3, (3, "c")), event("saving", 3), event("step", 4, (4, "b"))]
    kept = lineage([first, second, third], at=3)
    assert kept == [(0, "a"), (1, "b"), (2, "b"), (3, "c")]
    assert lost_and_repeated(kept, Counter("abc")) == (1, 1)
    assert lost_and_repeated(kept[:2], Counter("abc")) == (0, 0), "no epoch has ended"
    assert lineage([first, second, third], at=0) == []


def test_model_keeps_whole_intervals_after_a_restart():
    costs = Costs(image_seconds=0.1, restart_seconds=2.0, save_seconds=0.5, commit_seconds=1.0)
    # Starts at 2 s; saves of ten images begin at 3, 4.5 and 6 s, and each is committed a second later.
    kept = {seconds: costs.kept_images(seconds, 10) for seconds in (1, 3.9, 4.1, 5.4, 5.6, 7.1)}
    assert kept == {1: 0, 3.9: 0, 4.1: 10, 5.4: 10, 5.6: 20, 7.1: 30}
    assert costs.goodput([4.1, 5.6], 10) == pytest.approx(30 * 0.1 / 9.7)
    # √(2 · 0.5 · 16) = 4 s, of 40 images.
    assert costs.young_images(16, step_images=8) == 40
    times = gaps(60, 4)
    assert sum(times) == pytest.approx(240)
    assert (min(times), max(times)) == pytest.approx((48.75, 71.25))

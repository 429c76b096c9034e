"""The page of a run and that of a bucket: what is in them, and that nothing of a run is taken for markup.

Beside them: how long runs take and what that costs, in the same words wherever they are told.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import resource
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from job.config import draft
from job.exits import Exit
from job.plan import follow_dataset
from job.report import PictureCache, evenly, facts_of, run_page
from job.report.bucket_page import loss_curve
from job.runs.outlook import AttemptSpan, duration, outlook_of, spans_of
from job.runs.records import Attempt, LastStatus, Status
from job.runs.run import open_run
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, settings, started, succeeded
from tests.job.report import hostile
from tests.job.report.hostile import FORGED, data_of, forged, lengthen, multiply

SHOWN = {"sixteen bits"}
NUMBERS = {"many large frames": "300 × 4,000 × 4,000", "many small frames": "100,000 × 1 × 1"}
NUMBERS["a header alone"] = "900000000"


def reported(bucket, *words):
    """The page that `ddpm report` writes: of a run, or of the bucket."""
    done = ddpm_here("report", *words, "--bucket", bucket)
    (line,) = succeeded(done).splitlines()
    return Path(line.split()[0]).read_text(), done


def page_of(bucket, run):
    found = open_run(str(bucket), run)
    return run_page(facts_of(found, run), PictureCache(lambda said: pytest.fail(said))).decode()


def test_hostile_words_are_text(made_once):
    odd = made_once("odd", hostile.fill_hostile)
    page = (odd / "runs/odd/report.html").read_text()
    assert [grid["moment"] for grid in data_of(page)["grids"]] == ["epoch 1", "epoch 2"]
    assert '<span class="state finished">finished</span>' in page
    assert '>Compare with</label>\n<select id="beside"><option value="">no other</option>' in page
    assert f"page        {odd}/runs/odd/report.html" in succeeded(ddpm_here("runs", "show", "odd", "--bucket", odd))
    assert verify_run(open_store(str(odd)), "odd").problems == []
    page = page_of(odd, "odd")
    scripts = re.findall(r"<script([^>]*)>", page)
    assert scripts == [' type="application/json" id="data-of-page"', "", ""]
    for name in hostile.CLASSES:
        assert html.escape(name.replace("/", "∕"), quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")
    assert not re.findall(r"<(?:img|b)[^>]*(?:onerror|>49)", page)
    assert "alert(1)</script>" not in page
    # And nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:image/webp;base64,|samples/|figures/)([^"]*)"', page)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src ")
    assert html.unescape(policy).count("'sha256-") == 2 and "unsafe-eval" not in policy


def test_pages_say_how_a_run_differs_and_goes_on(walked, tmp_path):
    found, again = open_run(str(walked), "walk"), f"ddpm train --dataset tiles --run walk --bucket {walked}"
    facts, page = facts_of(found, "walk"), page_of(walked, "walk")
    # On a phone the titles within pictures are too small to read.
    said = "Sampled by ddim, 4 steps, with the same seeds in all grids, from the first on, of the classes coast, desert"
    assert said in page and f"Go on{again} --epochs 6 \n" in re.sub("<[^>]+>", "", page)
    assert replace(facts, state="stopped").go_on == again
    elsewhere = replace(found, bucket=open_store(str(tmp_path / "a b")))
    assert f"--bucket '{tmp_path}/a b'" in facts_of(elsewhere, "walk").go_on
    imported = facts_of(replace(found, config=found.config.updated({"data.dataset": ""})), "walk")
    assert imported.go_on == "" and "Go on" not in run_page(imported, PictureCache(pytest.fail)).decode()
    config = follow_dataset(draft("landscape-sample", {"model.kind": "dit"}), found.index)
    assert facts_of(replace(found, config=config), "walk").differing == {"model.kind": ("unet", "dit")}


def test_own_samples_are_on_the_page(bucket):
    succeeded(ddpm_here("sample", "--run", "walk", "--bucket", bucket, "--checkpoints", "1,3", "--seeds", "0-3"))
    succeeded(ddpm_here("sample", "--run", "walk", "--bucket", bucket, "--count", 4))

    def shown():
        return re.findall(r'<figure><img src="data:[^"]*" alt="(samples/[^"]*)">', page_of(bucket, "walk"))

    (of_set,) = (bucket / "runs/walk/samples").glob("epoch-0003-ddim-4-0-4-*")
    assert shown() == [
        "samples/comparison-1-3-ddim-4-seeds-0-3.png",
        f"samples/{of_set.name}/grid.png",
        "samples/epoch-0003-ddim-4-seeds-0-3.png",
        "samples/epoch-0001-ddim-4-seeds-0-3.png",
    ]
    for steps in range(10, 20):
        shutil.copy(bucket / "runs/walk" / shown()[1], bucket / f"runs/walk/samples/epoch-0002-ddim-{steps}.png")
    page = page_of(bucket, "walk")
    assert len(shown()) == 12 and "2 more pictures in the run" in page
    assert '<li><a href="samples/epoch-0001-ddim-4-seeds-0-3.png">' in page


def test_speeds_are_beside_their_median(bucket):
    lengthen(bucket, "walk", epochs=3, grids=1, rows=99)
    page = page_of(bucket, "walk")
    (median,) = re.findall(r'<span class="faint">median ([\d.]+)</span>', page)
    assert 400 < float(median) < 401
    (speed,) = (chart for chart in data_of(page)["charts"] if chart["name"] == "speed")
    assert f"; median {float(median):.4g}" in speed["summary"]
    assert f'<span class="faint">median {median}</span>' in reported(bucket)[0]


def test_hours_of_training_leave_pauses_out():
    """Two attempts of which the second repeats no logged row, on a machine whose clock is behind."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    seconds = began.timestamp()
    spans = [AttemptSpan(None, began + timedelta(hours=hours), began, "", None) for hours in (0, 5)]
    at = {10: 1.0, 20: 2.0, 30: 5.5, 40: 5.25, 50: 6.25}
    rows = [{"images_seen": seen, "loss": 1 / seen, "time": seconds + 3600 * hours} for seen, hours in at.items()]
    curve = loss_curve([*rows, {"images_seen": 60, "val_loss": 1.0}], spans)
    assert curve == {"images": [*at], "hours": [1.0, 2.0, 2.5, 2.5, 3.5], "values": [0.1, 0.05, 0.033333, 0.025, 0.02]}
    assert loss_curve([], spans) == {"images": [], "hours": [], "values": []}


@pytest.mark.slow
def test_pages_of_long_runs_stay_small(bucket):
    lengthen(bucket, "walk", epochs=500, grids=50, rows=8000)
    began = time.process_time()
    page, done = reported(bucket, "walk")
    # 5 s on two cores that nobody else uses.
    assert time.process_time() - began < 60 and len(page.encode()) < 5e6
    assert done.stdout.startswith(f"{bucket}/runs/walk/report.html  (")
    data = data_of(page)
    # One is of its own training.
    assert len(data["grids"]) == 51
    assert {len(chart["x"]) for chart in data["charts"]} == {1000}


def test_pages_are_written_to_output(bucket, tmp_path):
    (bucket / "runs/walk/report.html").unlink()
    succeeded(ddpm_here("report", "walk", "--bucket", bucket, "--output", tmp_path / "page.html"))
    assert "walk: finished" in (tmp_path / "page.html").read_text()
    assert not (bucket / "runs/walk/report.html").exists()
    for wrong in (tmp_path / "page.txt", tmp_path / "no/page.html"):
        line = refused(ddpm_here("report", "walk", "--bucket", bucket, "--output", wrong), Exit.BAD_REQUEST)
        assert "name a file that ends in .html" in line


def test_unreadable_runs_hide_no_others(bucket):
    line = refused(ddpm_here("report", "walks", "--bucket", bucket), Exit.MISSING_INPUT)
    assert "there is no run 'walks'" in line
    # Of a later version, damaged, and one that has only begun.
    later = shutil.copytree(bucket / "runs/walk", bucket / "runs/later")
    config = (later / "config.yaml").read_text()
    shutil.rmtree(later / "attempts")
    (later / "config.yaml").write_text(config.replace("train:", "later: {key: 1}\ntrain:"))
    (bucket / "runs/begun").mkdir()
    (bucket / "runs/begun/config.yaml").write_text(config)
    assert "another version's" in refused(ddpm_here("report", "later", "--bucket", bucket), Exit.BAD_DATA)
    assert "not started" in page_of(bucket, "begun")
    page, _ = reported(bucket)
    assert data_of(page)["runs"].keys() == {"begun", "walk"}
    assert "is not a configuration, or is another version" in page
    assert 'href="runs/walk/report.html"' in page
    # It is no run.
    assert "report.html" not in succeeded(ddpm_here("runs", "list", "--bucket", bucket))


def test_bucket_pages_have_each_picture_once(bucket):
    multiply(bucket, "walk", 3)
    page, _ = reported(bucket)
    assert len(re.findall(r"data:image/webp;base64,", page)) == 4
    runs = data_of(page)["runs"]
    assert [run["config"]["train.seed"] for run in runs.values()] == [0, 1, 2, 3]
    assert runs["walk"]["loss"] == runs["walk-000"]["loss"] and len(runs["walk"]["loss"]["values"]) > 3
    (bucket / "runs/walk/samples/epoch-0003-ddim-4.png").write_bytes(forged("a header alone"))
    page, _ = reported(bucket)
    assert "900000000" in page and page.count("data:image/webp;base64,") == 3


@pytest.mark.slow
def test_bucket_pages_stay_small(bucket):
    lengthen(bucket, "walk", epochs=3, grids=1, rows=1500)
    multiply(bucket, "walk", 201)
    began = time.process_time()
    page, _ = reported(bucket)
    assert time.process_time() - began < 60 and len(page.encode()) < 4e6


def test_forged_pictures_and_damaged_rows_become_lines(bucket):
    paths = {what: bucket / f"runs/walk/samples/epoch-{i:04d}-ddim-4.png" for i, what in enumerate(FORGED, 10)}
    for what, path in paths.items():
        path.write_bytes(forged(what))
    (bucket / "runs/walk/samples/epoch-0003-ddim-4.png").write_bytes(b"no picture")
    max((bucket / "runs/walk/metrics").glob("*.jsonl")).write_text("{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page, done = reported(bucket, "walk")
    assert "the page is without" in done.stderr and "epoch-0003" in done.stderr
    assert "going on without some rows of the metrics" in done.stderr
    shown = [f"epoch {i}" for i, what in enumerate(FORGED, 10) if what in SHOWN]
    assert [grid["moment"] for grid in data_of(html.unescape(page))["grids"]] == shown
    for what in FORGED.keys() - SHOWN:
        (why,) = re.findall(rf"{re.escape(str(paths[what]))} is not shown: (.*)\.\n?</p>", html.unescape(page))
        assert (NUMBERS.get(what) or why) in why
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_forged_pictures_cost_no_training(tiles, tmp_path):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    samples = bucket / "runs/r/samples"
    samples.mkdir(parents=True)
    for number, what in enumerate(("many large frames", "a header alone", "cut off")):
        (samples / f"images-00000000{number}-ddim-4.png").write_bytes(forged(what))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = ddpm_here("train", "--dataset", "tiles", "--run", "r", "--bucket", bucket, "--epochs", 1, *settings())
    assert succeeded(done) and done.stderr.count("the page is without") == 3
    page = (bucket / "runs/r/report.html").read_text()
    assert '<span class="state finished">finished</span>' in page and page.count(" is not shown: ") == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: hostile.png(8000, 8700, bytes(8700 * (1 + 4 * 8000)), b"\x08\x06\0\0\0"), True),
        (lambda: hostile.gif(270, 270, 950), True),
        (lambda: hostile.gif(16, 16, 3, 13_000, 13_000), False),
    ],
)
def test_the_largest_pictures_cost_no_gigabyte(make, shown):
    data, pictures = make(), PictureCache(print)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert bool(pictures.made(("a.png", 28_000, 1200), lambda: data)) == shown
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_failed_pages_cost_no_training(tiles, tmp_path, monkeypatch):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")

    def broken(*_):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("job.training.reporting.run_page", broken)
    words = ("--dataset", "tiles", "--run", "r", "--bucket", bucket, "--epochs", 1, "--open")
    done = ddpm_here("train", *words, *settings())
    assert "the run's page stays as it was: ZeroDivisionError: a mistake" in done.stderr
    assert json.loads((bucket / "runs/r/status.json").read_text())["state"] == "finished"
    # Nor because there is none to open, which the same command wants of a finished run as well.
    for told in (done, ddpm_here("train", *words)):
        succeeded(told)
        assert f"no browser has opened {bucket}/runs/r/report.html" in told.stderr


def test_evenly_has_both_ends():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(500, 60)[0] == 0 and evenly(500, 60)[-1] == 499 and len({*evenly(500, 60)}) == 60


@pytest.mark.slow
def test_page_is_there_from_the_beginning_to_a_stop(tiles, tmp_path):
    """It opens in the browser that a person names, and a stopped run has a page of its last moment."""
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    page, opened, browser = bucket / "runs/r/report.html", tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nhead -c 400 "${{1#file://}}" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    words = ("train", "--dataset", "tiles", "--run", "r", "--bucket", bucket, "--epochs", 9999, "--open", *settings())
    child = started(*words, BROWSER=f"{browser} %s")
    try:
        assert f"the page of this run: {page}\n" in iter(child.stdout.readline, "")
        assert any("beginning" in line for line in iter(child.stdout.readline, ""))
        assert '<span class="state running">running</span>' in page.read_text()
        assert "<!doctype html>" in opened.read_text().lower()
        # A row of the log, which the last page shows.
        while not list((bucket / "runs/r/metrics").glob("*")) and child.poll() is None:
            time.sleep(0.1)
    finally:
        child.terminate()
        child.communicate(timeout=60)
    assert child.returncode == 75
    text = page.read_text()
    assert '<span class="state stopped">stopped</span>' in text and data_of(text)["charts"]


def test_page_shows_the_preview_of_the_dataset(bucket):
    def colours() -> int:
        pattern = '"data:image/webp;base64,([^"]*)" alt="Images of the dataset, by class">'
        (picture,) = map(base64.b64decode, re.findall(pattern, reported(bucket, "walk")[0]))
        return len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(1 << 24))

    preview = bucket / "datasets/tiles-16/preview.png"
    assert colours() > 1000
    Image.new("RGB", (40, 40), "red").save(preview)
    assert colours() < 10
    # A dataset may be older than previews.
    preview.unlink()
    assert colours() > 1000 and not preview.exists()


BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(hours: float) -> str:
    return (BEGAN + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


Seen = tuple[str, int, float]
"""The state, images and hour that the status of an attempt said."""


def attempt(fence: int, hours: float, dollars: float | None = 2.0, seen: Seen | None = None) -> Attempt:
    """One that found this status of the one before."""
    found = seen and LastStatus(state=seen[0], images_seen=seen[1], updated=at(seen[2]))
    of_machine = {"host": "h", "code_version": "c", "world_size": 1, "device": "d", "dollars_per_hour": dollars}
    before = {"previous": fence - 1 or None, "previous_seen": found, "changes": {}, "config_sha256": "0" * 64}
    return Attempt(fence=fence, id=str(fence), started=at(hours), **of_machine, **before)


def status(fence: int, updated: str, state: str = "stopped", seen: int = 4000, speed: float | None = 1.0) -> Status:
    progress = {"images_seen": seen, "target_images": 13_000, "epoch": 1.0, "loss": 0.1, "images_per_second": speed}
    return Status(state=state, fence=fence, updated=updated, **progress)


def test_attempts_last_until_their_last_status():
    seen = (None, ("running", 1000, 2), ("stopped", 2000, 6))
    # Of the last one nobody says how the one before ended.
    attempts = [*(attempt(n, hours, seen=seen[n - 1]) for n, hours in ((1, 0), (2, 5), (3, 9))), attempt(4, 12)]
    found = [(each.hours, each.state, each.images_seen) for each in spans_of(attempts, status(4, at(12.5)))]
    assert found == [(2.0, "cut off", 1000), (1.0, "stopped", 2000), (0.0, "", None), (0.5, "stopped", 4000)]


def test_hours_and_dollars_add_up():
    attempts = [attempt(1, 0), attempt(2, 5, 4.0, ("stopped", 1000, 2))]
    found, last = spans_of(attempts, status(2, at(6))), status(2, at(6))
    outlook = outlook_of(found, last)
    assert (outlook.hours_so_far, outlook.dollars_so_far) == (3.0, 2 * 2.0 + 1 * 4.0)
    assert (outlook.hours_left, outlook.dollars_left, outlook.ends) == (2.5, 10.0, None)
    left = "2 h 30 min when it goes on, for about $10.00 more"
    assert outlook.words == {"cost so far": "about $8.00 (3.0 hours)", "to the end": left}
    # On other machines.
    assert outlook_of(found, last, 1.0).dollars_left == 2.5
    # Of a part of the attempts nobody knows the price: a sum of the others would be too low.
    without = [attempt(1, 0, None), attempts[1]]
    assert outlook_of(spans_of(without, last), last).dollars_so_far is None


def test_running_runs_state_their_end():
    now = datetime.now(UTC).replace(microsecond=0)
    running = status(1, now.strftime("%Y-%m-%dT%H:%M:%SZ"), "running", speed=0.5)
    outlook = outlook_of(spans_of([attempt(1, 0)], running), running)
    assert outlook.ends == now + timedelta(hours=5)
    assert f"5 h 0 min, at {outlook.ends:%Y-%m-%d %H:%M} UTC, for about $10.00 more" == outlook.words["to the end"]


@pytest.mark.parametrize("told", [status(1, at(1), speed=None), status(1, at(1), seen=13_000), None])
def test_unknown_durations_are_left_out(told):
    outlook = outlook_of(spans_of([attempt(1, 0, None)], told), told)
    assert (outlook.hours_left, outlook.ends, outlook.words) == (None, None, {})


def test_durations_are_for_people():
    durations = {0.001: "less than a minute", 0.5: "30 min", 3.34: "3 h 20 min", 50.0: "2 d 2 h 0 min"}
    assert {hours: duration(hours) for hours in durations} == durations

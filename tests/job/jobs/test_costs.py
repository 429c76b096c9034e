"""What a person is told before a job is sent: what, where, how long at most and for how much."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import yaml

from job.exits import Exit
from job.jobs import machines
from job.jobs.machines import load_prices
from job.jobs.submit import cost_of, outlook_lines, plan_lines, spec_of
from job.jobs.targets import BACKENDS, parse_targets
from job.requests import SubmitRequest
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN, SHOWN, assert_rows, parsed, target

pytestmark = pytest.mark.usefixtures("targets_folder")
PRICES = {
    "source": "https://example.com/prices",
    "date": datetime.date(2026, 1, 31),
    "machines": {"g2-standard-8": {"us-east1": 0.5, "us-west1": 0.75}, "g2-standard-24": {"us-east1": 2.0}},
}


def test_plans_state_the_facts(monkeypatch):
    def told(case):
        on, keys = next(iter(case.items()))
        verb, *words = shlex.split(case.get("words", "train --dataset celeba"))
        there = target(on, **keys)
        job = spec_of(parsed(verb, [*words, "--bucket", "gs://bucket"]), there, SubmitRequest(**case.get("how", {})))
        lines = dict(line.split(maxsplit=1) for line in plan_lines(job, there))
        own = ("job", "command") if "words" in case else ()
        return {name: lines[name] for name in (*own, "machines", "limit", "cost")}

    monkeypatch.setattr(machines, "load_prices", lambda: PRICES)
    assert_rows("plans.yaml", told)


def test_shipped_prices_are_dated():
    table = load_prices()
    assert table["source"].startswith("https://") and isinstance(table["date"], datetime.date)
    assert all(dollars > 0 for by_region in table["machines"].values() for dollars in by_region.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words", ["train --dataset a", "sample --run a --seeds 0-3", "pack gs://abc/b.zip celeba"])
def test_targets_of_the_pages_work(backend, words):
    """And the shipped prices cover them."""
    there = parse_targets(yaml.safe_dump({backend: SHOWN[backend]}), "page", backend)[backend]
    verb, *rest = words.split()
    spec = spec_of(parsed(verb, [*rest, "--bucket", "gs://mine"]), there, SubmitRequest())
    assert there.render(spec)
    is_priced = "machine_type" in SHOWN[backend] and verb != "pack"
    assert not is_priced or cost_of(spec, there).startswith("at most $")


@pytest.mark.slow
def test_page_and_submit_agree(tmp_path, walked):
    """One number, wherever it is told: before it is sent, of the job, and on the run's page."""
    bucket = shutil.copytree(walked, tmp_path / "bucket")
    there = target("vm", price_per_hour=3.6)
    spec = spec_of(parsed("train", ["--dataset", "tiles", "--run", "walk"]), there, SubmitRequest())
    assert spec.env["DDPM_DOLLARS_PER_HOUR"] == "3.6"
    words = ("--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs", 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_DOLLARS_PER_HOUR", spec.env["DDPM_DOLLARS_PER_HOUR"])
        done = ddpm_here("train", *words, "--stop-after", "4s", "--set", "log.every_images=72")
    assert done.returncode == 75, done.stderr
    (left,) = re.findall(r"(?m)^to the end  (.*)$", succeeded(ddpm_here("runs", "show", "walk", "--bucket", bucket)))
    assert re.fullmatch(r".* when it goes on, for about \$\d+\.\d\d more", left)
    at_it = replace(spec, bucket=str(bucket), max_hours=1.0)
    assert f"to the end {left}" in outlook_lines(at_it, there)
    succeeded(ddpm_here("report", "walk", "--bucket", bucket))
    assert f"<dd>{left}</dd>" in (bucket / "runs/walk/report.html").read_text()
    # Of a run that is not there, and in a bucket that nobody can see, nothing is told.
    for other in (replace(at_it, run="other"), replace(at_it, bucket="gs://no-such-bucket-of-ours")):
        assert outlook_lines(other, there) == []


def test_hopeless_jobs_are_not_sent():
    never = ["--set", "checkpoint.every_minutes=100000", "--set", "checkpoint.every_epochs=9999", "--dry-run"]
    words = ["submit", "train", *FOR_TRAIN, "--on", "gke", "--max-hours", "48"]
    line = refused(ddpm_here(*words, *never), Exit.BAD_REQUEST)
    assert "the job would not save within its 48 hours (checkpoint.every_minutes, checkpoint.every_epochs), but" in line
    (works,) = re.findall("--set (checkpoint.every_minutes=[0-9.]+)", line)
    succeeded(ddpm_here(*words, *never[:-1], "--set", works, "--dry-run"))
    # Halfway there is a save, which notices then take too; and two settings may need each other.
    succeeded(ddpm_here(*words, "--set", "checkpoint.every_minutes=720", *never[2:]))
    scores = ["--set", "evaluate.every_epochs=10", "--set", "checkpoint.keep_best=true", "--dry-run"]
    succeeded(ddpm_here(*words, *scores))
    # On machines that stay, for an hour, and where the ends of epochs save, it gets on.
    succeeded(ddpm_here(*words, "--on-demand", *never))
    succeeded(ddpm_here(*words[:-1], "1", *never))
    succeeded(ddpm_here(*words, *never[:2], "--dry-run"))

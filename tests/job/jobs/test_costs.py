"""What a person is told before a job is sent: what, where, how long at most and for how much."""

from __future__ import annotations

import datetime
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from job.exits import Exit
from job.jobs import machines
from job.jobs.backends import Target
from job.jobs.machines import load_prices
from job.jobs.spec import JobSpec
from job.jobs.submit import cost_of, outlook_lines, plan_lines, spec_of
from job.jobs.targets import BACKENDS, load_targets, parse_targets, target_on
from job.requests import SubmitRequest
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.jobs.submitting import FOR_TRAIN, SHOWN, built, parsed

pytestmark = pytest.mark.usefixtures("targets_folder")
SPEC = JobSpec("train-a", "train", ("train",), "i", "gs://bucket", gpu_type="nvidia-l4", max_hours=10.0, spot=False)


def target(backend: str, more: str = "") -> Target:
    places = {"vm": "zones: [us-east1-b, us-east1-c]", "batch": "regions: [us-east1, us-west1]"}
    google = f"project: my-project, {places[backend]}, " if backend in places else ""
    return parse_targets(f"t: {{backend: {backend}, {google}image: i, bucket: gs://bucket{more}}}", "f")["t"]


BESIDE = "g2-standard-8 in us-east1, without disk, address and traffic"
EAST = f"on demand for {BESIDE}; https://example.com/prices, 2026-01-31"
MACHINES = {"g2-standard-8": {"us-east1": 0.5, "us-west1": 0.75}, "g2-standard-24": {"us-east1": 2.0}}
PRICES = {"source": "https://example.com/prices", "date": datetime.date(2026, 1, 31), "machines": MACHINES}
PRICED, NODES, NODE = ", price_per_hour: 1.5", {"nodes": 2}, ", machine_type: g2-standard-24, region: us-east1"
SLICES = {"verb": "sample", "argv": ("sample",), "slices": 4}


def test_plans_state_the_facts():
    vm = target("vm", ", price_per_hour: 0.75")
    spec = replace(SPEC, spot=True, argv=("train", "--run", "it is"))
    lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, vm))
    assert lines["job"] == "train-a, on t (vm, project my-project, us-east1-b, then us-east1-c)"
    assert lines["command"] == "ddpm train --run 'it is'"
    assert lines["machines"].startswith("1 × g2-standard-8, 1 × nvidia-l4 each; spot, which may be taken away")
    assert lines["limit"].startswith("10 hours")
    assert lines["cost"] == "at most $7.50 (1 × $0.75 per hour × 10 hours; as the target says)"
    # Nothing of nodes that the target does not select, and of GPUs that packing pays for without using them.
    for on, gpus in (("plain", 8), ("own", 1)):
        lines = "\n".join(plan_lines(built("train", FOR_TRAIN, on), load_targets()[on]))
        assert f"machines  1 × node, {gpus} × GPU each; spot or on demand, as the target's nodes are" in lines
    for machine_type, said in (
        ("g2-standard-24", "no GPU used: 2 × nvidia-l4 idle, but paid for; on demand"),
        ("e2-standard-8", "no GPU; on demand"),
    ):
        vm = load_targets()["vm"].model_copy(update={"machine_type": machine_type})
        spec = built("pack", ["landscape-sample", "tiles", "--size", "8"], "vm")
        assert f"machines  1 × {machine_type}, {said}" in plan_lines(spec, vm)


TOGETHER, UNTIL = "10 hours for all attempts together, ", "waiting for nodes and pauses included, then"
WAITING = f"{UNTIL} Kubernetes ends it"
EACH = f"10 hours from each start of the group, {WAITING}; preemptions start it without bound"


@pytest.mark.parametrize(
    ("on", "changes", "limit"),
    [
        ("gke", {}, TOGETHER + WAITING),
        ("gke", NODES, EACH),
        ("queued", NODES, f"{TOGETHER}{UNTIL} its queue stops it for good"),
        ("vm", {}, TOGETHER + "then the engine ends it"),
        ("batch", {}, "10 hours for each attempt of a task, of which there may be 11, then Batch ends it"),
    ],
)
def test_plans_state_the_limit(on, changes, limit):
    lines = plan_lines(built("train", FOR_TRAIN, on, max_hours=10, **changes), target_on(on))
    assert f"limit     {limit}; saved work stays (--max-hours)" in lines


@pytest.mark.parametrize(
    ("backend", "more", "changes", "said"),
    [
        ("vm", "", {}, f"at most $5.00 (1 × $0.5 per hour × 10 hours; {EAST})"),
        ("vm", "", {"spot": True}, f"at most $5.00 (1 × $0.5 per hour × 10 hours; spot costs less; {EAST})"),
        ("vm", "", SLICES, "at most $20.00 (4 × $0.5 "),
        # It may end up in any of them, and Batch has each of eleven attempts run for so long.
        ("batch", "", {}, "at most $82.50 (1 × $0.75 per hour × 11 attempts × 10 hours; on demand for"),
        ("vm", ", machine_type: g2-standard-96", {}, "price unknown: set the target's `price_per_hour`"),
        # The target's own price wins.
        ("vm", PRICED, NODES, "at most $30.00 (2 × $1.5 per hour × 10 hours; as the target says)"),
        ("kubernetes", PRICED, {}, "at most $15.00 (1 × $1.5 per hour × 10 hours; as the target says)"),
        # What several nodes cost is bounded by a queue alone.
        ("kubernetes", PRICED, NODES, "2 × $1.5 per hour, for as long as it runs, without a limit; as the target says"),
        ("kubernetes", PRICED + ", queue: gpus", NODES, "at most $30.00"),
        # A job pays for its share of a node, where it is known which that is.
        ("kubernetes", "", {}, "price unknown"),
        ("kubernetes", NODE, {}, "at most $10.00 (1 × $1 per hour × 10 hours; on demand for 1 of the 2 GPUs"),
        ("kubernetes", NODE, {"gpus": 2}, "at most $20.00 (1 × $2 per hour × 10 hours; on demand for g2-"),
        ("kubernetes", NODE, {"gpus": 0}, "price unknown"),
    ],
)
def test_costs_have_a_source(monkeypatch, backend, more, changes, said):
    monkeypatch.setattr(machines, "load_prices", lambda: PRICES)
    assert cost_of(replace(SPEC, **changes), target(backend, more)).startswith(said)
    elsewhere = target("vm").model_copy(update={"zones": ("us-east1-b", "mars-north1-a")})
    assert cost_of(SPEC, elsewhere).startswith("price unknown")


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
    there = target("vm", ", price_per_hour: 3.6")
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

"""What a person is told before a job is sent: what, where, how long at most and for how much."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from job.jobs import submit
from job.jobs.spec import JobSpec
from job.jobs.submit import Price, cost_of, load_prices, plan_lines
from job.jobs.targets import Target, chosen_target, load_targets, parse_targets
from tests.job.jobs.submitting import FOR_TRAIN, built

pytestmark = pytest.mark.usefixtures("targets_folder")
SPEC = JobSpec("train-a", "train", ("train",), "i", "gs://bucket", gpu_type="nvidia-l4", max_hours=10.0, spot=False)


def target(backend: str, more: str = "") -> Target:
    places = {"vm": "zones: [us-east1-b, us-east1-c]", "batch": "regions: [us-east1, us-west1]"}
    google = f"project: my-project, {places[backend]}, " if backend in places else ""
    return parse_targets(f"t: {{backend: {backend}, {google}image: i, bucket: gs://bucket{more}}}", "f")["t"]


def row(region: str, dollars: float) -> Price:
    return Price("g2-standard-8", region, dollars, "https://example.com/prices", datetime.date(2026, 1, 31))


EAST, WEST = row("us-east1", 0.5), row("us-west1", 0.75)


def test_a_person_is_told_what_where_how_long_and_for_how_much():
    vm = target("vm", ", price_per_hour: 0.75")
    spec = replace(SPEC, spot=True, argv=("train", "--run", "it is"))
    lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, vm))
    assert lines["job"] == "train-a, on t (vm, project my-project, us-east1-b, then us-east1-c)"
    assert lines["command"] == "ddpm train --run 'it is'"
    assert lines["machines"].startswith("1 × g2-standard-8, 1 × nvidia-l4 each; spot, which may be taken away")
    assert lines["limit"].startswith("10 hours")
    assert lines["cost"] == "at most $7.50 (1 × $0.75 per hour, as the target says, × 10 hours)"
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


def test_a_person_is_told_what_the_hours_mean_there():
    again = "; what --watch submits again has what is left of them"
    together, until = "10 hours for all attempts together, ", "waiting for nodes and pauses included, then"
    waiting = f"{until} Kubernetes ends it"
    for on, changes, limit in (
        ("gke", {}, together + waiting),
        ("gke", {"nodes": 2}, f"10 hours from each start of the group, {waiting}; preemptions start it without bound"),
        ("queued", {"nodes": 2}, f"{together}{until} its queue stops it for good"),
        ("vm", {}, together + "then the engine ends it"),
        ("batch", {}, "10 hours for each attempt of a task, of which there may be 11, then Batch ends it"),
    ):
        spec, there = built("train", FOR_TRAIN, on, max_hours=10, **changes), chosen_target(load_targets(), on)
        for is_watched in (False, True):
            lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, there, is_watched=is_watched))
            assert lines["limit"] == f"{limit}{again * is_watched}; what is saved stays (--max-hours)"


def test_a_cost_has_a_source_or_there_is_none(monkeypatch):
    source = ", without disk, address and traffic; https://example.com/prices, 2026-01-31"
    more = "; machines that start or go cost some minutes more"
    priced, nodes = ", price_per_hour: 1.5", {"nodes": 2}
    slices = {"verb": "sample", "argv": ("sample",), "slices": 4}
    dearest = f"at most $82.50 (1 × $0.75 per hour × 11 attempts × 10 hours{source}{more})"
    unbounded = "2 × $1.5 per hour, as the target says, for as long as it runs: nothing bounds that"
    for there, changes, prices, said in (
        (target("vm"), {}, [], "price unknown"),
        (target("kubernetes"), {}, [EAST], "price unknown"),
        (target("vm"), {}, [EAST], f"at most $5.00 (1 × $0.5 per hour × 10 hours{source})"),
        (target("vm"), {"spot": True}, [EAST], "$0.5 per hour on demand, and spot costs less, × 10 hours"),
        (target("vm"), slices, [EAST], "at most $20.00 (4 × $0.5"),
        # It may end up in any of them, and Batch has each of eleven attempts run for so long.
        (target("batch"), {}, [EAST], "price unknown"),
        (target("batch"), {}, [EAST, WEST], dearest),
        # The target's own price wins.
        (target("vm", priced), nodes, [EAST], "at most $30.00 (2 × $1.5 per hour, as the target says, × 10 hours)"),
        (target("kubernetes", priced), {}, [], "at most $15.00"),
        # What several nodes cost is bounded by a queue alone.
        (target("kubernetes", priced), nodes, [], unbounded),
        (target("kubernetes", priced + ", queue: gpus"), nodes, [], "at most $30.00"),
    ):
        monkeypatch.setattr(submit, "load_prices", lambda: prices)  # noqa: B023
        cost = cost_of(replace(SPEC, **changes), there)
        assert cost.startswith(said) or (changes == {"spot": True} and said in cost), cost


def test_every_price_that_is_shipped_has_a_source_and_a_day_and_is_found():
    for price in load_prices():
        assert price.source.startswith("https://") and price.dollars_per_hour > 0, price
        assert isinstance(price.date, datetime.date), price
    central = target("vm").model_copy(update={"zones": ("us-central1-a",)})
    assert cost_of(SPEC, central).startswith("at most $8.54 (1 × $0.853624 per hour × 10 hours, without disk, address")

"""What a person is told before a job is sent: what, where, how long at most and for how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.cli.submit import parsed
from job.jobs.building import Resources, spec_of
from job.jobs.submit import plan_lines
from job.jobs.targets import chosen_target, load_targets, parse_targets
from tests.job.jobs.submitting import FOR_TRAIN, TARGETS, built

pytestmark = pytest.mark.usefixtures("targets_folder")


def test_a_person_is_told_what_where_how_long_and_for_how_much():
    vm = parse_targets(
        "vm: {backend: vm, project: my-project, zones: [us-east1-b, us-east1-c], image: i:1, bucket: gs://bucket, "
        "price_per_hour: 0.75}",
        "f",
    )["vm"]
    spec = spec_of(parsed("train", ["--dataset", "a", "--run", "it"]), vm, Resources(max_hours=10))
    lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, vm))
    assert lines["job"] == "train-it, on vm (vm, project my-project, us-east1-b, then us-east1-c)"
    assert lines["command"] == "ddpm train --dataset a --run it --wait 80 --bucket gs://bucket"
    assert lines["machines"].startswith("1 × g2-standard-8, 1 × nvidia-l4 each; spot")
    assert lines["limit"].startswith("10 hours")
    assert lines["cost"] == "at most $7.50 (1 × $0.75 per hour, as the target says, × 10 hours)"
    lines = plan_lines(replace(spec, spot=False), vm.model_copy(update={"price_per_hour": None}))
    assert lines[-1] == "cost      price unknown"
    assert "on demand" in "\n".join(lines)


@pytest.mark.parametrize(("on", "gpus"), [("plain", 8), ("own", 1)])
def test_a_person_is_told_nothing_of_nodes_that_the_target_does_not_select(on, gpus):
    target = load_targets()[on]
    (line,) = [line for line in plan_lines(built("train", FOR_TRAIN, on), target) if line.startswith("machines")]
    assert line == f"machines  1 × node, {gpus} × GPU each; spot or on demand, as the target's nodes are"
    line = "\n".join(plan_lines(built("train", FOR_TRAIN, "gke", gpu_type="nvidia-h100-80gb"), load_targets()["gke"]))
    assert "1 × nvidia-h100-80gb each; spot, which may be taken away" in line


@pytest.mark.parametrize(
    ("machine_type", "said"),
    [
        ("g2-standard-24", "1 × g2-standard-24, no GPU used: 2 × nvidia-l4 idle, but paid for; on demand"),
        ("n1-standard-8", "1 × n1-standard-8, no GPU; on demand"),
        ("e2-standard-8", "1 × e2-standard-8, no GPU; on demand"),
    ],
)
def test_whoever_packs_is_told_of_gpus_that_are_paid_for(machine_type, said):
    vm = load_targets()["vm"].model_copy(update={"machine_type": machine_type})
    spec = spec_of(parsed("pack", ["landscape-sample", "tiles", "--size", "8"]), vm, Resources())
    assert f"machines  {said}" in plan_lines(spec, vm)


AGAIN = "; what --watch submits again has what is left of them"


@pytest.mark.parametrize(
    ("on", "changes", "limit"),
    [
        ("gke", {}, "10 hours for all attempts together, waiting for a node included, then Kubernetes ends it"),
        (
            "gke",
            {"nodes": 2},
            "10 hours from each start of the group, waiting for nodes included, then Kubernetes ends it; preemptions "
            "start it without bound",
        ),
        (
            "queued",
            {"nodes": 2},
            "10 hours for all attempts together, waiting for nodes included, then its queue stops it for good",
        ),
        ("vm", {}, "10 hours for all attempts together, then the engine ends it"),
        (
            "batch",
            {},
            "10 hours for each attempt of a task, of which there may be 11, then Batch ends it",
        ),
    ],
)
def test_a_person_is_told_what_the_hours_mean_there(targets_folder, on, changes, limit):
    more = """
queued: {backend: kubernetes, image: i, bucket: gs://bucket, queue: gpus}
batch: {backend: batch, project: my-project, regions: [us-east1], image: registry/ddpm:1, bucket: gs://bucket}
"""
    (targets_folder / "targets.yaml").write_text(TARGETS + more)
    spec, target = built("train", FOR_TRAIN, on, max_hours=10, **changes), chosen_target(load_targets(), on)
    for is_watched in (False, True):
        lines = dict(line.split(maxsplit=1) for line in plan_lines(spec, target, is_watched=is_watched))
        assert lines["limit"] == f"{limit}{AGAIN * is_watched}; what is saved stays (--max-hours)"


@pytest.mark.parametrize("on", ["local", "container"])
def test_on_this_machine_no_engine_ends_a_job(on):
    lines = plan_lines(built("train", FOR_TRAIN, on, max_hours=10), chosen_target(load_targets(), on))
    assert any("10 hours if --max-hours says so, and then the job ends itself" in line for line in lines)

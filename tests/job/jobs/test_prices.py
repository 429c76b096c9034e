"""What a job may cost: told with its source, or not at all."""

from __future__ import annotations

import re

import pytest

from job.exits import BadDataError
from job.jobs.prices import estimate, load_prices
from job.jobs.spec import JobSpec
from job.jobs.targets import parse_targets

VM = "vm: {backend: vm, project: my-project, zones: [us-east1-b, us-east1-c], image: i, bucket: gs://bucket"
ROW = "{dollars_per_hour: 0.5, source: https://example.com/prices, date: 2026-01-31, machine_type: g2-standard-8"


def spec(**changes) -> JobSpec:
    words = {"name": "train-a", "verb": "train", "argv": ("train",), "image": "i", "bucket": "gs://bucket"}
    return JobSpec(**{**words, "gpu_type": "nvidia-l4", "max_hours": 10.0, **changes})


def vm(more: str = ""):
    return parse_targets(f"{VM}{more}}}", "f")["vm"]


def prices(*rows: str):
    return load_prices("prices: [" + ", ".join(rows) + "]")


def test_every_row_that_is_shipped_has_a_source_and_a_day():
    for row in load_prices():
        assert row.source.startswith("https://")
        assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", row.date)


def test_without_a_figure_nothing_is_guessed():
    found = estimate(spec(), vm(), prices())
    assert (found.dollars, str(found)) == (None, "price unknown")


def test_the_target_s_own_price_wins():
    found = estimate(spec(nodes=2), vm(", price_per_hour: 1.5"), prices(ROW + ", region: us-east1}"))
    assert found.dollars == 30
    assert str(found) == "at most $30.00 (2 × $1.5 per hour, as the target says, × 10 hours)"


def test_a_row_of_the_machine_type_in_the_region_fits():
    table = prices(ROW + ", region: us-east1}")
    found = estimate(spec(spot=False), vm(), table)
    assert found.dollars == 5
    assert str(found) == "at most $5.00 (1 × $0.5 per hour × 10 hours; https://example.com/prices, 2026-01-31)"
    assert "on demand, and spot costs less, × 10 hours" in str(estimate(spec(spot=True), vm(), table))
    assert estimate(spec(), vm(", machine_type: g2-standard-4"), table).dollars is None
    words = {"verb": "sample", "argv": ("sample",), "slices": 4}
    assert estimate(spec(**words), vm(), table).dollars == 20


def test_a_job_that_may_run_in_several_regions_costs_at_most_what_the_dearest_does():
    batch = parse_targets(
        "b: {backend: batch, project: my-project, regions: [us-east1, us-west1], image: i, bucket: gs://bucket}", "f"
    )["b"]
    one, other = ROW + ", region: us-east1}", ROW.replace("0.5", "0.75") + ", region: us-west1}"
    # Batch has each of eleven attempts run for so long.
    assert estimate(spec(), batch, prices(one, other)).dollars == 7.5 * 11
    assert estimate(spec(), batch, prices(one)).dollars is None


def test_each_attempt_of_batch_may_take_all_hours():
    batch = parse_targets(
        "b: {backend: batch, project: my-project, regions: [us-east1], image: i, bucket: gs://bucket}", "f"
    )["b"]
    found = estimate(spec(spot=False), batch, prices(ROW + ", region: us-east1}"))
    assert found.dollars == 0.5 * 11 * 10
    assert str(found) == (
        "at most $55.00 (1 × $0.5 per hour × 11 attempts × 10 hours; https://example.com/prices, 2026-01-31; "
        "machines that start or go cost some minutes more)"
    )


@pytest.mark.parametrize("queue", ["", "gpus"])
def test_what_several_nodes_cost_is_bounded_by_a_queue_alone(queue):
    text = f"k: {{backend: kubernetes, image: i, bucket: gs://bucket, price_per_hour: 1.5, queue: '{queue}'}}"
    cluster = parse_targets(text, "f")["k"]
    assert estimate(spec(), cluster).dollars == 15
    found = estimate(spec(nodes=2), cluster)
    if queue:
        assert found.dollars == 30
    else:
        assert found.dollars is None
        assert str(found) == "2 × $1.5 per hour, as the target says, for as long as it runs: nothing bounds that"


def test_nobody_knows_what_a_node_of_a_cluster_costs():
    cluster = parse_targets("k: {backend: kubernetes, image: i, bucket: gs://bucket}", "f")["k"]
    assert estimate(spec(), cluster).dollars is None


def test_what_is_shipped_is_found():
    central = parse_targets(VM.replace("us-east1", "us-central1") + ", machine_type: g2-standard-8}", "f")["vm"]
    assert 5 < (estimate(spec(), central).dollars or 0) < 20


@pytest.mark.parametrize(
    "row",
    [
        ROW + "}",
        "{dollars_per_hour: 1, machine_type: a, region: b, date: 2026-01-31}",
        "{dollars_per_hour: 1, machine_type: a, region: b, source: hearsay, date: 2026-01-31}",
        "{dollars_per_hour: -1, machine_type: a, region: b, source: https://e.com, date: 2026-01-31}",
        "{dollars_per_hour: 1, machine_type: a, region: b, source: https://e.com}",
        "1",
    ],
)
def test_a_row_without_what_makes_it_credible_is_refused(row):
    with pytest.raises(BadDataError):
        prices(row)

"""What a job may cost: told with its source, or not at all."""

from __future__ import annotations

import re

import pytest

from job.exits import BadDataError
from job.jobs.prices import estimate, load_prices
from job.jobs.spec import JobSpec
from job.jobs.targets import parse_targets

VM = "vm: {backend: vm, project: my-project, zones: [us-east1-b], image: i, bucket: gs://bucket"
ROW = "{spot: true, dollars_per_hour: 0.5, source: https://example.com/prices, date: 2026-01-31"


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
    found = estimate(spec(nodes=2), vm(", price_per_hour: 1.5"), prices(ROW + ", machine_type: g2-standard-8}"))
    assert found.dollars == 30
    assert str(found) == "at most $30.00 (2 × $1.5 per hour, as the target says, × 10 hours)"


def test_a_row_of_the_machine_type_or_of_its_one_gpu_fits():
    by_machine, by_gpu = prices(ROW + ", machine_type: g2-standard-8}"), prices(ROW + ", gpu_type: nvidia-l4}")
    for table in (by_machine, by_gpu):
        found = estimate(spec(), vm(), table)
        assert found.dollars == 5
        assert "https://example.com/prices, 2026-01-31" in str(found)
    # A machine with four of them costs something else.
    assert estimate(spec(gpus=4), vm(), by_gpu).dollars is None
    assert estimate(spec(spot=False), vm(), by_machine).dollars is None
    assert estimate(spec(gpu_type="nvidia-t4"), vm(", machine_type: n1-standard-8"), by_gpu).dollars is None
    words = {"verb": "sample", "argv": ("sample",), "slices": 4}
    assert estimate(spec(**words), vm(), by_machine).dollars == 20


@pytest.mark.parametrize(
    "row",
    [
        ROW + "}",
        ROW + ", gpu_type: a, machine_type: b}",
        "{spot: true, dollars_per_hour: 1, gpu_type: a, date: 2026-01-31}",
        "{spot: true, dollars_per_hour: 1, gpu_type: a, source: hearsay, date: 2026-01-31}",
        "{spot: true, dollars_per_hour: -1, gpu_type: a, source: https://e.com, date: 2026-01-31}",
        "{spot: true, dollars_per_hour: 1, gpu_type: a, source: https://e.com}",
        "1",
    ],
)
def test_a_row_without_what_makes_it_credible_is_refused(row):
    with pytest.raises(BadDataError):
        prices(row)

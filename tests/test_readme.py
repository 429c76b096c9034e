"""The README keeps its word: what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.crash_campaign.points import POINTS
from job.exits import Exit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
CRASHED = {"1", "137"}


def rows() -> list[list[str]]:
    """The cells of the table *what happens when*, without its head."""
    section = TEXT.split("## What happens when …")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]]


def test_the_table_has_a_row_for_each_fault():
    assert len(rows()) > 18
    assert {len(row) for row in rows()} == {5}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_row_names_a_test_that_there_is_and_codes_of_the_table(row):
    codes = {code.strip() for code in row[2].split(",")} - {"", "its own"}
    assert codes <= {str(int(code)) for code in Exit} | CRASHED
    path, _, name = row[4].strip("`").partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests/job" / path).read_text(), re.MULTILINE)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_number_of_points_of_the_campaign():
    assert f"`ARGS=--list` shows the {len(POINTS)})" in TEXT

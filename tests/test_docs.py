"""README and docs keep their word: what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.crash_campaign.points import POINTS
from job.exits import TABLE, Exit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
FAULTS = (ROOT / "docs/what-happens-when.md").read_text()
CRASHED = {"1", "137"}


def test_faults_name_existing_tests_and_codes():
    lines = [line for line in FAULTS.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert len(rows) > 18
    for row in rows:
        _, _, codes, _, test = row
        codes = {code.strip() for code in codes.split(",")} - {"", "its own"}
        assert codes <= {str(int(code)) for code in Exit} | CRASHED, row
        path, _, name = test.strip("`").partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests/job" / path).read_text(), re.MULTILINE), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_readme_links_every_page():
    """But for those of the engines, which the page about jobs links."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/jobs.md").read_text().replace("](", "](docs/")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"](docs/{page.name})" not in text] == []


def test_docs_count_the_points():
    assert f"`ARGS=--list` shows the {len(POINTS)})" in FAULTS


def test_thousands_have_separators():
    """But for what is typed, such as `train.batch_size=1024 images`."""
    counted = r"(?<!=)\{[^{}:]+\} (?:images|bytes|objects|problems|shards|entries|jobs)(?!/s)\b"
    sources = {path: path.read_text() for room in ("ddpm", "job") for path in (ROOT / room).rglob("*.py")}
    assert [(path.name, found) for path, text in sources.items() for found in re.findall(counted, text)] == []


def test_documented_exit_codes_are_right():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (\w+) \|$", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
    assert rows == [(str(int(code)), meaning.text, meaning.restart.name.lower()) for code, meaning in TABLE.items()]


@pytest.mark.slow
def test_the_notebook_runs():
    notebook = nbformat.read(ROOT / "docs/in-python.ipynb", as_version=4)
    kept = [_text(cell) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    assert [_text(cell) for cell in notebook.cells if cell.cell_type == "code"] == kept


def _text(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell says, but for its pictures: these are of other rounding on other machines."""
    return [output.get("text") or output["data"]["text/plain"] for output in cell.outputs]

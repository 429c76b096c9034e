"""README, docs and the image's locks keep their word, and tests see nothing of whoever runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.crash_campaign.points import POINTS
from job.exits import TABLE, Exit

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
FAULTS = (ROOT / "docs/what-happens-when.md").read_text()
CRASHED = {"1", "137"}
IN_IMAGE = ("gs", "s3", "az", "evaluate", "latents", "web", "parquet", "lsun", "tiff")
"""The extras that jobs have."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_faults_name_existing_tests_and_codes():
    lines = [line for line in FAULTS.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert len(rows) > 18
    for row in rows:
        codes, test = row[2], row[4]
        codes = {code.strip() for code in codes.split(",")} - {"", "its own"}
        assert codes <= {str(int(code)) for code in Exit} | CRASHED, row
        path, _, name = test.strip("`").partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests/job" / path).read_text(), re.MULTILINE), row
    assert f"`ARGS=--list` shows the {len(POINTS)})" in FAULTS


def test_links_lead_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert [row for row in links if "://" not in row[1] and not (row[0].parent / row[1]).exists()] == []
    # The README links every page, but for those of the engines, which the page about jobs links.
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/jobs.md").read_text().replace("](", "](docs/")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"](docs/{page.name})" not in text] == []


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

    def said() -> list[list[str]]:
        """Without pictures, which are of other rounding on other machines, and without notes and bars."""
        cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
        return [
            [output.get("text") or output["data"]["text/plain"] for output in outputs if output.get("name") != "stderr"]
            for outputs in cells
        ]

    kept = said()
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    assert said() == kept


def locked(name: str) -> dict[str, list[str]]:
    """The versions in a lock by package: several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([\w.+]+)", (DOCKER / name).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(package), []).append(version)
    return found


def test_locks_have_every_dependency():
    have = {**locked("requirements.txt"), **locked("requirements-torch-cuda.txt")}
    for text in [*PROJECT["dependencies"], *(text for name in IN_IMAGE for text in EXTRAS[name])]:
        needed = Requirement(text)
        versions = have.get(canonicalize_name(needed.name), [])
        assert versions, f"{text} is in no lock: make locks"
        assert all(needed.specifier.contains(version) for version in versions), f"{text}, not {versions}: make locks"


def test_extras_agree_on_shared_limits():
    """pip looks at what it is asked for: a limit that one extra's library has on another, all have that share it."""
    takes: dict[str, dict[str, bool]] = {}
    for extra in ("gs", "s3", "az", "kubernetes", "google"):
        for own in map(Requirement, EXTRAS[extra]):
            theirs = [Requirement(text) for text in requires(own.name) or ()]
            for one in [own, *theirs]:
                if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in ["", *own.extras]):
                    taken = takes.setdefault(canonicalize_name(one.name), {})
                    taken[extra] = taken.get(extra, True) and one.specifier.contains("999")
    assert takes.keys() >= {"python-dateutil", "google-auth", "botocore"}
    assert [name for name, by_extra in takes.items() if len({*by_extra.values()}) > 1] == []


def test_both_images_have_the_same_pytorch_and_every_package_is_hashed():
    cpu, cuda = locked("requirements-torch-cpu.txt"), locked("requirements-torch-cuda.txt")
    same = {name: [version.removesuffix("+cpu") for version in versions] for name, versions in cpu.items()}
    assert same == {name: cuda[name] for name in ("torch", "torchvision")}
    both = locked("requirements.txt").keys()
    assert not both & cuda.keys() and not [name for name in both if name.startswith(("nvidia-", "cuda-"))]
    for name in ("requirements.txt", "requirements-torch-cuda.txt", "requirements-build.txt"):
        blocks = re.split(r"^(?=\w)", (DOCKER / name).read_text(), flags=re.MULTILINE)[1:]
        assert blocks and all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks), name


THEIRS = """RANK LOCAL_RANK WORLD_SIZE NNODES NODE_RANK MASTER_ADDR MASTER_PORT KUBECONFIG AWS_PROFILE
    AWS_ENDPOINT_URL_S3 GOOGLE_APPLICATION_CREDENTIALS STORAGE_EMULATOR_HOST CLOUDSDK_CONFIG GCE_METADATA_HOST
    XDG_CACHE_HOME DDPM_BUCKET DDPM_CACHE DDPM_JOB DDPM_STOP_AT MAKEFLAGS MAKELEVEL ARGS https_proxy"""
LOOK = """
import json, os
import tests.conftest
from job.jobs.targets import load_targets
targets = {name: target.bucket for name, target in load_targets().items()}
print(json.dumps([targets, dict(os.environ), os.path.expanduser("~")]))
"""


@pytest.mark.slow
def test_tests_see_nothing_of_their_user(tmp_path):
    """Neither in the environment nor in the working folder: `tests/conftest.py` takes it away."""
    (tmp_path / "targets.yaml").write_text("local: {bucket: gs://theirs}\ngke: {backend: kubernetes, image: i}\n")
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    variables |= dict.fromkeys(THEIRS.split(), "theirs")
    variables |= {"DDPM_TARGETS": "targets.yaml", "DDPM_TEST_CONTAINERS": "kept"}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=tmp_path, env=variables, capture_output=True, check=True)
    targets, left, home = json.loads(done.stdout)
    assert targets == {"local": "", "container": ""}
    assert (sorted(left.keys() & set(THEIRS.split())), left["DDPM_TEST_CONTAINERS"]) == ([], "kept")
    assert home != str(tmp_path) and not Path(home).exists()

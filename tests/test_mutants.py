"""The count of mutants that tests notice, on a package of three functions whose tests miss some of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = """
def checked(x):
    if x < 0:
        raise ValueError
    return x

def in_child(x):
    return x + 5

def never(x):
    return x
"""
TESTS = """
import subprocess, sys
import pytest, tiny

def test_checked():
    assert tiny.checked(3) == 3
    with pytest.raises(ValueError):
        tiny.checked(-2)

def test_in_child():
    subprocess.run([sys.executable, "-c", "import tiny; assert tiny.in_child(2) == 7"], check=True)
"""


@pytest.mark.slow
def test_known_mutants_die_and_live(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "test_tiny.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def mutants(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.mutants", "tiny.py", "--tests", "test_tiny.py", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = mutants("--json", "before.json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "before.json").read_text())
    by_test = {(one["mutant"]["before"], one["mutant"]["after"], one["mutant"]["number"]): one["test"] for one in found}
    checked, in_child = "test_tiny.py::test_checked", "test_tiny.py::test_in_child"
    assert by_test == {
        ("x < 0", "(x <= 0)", 0): "",
        ("0", "1", 0): "",
        ("raise ValueError", "pass", 0): checked,
        ("return x", "return None", 0): checked,
        ("return x + 5", "return None", 0): in_child,
        ("x + 5", "(x - 5)", 0): in_child,
        ("5", "6", 0): in_child,
        ("return x", "return None", 1): "",
    }
    assert "5 of 8 mutants were noticed" in done.stdout
    assert (tmp_path / "tiny.py").read_text() == TINY

    (tmp_path / "one.json").write_text(json.dumps([one for one in found if one["mutant"]["after"] == "pass"]))
    assert mutants("--like", "one.json").returncode == 0
    weaker = TESTS.replace("with pytest.raises(ValueError):", "if False:")
    (tmp_path / "test_tiny.py").write_text(weaker)
    done = mutants("--like", "one.json")
    assert done.returncode == 1
    assert "WEAKER: tiny.py: 'raise ValueError' -> 'pass'" in done.stdout

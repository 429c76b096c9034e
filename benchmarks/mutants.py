"""Which small faults in a part of the program do its tests notice?

    python -m benchmarks.mutants job/store --tests tests/job/store --mutants 200 --seed 1 --json before.json
    python -m benchmarks.mutants job/store --tests tests/job/store --like before.json

A mutant is the program with one change: another comparison, a negated condition, a number plus one, a call, an
assignment, a `raise` or an argument left out, None returned. Coverage, which also counts child processes, names the
tests that execute the changed lines; these run against the mutant, in this checkout, the fastest first, until one fails
or hangs. With `--like` the mutants that were noticed before are made again, and each one that is not noticed now is
printed: then the tests have become weaker, and the exit code is 1. Files change meanwhile, so run it at the root of a
checkout of its own.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from coverage import CoverageData

from job.progress import Progress

ROOT = Path.cwd()
SECONDS = 60
"""Limit of the tests of a mutant, beside four times what they take without it."""
PAIRS = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv), (ast.And, ast.Or)),
)
OTHER = {ast.Div: ast.Mult, **dict(PAIRS), **{two: one for one, two in PAIRS}}
"""The operator that replaces an operator."""
# Gives what a test executes its name, also in the processes that it starts.
PLUGIN = """
import os, time
import coverage, pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    os.environ["DDPM_TEST"] = item.nodeid
    coverage.Coverage.current().switch_context(item.nodeid)
    began = time.monotonic()
    done = yield
    with open(os.environ["DDPM_TEST_TIMES"], "a") as file:
        print(item.nodeid, time.monotonic() - began, sep="\\t", file=file)
    return done
"""
CONFIGURATION = """
[run]
include = {root}/*
omit = {root}/.venv/*
context = ${{DDPM_TEST-}}
parallel = true
sigterm = true
disable_warnings = dynamic-conflict
concurrency = thread,multiprocessing,greenlet
data_file = {folder}/data
"""


@dataclass(frozen=True)
class Mutant:
    """One change in a file: a text, the text that replaces it, and the number of this pair among equal ones."""

    path: str
    before: str
    after: str
    number: int


def main() -> int:
    """Makes mutants and prints how many the tests notice; returns 1 if some that were noticed before are not now."""
    options = _options()
    paths = [path for subject in options.subjects for path in (sorted(subject.rglob("*.py")) or [subject])]
    mutants = [mutant for path in paths for mutant in mutants_of(str(path.resolve().relative_to(ROOT)))]
    if options.like:
        earlier = {Mutant(**each["mutant"]) for each in json.loads(options.like.read_text()) if each["test"]}
        mutants = [mutant for mutant in mutants if mutant in earlier]
        print(f"{len(mutants)} of {len(earlier)} mutants that died can be made again")
    else:
        mutants = random.Random(options.seed).sample(mutants, min(options.mutants, len(mutants)))
    words = [*options.tests, *(["-m", options.marks] if options.marks else [])]
    executing, seconds = tests_by_line(words)
    noticed: dict[Mutant, str] = {}
    with Progress("mutants", total=len(mutants), unit="mutants") as bar:
        for number, mutant in enumerate(mutants, start=1):
            with applied(mutant) as lines:
                by_line = executing.get(mutant.path, {})
                tests = {test: seconds[test] for line in lines for test in by_line.get(line, []) if test}
                noticed[mutant] = failing(tests, words) if tests else ""
            bar.update(number)
    if options.json:
        found = [{"mutant": asdict(mutant), "test": test} for mutant, test in noticed.items()]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for mutant in (mutant for mutant, test in noticed.items() if not test):
        print(f"{'WEAKER' if options.like else 'lives'}: {mutant.path}: {mutant.before!r} -> {mutant.after!r}")
    print(f"{sum(map(bool, noticed.values()))} of {len(noticed)} mutants were noticed")
    return int(bool(options.like) and not all(noticed.values()))


def mutants_of(path: str) -> list[Mutant]:
    """Returns the mutants of a file."""
    text = (ROOT / path).read_text()
    found, seen = [], Counter[tuple[str, str]]()
    for node in _nodes(ast.parse(text)):
        before = ast.get_source_segment(text, node) or ""
        for after in _changes(node):
            found.append(Mutant(path, before, after, seen[before, after]))
            seen[before, after] += 1
    return found


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields what a mutant can change: nothing in an annotation, a decorator or an f-string."""
    for name, field in ast.iter_fields(tree):
        for node in field if isinstance(field, list) else [field]:
            is_code = name not in ("annotation", "returns", "decorator_list")
            if is_code and isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield node
                yield from _nodes(node)


def _changes(node: ast.AST) -> Iterator[str]:
    """Yields the texts that replace a node, one for each mutant."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OTHER:
            yield _with(node, ops=[OTHER[type(operator)]()])
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OTHER:
            yield _with(node, op=OTHER[type(operator)]())
        case ast.UnaryOp(op=ast.Not()):
            yield _with(node.operand)
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int()):
            yield str(node.value + 1)
        case ast.Call(keywords=[*keywords]):
            for number in range(len(keywords)):
                yield _with(node, keywords=keywords[:number] + keywords[number + 1 :])
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case ast.Return(value=ast.AST()):
            yield "return None"


def _with(node: ast.AST, **fields: Any) -> str:
    """Returns the text of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


@contextmanager
def applied(mutant: Mutant) -> Iterator[range]:
    """Has a mutant in its file; yields the numbers of the lines that it changes."""
    path = ROOT / mutant.path
    content = path.read_bytes()
    text = content.decode()
    nodes = (node for node in _nodes(ast.parse(text)) if ast.get_source_segment(text, node) == mutant.before)
    node: Any = [node for node in nodes if mutant.after in _changes(node)][mutant.number]
    lines = content.splitlines(keepends=True)
    head, tail = lines[node.lineno - 1][: node.col_offset], lines[node.end_lineno - 1][node.end_col_offset :]
    try:
        _write(
            path, b"".join([*lines[: node.lineno - 1], head + mutant.after.encode() + tail, *lines[node.end_lineno :]])
        )
        yield range(node.lineno, node.end_lineno + 1)
    finally:
        _write(path, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    # Python takes compiled code for current if the time in seconds and the size of the source are the same.
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


def tests_by_line(words: list[str]) -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
    """Runs the tests, all of which must pass.

    Returns the names of those that execute a line, by file and line, and the seconds that each takes.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-mutants-") as name:
        folder = Path(name)
        (folder / "named.py").write_text(PLUGIN)
        configuration = folder / "configuration"
        configuration.write_text(CONFIGURATION.format(root=ROOT, folder=folder))
        # Each Python of this environment that starts meanwhile with the variable counts what it executes.
        hook = Path(sysconfig.get_paths()["purelib"], "ddpm_mutants.pth")
        hook.write_text("import coverage; coverage.process_startup()\n")
        try:
            variables = {"COVERAGE_PROCESS_START": str(configuration), "DDPM_TEST_TIMES": str(folder / "times")}
            output = _pytest([*words, "-p", "named"], None, **variables, PYTHONPATH=name)
        finally:
            hook.unlink(missing_ok=True)
        if output is None or re.search(r"^(FAILED|ERROR)", output, re.MULTILINE):
            sys.exit(f"the tests fail without a mutant:\n{output}")
        subprocess.run([sys.executable, "-m", "coverage", "combine", "--rcfile", str(configuration), "-q"], check=True)
        data = CoverageData(str(folder / "data"))
        data.read()
        times = dict(line.split("\t") for line in (folder / "times").read_text().splitlines())
        by_line = {str(Path(p).relative_to(ROOT)): data.contexts_by_lineno(p) for p in data.measured_files()}
        return by_line, {test: float(seconds) for test, seconds in times.items()}


def failing(seconds: dict[str, float], words: list[str]) -> str:
    """Returns the first of the tests (with their usual seconds) that fails; an empty text if they pass."""
    # Names with blanks or brackets of their own are words as they are.
    marks = words[words.index("-m") :] if "-m" in words else []
    output = _pytest([*sorted(seconds, key=seconds.__getitem__), "-x", *marks], SECONDS + 4 * sum(seconds.values()))
    if output is None:
        return "they hang"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[1] if found else ""


def _pytest(words: list[str], seconds: float | None, **variables: str) -> str | None:
    """Returns the output of tests, or None if they have not ended after so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rfE", "--tb=no", "-p", "no:cacheprovider", *words]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            return child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("subjects", nargs="+", type=Path, metavar="PATH", help="files and folders of the program")
    add("--tests", nargs="+", required=True, metavar="PATH", help="the tests, as pytest takes them")
    add("--marks", default="", metavar="EXPRESSION", help="pytest's -m, such as 'slow or not slow'")
    add("--mutants", type=int, default=200, metavar="N", help="how many, chosen at random (default: 200)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice (default: 0)")
    add("--like", type=Path, metavar="FILE", help="the mutants of an earlier run, by its --json")
    add("--json", type=Path, metavar="FILE", help="writes the mutants, each with the test that noticed it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.missing` names the packages that the project needs and that are not installed.

It imports none of them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def missing_packages() -> list[str]:
    """Returns the names of the project's dependencies, and of theirs, that are not installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    left, missing, known = list(project["dependencies"]), list[str](), set[str]()
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0]
        if name not in known:
            known.add(name)
            try:
                left += [one for one in requires(name) or () if ";" not in one]
            except PackageNotFoundError:
                missing.append(name)
    return sorted(missing)


if __name__ == "__main__":
    if missing := missing_packages():
        sys.exit(f"missing packages: {' '.join(missing)}; the head of benchmarks/gpu.sh says how to bring them")

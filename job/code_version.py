"""The version of this code with a hash of its sources, and the command that installs missing libraries."""

from __future__ import annotations

import hashlib
import shlex
import sys
from functools import cache
from pathlib import Path

from job import __version__

PACKAGES = ("ddpm", "job")


@cache
def code_version() -> str:
    """Returns `0.1.0+3f2a9c1b`: version, and a hash of the names and bytes of all modules and presets of `PACKAGES`."""
    root, sha256 = Path(__file__).parents[1], hashlib.sha256()
    paths = (path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in (".py", ".yaml"))
    for path in sorted(paths):
        source = path.read_bytes()
        sha256.update(f"{path.relative_to(root)}\0{len(source)}\0".encode() + source)
    return f"{__version__}+{sha256.hexdigest()[:8]}"


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra, from this package's checkout or wheel: no package index has it."""
    root = Path(__file__).parents[1]
    is_checkout = (root / "pyproject.toml").exists()
    what = ["--editable", f"{root}[{extra}]"] if is_checkout else [f"ddpm-job[{extra}] @ file:///PATH/TO/ITS/WHEEL.whl"]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])

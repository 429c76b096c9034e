"""Which code did something: the package's version, and a hash of its sources, which people change without a release."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from job import __version__

PACKAGES = ("ddpm", "job")


@cache
def code_version() -> str:
    """`0.1.0+3f2a9c1b`: the hash is over the names and bytes of all modules and presets of `PACKAGES`."""
    root, sha256 = Path(__file__).parents[1], hashlib.sha256()
    paths = (path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in (".py", ".yaml"))
    for path in sorted(paths):
        source = path.read_bytes()
        sha256.update(f"{path.relative_to(root)}\0{len(source)}\0".encode() + source)
    return f"{__version__}+{sha256.hexdigest()[:8]}"

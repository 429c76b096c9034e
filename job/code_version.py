"""Which code did something: the package's version, and a hash of its sources, which people change without a release."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from job import __version__

PACKAGES = ("ddpm", "job")


@cache
def code_version() -> str:
    """`0.1.0+3f2a9c1b`: the hash is over the names and bytes of all modules and presets of `PACKAGES`."""
    sha256 = hashlib.sha256()
    for package in PACKAGES:
        for name, source in sorted(_sources(files(package), package)):
            sha256.update(f"{name}\0{len(source)}\0".encode() + source)
    return f"{__version__}+{sha256.hexdigest()[:8]}"


def _sources(folder: Traversable, name: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            found += _sources(entry, path)
        elif entry.name.endswith((".py", ".yaml")):
            found.append((path, entry.read_bytes()))
    return found

"""The image's locks: everything that the program asks for, hashed, and the very PyTorch that is tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]
DOCKER = CHECKOUT / "docker"


def locked(name: str) -> dict[str, list[str]]:
    """The versions in a lock by package: several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([\w.+]+)", (DOCKER / name).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(package), []).append(version)
    return found


def test_all_that_the_program_needs_is_locked_in_versions_it_allows():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    have = {**locked("requirements.txt"), **locked("requirements-torch-cuda.txt")}
    for text in [*project["dependencies"], *extras["gs"], *extras["s3"]]:
        needed = Requirement(text)
        versions = have.get(canonicalize_name(needed.name), [])
        assert versions, f"{text} is in no lock: make locks"
        assert all(needed.specifier.contains(version) for version in versions), f"{text}, not {versions}: make locks"


def test_both_images_have_the_same_pytorch():
    cpu, cuda = locked("requirements-torch-cpu.txt"), locked("requirements-torch-cuda.txt")
    assert {name: [version.removesuffix("+cpu") for version in versions] for name, versions in cpu.items()} == {
        name: cuda[name] for name in ("torch", "torchvision")
    }
    assert not locked("requirements.txt").keys() & cuda.keys()
    assert not [name for name in locked("requirements.txt") if name.startswith(("nvidia-", "cuda-"))]


def test_every_package_is_hashed():
    for name in ("requirements.txt", "requirements-torch-cuda.txt", "requirements-build.txt"):
        blocks = re.split(r"^(?=\w)", (DOCKER / name).read_text(), flags=re.MULTILINE)[1:]
        assert blocks and all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks), name

"""The image's locks: everything that the program asks for, hashed, and the very PyTorch that is tested."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]
DOCKER = CHECKOUT / "docker"
IN_IMAGE = ("gs", "s3", "az", "evaluate", "latents", "web", "parquet", "lsun")
"""The extras that jobs have."""
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, list[str]]:
    """The versions in a lock by package: several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([\w.+]+)", (DOCKER / name).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(package), []).append(version)
    return found


def test_locks_have_every_dependency():
    extras = PROJECT["optional-dependencies"]
    have = {**locked("requirements.txt"), **locked("requirements-torch-cuda.txt")}
    for text in [*PROJECT["dependencies"], *(text for name in IN_IMAGE for text in extras[name])]:
        needed = Requirement(text)
        versions = have.get(canonicalize_name(needed.name), [])
        assert versions, f"{text} is in no lock: make locks"
        assert all(needed.specifier.contains(version) for version in versions), f"{text}, not {versions}: make locks"


def test_extras_agree_on_shared_limits():
    """pip looks at what it is asked for: a limit that one extra's library has on another, all have that share it."""
    takes: dict[str, dict[str, bool]] = {}
    for extra in ("gs", "s3", "az", "kubernetes", "google"):
        for own in map(Requirement, PROJECT["optional-dependencies"][extra]):
            theirs = [Requirement(text) for text in requires(own.name) or ()]
            for one in [own, *theirs]:
                if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in ["", *own.extras]):
                    taken = takes.setdefault(canonicalize_name(one.name), {})
                    taken[extra] = taken.get(extra, True) and one.specifier.contains("999")
    assert takes.keys() >= {"python-dateutil", "google-auth", "botocore"}
    assert [name for name, by_extra in takes.items() if len({*by_extra.values()}) > 1] == []


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

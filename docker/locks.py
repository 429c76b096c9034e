"""Writes the locks of the image anew from pyproject.toml: `make locks`.

    requirements-build.txt        what builds: uv and setuptools, which do not come into the image
    requirements-torch-cuda.txt   PyTorch for CUDA and what only it needs: the layer that is large and seldom changes
    requirements-torch-cpu.txt    PyTorch for CPUs, written by hand: it also says which version both images hold
    requirements.txt              everything else, the same for both

All versions come from one resolution, for every Python that the program supports.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
PINNED = "requirements-torch-cpu.txt"
EXTRAS = ("gs", "s3", "az", "evaluate", "latents", "web", "parquet", "lsun", "tiff")
ONLY_FOR_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)==")
HEADER = "# Written by `make locks`; do not edit.\n"


def main() -> None:
    """Writes the three locks; keeps the versions that pyproject.toml still allows unless told `--upgrade`."""
    arguments = sys.argv[1:]
    pins = re.findall(r"^(torch\w*==[\d.]+)", (FOLDER / PINNED).read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder, "pins.txt")
        versions.write_text("\n".join(pins))
        before = "".join((FOLDER / name).read_text() for name in _written() if (FOLDER / name).exists())
        everything = Path(folder, "requirements.txt")
        everything.write_text(before)
        extras = [word for extra in EXTRAS for word in ("--extra", extra)]
        _resolve(FOLDER.parent / "pyproject.toml", everything, [*extras, "--constraint", str(versions), *arguments])
        building = Path(folder, "build.in")
        building.write_text("uv\nsetuptools\n")
        build = FOLDER / "requirements-build.txt"
        _resolve(building, build, ["--constraint", str(everything), *arguments])
        build.write_text(HEADER + build.read_text())
        blocks = list(_blocks(everything.read_text()))
    for name, of_torch in _written().items():
        chosen = [block for block in blocks if bool(ONLY_FOR_TORCH.match(block)) == of_torch]
        (FOLDER / name).write_text(HEADER + "".join(chosen))
        print(f"{FOLDER / name}: {len(chosen)} packages")


def _written() -> dict[str, bool]:
    """The locks that the resolution is split into, and whether each holds PyTorch's part."""
    return {"requirements-torch-cuda.txt": True, "requirements.txt": False}


def _resolve(source: Path, lock: Path, words: list[str]) -> None:
    # What is written there already stays as it is where it can: uv reads the file before it writes it.
    lock.write_text("".join(_blocks(lock.read_text())) if lock.exists() else "")
    scope = ["--universal", "--python-version", "3.11"]
    style = ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    command = [sys.executable, "-m", "uv", "pip", "compile", str(source), *scope, *style]
    subprocess.run([*command, "--output-file", str(lock), *words], check=True, cwd=FOLDER.parent)


def _blocks(lock: str) -> Iterator[str]:
    """The requirements of a lock, each with the lines of its hashes."""
    block = ""
    for line in lock.splitlines(keepends=True):
        if line.startswith("#"):
            continue
        if not line.startswith(" ") and block:
            yield block
            block = ""
        block += line
    if block:
        yield block


if __name__ == "__main__":
    main()

"""A copy of this checkout, and programs on its PATH that write down how they are called instead of doing it.

gcloud and Terraform need an account of somebody's, so these stand in for them: they show the order, the quoting and
what a failure leads to, not that Google does as it is told.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = ("gcloud", "terraform", "docker", "podman", "kubectl", "gke-gcloud-auth-plugin", "curl", "make")
SYSTEM = "bash sh zsh env sed cat mktemp dirname rm tail head cksum tr cut mv mkdir cp python3 git pwd".split()  # noqa: SIM905
TOKEN = "ya29.secret-token"
PROJECT = "my-project"
IMAGE = f"us-central1-docker.pkg.dev/{PROJECT}/ddpm/ddpm:latest"
DIGEST = f"sha256:{'ab' * 32}"
BUCKET, DATA = f"gs://{PROJECT}-ddpm-runs", f"gs://{PROJECT}-ddpm-data"
TARGETS = f"vm:\n  backend: vm\n  project: {PROJECT}\n  zones: [us-central1-a]\n  image: {IMAGE}\n  bucket: {BUCKET}"

# Without site-packages it starts in half the time, and it starts a thousand times.
_PROGRAM = """#!{python} -IS
import json, os, sys
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
folder = Path({folder!r})
line = " ".join([name, *words])
read = not sys.stdin.isatty() and name in ("docker", "podman") and sys.stdin.read()
with (folder / "calls").open("a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if read:
    (folder / "standard-input").write_text(read)
for part, output, code in json.loads((folder / "answers").read_text()):
    if part in line:
        print(output)
        sys.exit(code)
"""

ANSWERS: list[tuple[str, str, int]] = [
    ("gcloud auth list", "me@example.com", 0),
    ("gcloud auth print-access-token", TOKEN, 0),
    ("gcloud config get-value project", PROJECT, 0),
    ("terraform plan", "", 2),
    ("show -json", '{"resource_changes": [{"address": "a.b", "change": {"actions": ["create"]}}]}', 0),
    ("output -raw bucket", BUCKET, 0),
    ("output -raw data_bucket", DATA, 0),
    ("output -raw image", IMAGE, 0),
    ("output -raw targets", TARGETS, 0),
    ("output -raw cluster", "ddpm us-central1-a", 0),
    ("output -raw kubernetes_account", "kind: ServiceAccount", 0),
    ("images describe", DIGEST, 0),
    ("ddpm data ensure", "", 66),
]
"""What a program prints, and its exit code, by a part of its command line; the first that fits counts."""
_QUERIES = ("auth list", "auth application-default", "auth print-access", "config get-value", "buckets describe")
_QUERIES += ("output -raw", "show -json", "data ensure", "images describe")


@dataclass
class Place:
    """The copy, and what was called in it."""

    folder: Path

    @property
    def checkout(self) -> Path:
        return self.folder / "my checkout"

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    def answer(self, *first: tuple[str, str, int]) -> None:
        """Sets what programs answer: `first` counts before the usual."""
        (self.folder / "answers").write_text(json.dumps([*first, *ANSWERS]))

    def calls(self) -> list[list[str]]:
        """What was called since the last time, and changes something."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        called = [json.loads(line) for line in lines]
        return [words for words in called if not any(query in " ".join(words) for query in _QUERIES)]

    def bash(self, script: str, *words: str, shell: str = "bash", **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a script in the copy; `$@` in it are `words`."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = {**kept, "PATH": str(self.programs), **variables}
        command = [shell, *(["-f"] if shell == "zsh" else []), "-c", script, shell, *words]
        return subprocess.run(
            command, cwd=self.checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=250,
        )  # fmt: skip

    def setup(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs `./setup.sh WORDS`."""
        return self.bash('./setup.sh "$@"', *words, **variables)


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.com", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def copy_checkout(folder: Path, but: tuple[str, ...] = ()) -> None:
    """All files that git knows, or would take, but those in folders of these names."""
    for name in git(CHECKOUT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        if (CHECKOUT / name).is_file() and not name.startswith(but):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)


def make_place(folder: Path) -> Place:
    """A copy of the checkout in a folder with a space in its name, whose programs are all recorded."""
    place = Place(folder)
    place.programs.mkdir(parents=True)
    copy_checkout(place.checkout, but=("tests/",))
    program = _PROGRAM.format(python=sys.executable, folder=str(folder))
    for name in PROGRAMS:
        _write_program(place.programs / name, program)
    _write_program(place.checkout / ".venv/bin/ddpm", program)
    for name in SYSTEM:
        found = shutil.which(name)
        if found and name != "python3":
            (place.programs / name).symlink_to(found)
    _write_program(place.programs / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    place.answer()
    return place


def real_program(place: Place) -> None:
    """Puts the real `ddpm` and `make` there, with nothing to install."""
    script = f'#!/bin/sh\nPYTHONPATH="$(dirname "$0")/../.." exec {sys.executable} -m job "$@"\n'
    _write_program(place.checkout / ".venv/bin/ddpm", script)
    (place.checkout / ".venv/.installed").touch()
    (place.programs / "make").unlink()
    (place.programs / "make").symlink_to(str(shutil.which("make")))


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

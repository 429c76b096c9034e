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
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = ("gcloud", "terraform", "docker", "podman", "kubectl", "gke-gcloud-auth-plugin", "curl", "make")
SYSTEM = "bash sh zsh env sed cat mktemp dirname rm tail head cksum tr cut mv mkdir cp git pwd diff ls grep"
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
Answer = tuple[str, str, int]
ANSWERS: list[Answer] = [
    ("gcloud auth list", "me@example.com", 0),
    ("gcloud auth print-access-token", TOKEN, 0),
    ("gcloud config get-value project", PROJECT, 0),
    ("buckets describe", "", 1),
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
"""What a program prints, and its exit code, by a part of its command line; the first that fits counts.

The bucket of Terraform's state is not there at first.
"""
_QUERIES = ("auth list", "auth application-default", "auth print-access", "config get-value", "buckets describe")
_QUERIES += ("output -raw", "show -json", "data ensure", "images describe")


class Place:
    """The copy, in a folder with a space in its name, whose programs are all recorded; and what was called in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.programs = folder, folder / "my checkout", folder / "bin"
        copy_checkout(self.checkout, but=("tests/",))
        program = _PROGRAM.format(python=sys.executable, folder=str(folder))
        for path in (*(self.programs / name for name in PROGRAMS), self.checkout / ".venv/bin/ddpm"):
            _write_program(path, program)
        for name in filter(shutil.which, SYSTEM.split()):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        _write_program(self.programs / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self.answer()

    def answer(self, *first: Answer) -> None:
        """Sets what programs answer: `first` counts before the usual."""
        (self.folder / "answers").write_text(json.dumps([*first, *ANSWERS]))

    def calls(self) -> list[list[str]]:
        """What was called since the last time, and changes something."""
        path = self.folder / "calls"
        called = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return [words for words in called if not any(query in " ".join(words) for query in _QUERIES)]

    def bash(self, script: str, *words: str, shell: str = "bash") -> subprocess.CompletedProcess[str]:
        """Runs a script in the copy; `$@` in it are `words`."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        command = [shell, *(["-f"] if shell == "zsh" else []), "-c", script, shell, *words]
        how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False, "timeout": 250}
        return subprocess.run(command, cwd=self.checkout, env={**kept, "PATH": str(self.programs)}, **how)

    def setup(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs `./setup.sh WORDS`, which must end with this code."""
        done = self.bash('./setup.sh "$@"', *words)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done

    def use_real_programs(self) -> None:
        """Puts the real `ddpm` and `make` there, with nothing to install."""
        script = f'#!/bin/sh\nPYTHONPATH="$(dirname "$0")/../.." exec {sys.executable} -m job "$@"\n'
        _write_program(self.checkout / ".venv/bin/ddpm", script)
        (self.checkout / ".venv/.installed").touch()
        (self.programs / "make").unlink()
        (self.programs / "make").symlink_to(str(shutil.which("make")))


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.com", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def copy_checkout(folder: Path, but: tuple[str, ...] = ()) -> None:
    """All files that git knows, or would take, but those in folders of these names."""
    for name in git(CHECKOUT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        if (CHECKOUT / name).is_file() and not name.startswith(but):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

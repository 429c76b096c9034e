"""Running `ddpm` as people do: in a process of its own, with words, an exit code and two streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DDPM = str(Path(sys.executable).with_name("ddpm"))

NETWORK = {
    "model.channels": "8",
    "model.channel_mults": "1,2",
    "model.norm_groups": "4",
    "model.attention_sizes": "8",
    "diffusion.timesteps": "50",
    "train.precision": "fp32",
    "train.batch_size": "24",
    "sample.images": "4",
    "sample.steps": "4",
    "log.every_images": "72",
}
"""A network that trains on the embedded images at 16 pixels in a second."""


def settings(**changes: str) -> list[str]:
    """`--set` options of the small network; a name's double underscore stands for the dot of a key."""
    chosen = NETWORK | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]


def environment(**changes: str) -> dict[str, str]:
    """What a child process sees: one thread, so that tests beside each other do not wait for each other."""
    inherited = {name: value for name, value in os.environ.items() if name != "DDPM_BUCKET"}
    return {**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **changes}


def ddpm(
    *words: object, program: tuple[str, ...] = (DDPM,), cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `ddpm WORDS` to its end."""
    return subprocess.run(
        [*program, *map(str, words)],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed; it must have ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line in which a command said why it ended with `code`."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("ddpm", "Error: "))]
    assert len(lines) == 1, done.stderr
    return lines[0]

"""Running `ddpm` as people do: words go in; an exit code and two streams come out."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import typer.main
from accelerate.state import AcceleratorState

import job.commands
from job.__main__ import errors_as_lines
from job.cli.app import app
from job.exits import JobError
from job.options import LaunchedOptions
from job.processes.launcher import LAUNCHED
from job.runs.records import check_writable
from job.stop import STOP_SIGNALS
from job.store import Store

DDPM = str(Path(sys.executable).with_name("ddpm"))
COMMANDS = typer.main.get_command(app)
"""Made once: at each call Typer would read the signatures of all commands, which takes longer than many of them."""

_NETWORK = """
    model.channels=8 model.channel_mults=1,2 model.norm_groups=4 model.attention_sizes=8 model.layers_per_level=2
    model.scale_shift=false diffusion.schedule=cosine diffusion.prediction=v diffusion.weighting=min_snr
    diffusion.stratified=false diffusion.draws=uniform diffusion.draws_mean=-1.2 diffusion.draws_std=1.2
    diffusion.timesteps=50 train.learning_rate=1e-3 train.precision=fp32 train.batch_size=24 sample.sampler=ddim
    sample.images=4 sample.steps=4 sample.every_epochs=0 log.every_images=72
"""
NETWORK = dict(setting.split("=") for setting in _NETWORK.split())
"""A network that trains on the embedded images at 16 pixels in a second."""


def settings(**changes: str) -> list[str]:
    """`--set` options of the small network; a name's double underscore stands for the dot of a key."""
    chosen = NETWORK | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]


def about(bucket: str | Path, run: str) -> list[str]:
    """Options of a run on the embedded images with a checkpoint at the end of each epoch."""
    return ["--dataset", "tiles", "--run", run, "--bucket", str(bucket), *settings(checkpoint__every_epochs="1")]


def environment(**changes: str) -> dict[str, str]:
    """What a child process sees: what is left by `tests/conftest.py`, and a wide terminal."""
    return {**os.environ, "COLUMNS": "200", **changes}


def ddpm(
    *words: object, program: tuple[str, ...] = (DDPM,), cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `ddpm WORDS` to its end in a process of its own."""
    return subprocess.run(
        [*program, *map(str, words)],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def on_screen(*words: object, columns: int) -> str:
    """What `ddpm WORDS` shows in a terminal of that width; it must end well."""
    ours, theirs = os.openpty()
    variables = environment(TERM="xterm", COLUMNS=str(columns))
    with (
        os.fdopen(ours, "rb") as shown,
        subprocess.Popen([DDPM, *map(str, words)], env=variables, stdout=theirs) as child,
    ):
        os.close(theirs)
        text = b""
        # Linux reports the end of a terminal as an error.
        with suppress(OSError):
            while part := os.read(shown.fileno(), 4096):
                text += part
    assert child.returncode == 0
    return text.decode()


def started(
    *words: object, program: tuple[str, ...] = (DDPM,), cwd: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Begins `ddpm WORDS` in a process group of its own; both of its streams come as one."""
    return subprocess.Popen(
        [*program, *map(str, words)],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run() -> None:
    """Runs the words of this process."""
    with errors_as_lines():
        COMMANDS()


def ddpm_here(*words: object, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Like `ddpm`, launcher and rank in this process: spares the seconds that importing torch takes.

    Variables that are None are not there.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    AcceleratorState._reset_state(reset_partial_state=True)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [DDPM, *map(str, words)])
        patch.delenv("DDPM_BUCKET", raising=False)

        def launch_here(request: LaunchedOptions, folder: Store, go: None = None) -> None:
            check_writable(folder)
            patch.setenv(LAUNCHED, str(os.getppid()))
            try:
                run()
            except SystemExit as end:
                if end.code:
                    raise

        patch.setattr(job.commands, "_launch", launch_here)
        patch.setattr("job.processes.launcher.early_ranks", lambda *_: nullcontext())
        for name, value in variables.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        try:
            run()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed; it must have ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def ran(*words: object, **variables: str | None) -> str:
    """What `ddpm_here` printed; it must have ended well."""
    return succeeded(ddpm_here(*words, **variables))


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line in which a command said why it ended with `code`."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("ddpm", "Error: "))]
    assert len(lines) == 1, done.stderr
    return lines[0]


def raised(
    kind: int | type[JobError], words: str, call: Callable[..., object], *args: object, **options: object
) -> str:
    """The line with which a call raises an error of this kind, or with this exit code."""
    with pytest.raises(JobError if isinstance(kind, int) else kind, match=words) as caught:
        pytest.fail(f"no error, but {call(*args, **options)}")
    assert kind in (caught.value.exit_code, type(caught.value)), caught.value
    return str(caught.value)


def refuses(rows: Iterable[tuple[Any, int, str]], *more: object, **variables: str | None) -> None:
    """Checks rows of words, the exit code and what the line says: these parts in this order, with … between them."""
    for words, code, parts in rows:
        words = words.split() if isinstance(words, str) else words
        line = refused(ddpm_here(*words, *more, **variables), code)
        assert re.search(".*".join(map(re.escape, parts.split(" … "))), line), (words, line)

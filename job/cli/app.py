"""The application: puts the nouns together and turns errors into one line and an exit code."""

import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, NoReturn, TextIO

import typer

from job.cli import data, doctor, figure, jobs, runs, sample, submit, train
from job.exits import Exit, JobError
from job.processes.launched import LOST_PEER, is_launched, is_rank, lost_peer

app = typer.Typer(
    name="ddpm",
    no_args_is_help=True,
    # Rich would read [/PREFIX] as markup, and need three times as long for --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.add_typer(figure.app, name="figure")
app.add_typer(runs.app, name="runs")
app.add_typer(submit.app, name="submit")
app.add_typer(jobs.app, name="jobs")
app.command("doctor")(doctor.doctor)

SAID_BY_RANK_0 = (Exit.STOPPED, Exit.NOT_A_NUMBER)
"""How all ranks end together, for the same reason."""


def _version(show: bool) -> None:
    if show:
        from job import __version__

        typer.echo(f"ddpm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The diffusion training job that never loses work: packs images, trains a DDPM on them and samples from it.

    Everything lies in a bucket: a folder, gs:// or s3://.

    Example: ddpm data pack photos.zip mine --size 64 && ddpm train --dataset mine
    """


def main() -> None:
    """Entry point of `ddpm` and `python -m job`; ends with a code of the table in `job.exits`, or 1 after a crash."""
    try:
        run()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        if not isinstance(end.code, int | None) or not (end.code or is_rank()):
            raise
        # The interpreter would wait for threads, of which one may be asking a bucket that keeps silent; and those of a
        # process group that is no more would abort it, so that the code would be SIGABRT.
        os._exit(end.code or 0)


def _flush(stream: TextIO) -> None:
    """What nobody takes any more is dropped: at its end the interpreter would try again, and end with 120."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run() -> None:
    """Does what the command line says; an error is told in one line.

    Raises:
        SystemExit: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show ×, ᾱ or the bytes of somebody's file name would end the command otherwise.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except JobError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if "No usable temporary directory" in str(error):
            _fail("no folder for temporary files can be written: free some space, or set TMPDIR", Exit.DISK_FULL)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"no space left on the disk{_at(error)}: free some, or set TMPDIR to a larger one", Exit.DISK_FULL)
        if isinstance(error, PermissionError):
            _fail(f"permission denied{_at(error)}: give this user access, or choose another place", Exit.NO_PERMISSION)
        raise
    except RuntimeError as error:
        if said := lost_peer(error):
            _fail(f"another process of this run went away ({said})", LOST_PEER)
        if said := _out_of_memory(error):
            _fail(said, 1)
        raise
    except MemoryError as error:
        _fail(_out_of_memory(error), 1)


def _out_of_memory(error: Exception) -> str:
    """What to say if memory ran out, here or on the GPU; empty for any other error."""
    torch, text = sys.modules.get("torch"), " ".join(str(error).split())
    is_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # PyTorch says it of the host's memory in a bare RuntimeError, and oneDNN in words that say nothing of memory.
    said_so = "can't allocate memory" in text or "could not create a primitive" in text
    if not (is_gpu or isinstance(error, MemoryError) or said_so):
        return ""
    said = f" ({text.removeprefix('CUDA out of memory. ').split('. ')[-1 if not is_gpu else 0]})" if text else ""
    return (
        f"memory ran out on the {'GPU' if is_gpu else 'machine'}{said}: train with a smaller train.micro_batch_size, "
        "which changes rounding and nothing else; what was saved is there, and the same command goes on from it"
    )


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # The launcher shows what a rank said if that one was the cause, and rank 0's in any case.
    # Whoever read it may be gone; the code is what engines decide by.
    with suppress(OSError):
        if rank == "0" or is_launched():
            print(f"ddpm: {message}", file=sys.stderr)
        elif code not in SAID_BY_RANK_0:
            print(f"ddpm (rank {rank}): {message}", file=sys.stderr)
    raise SystemExit(int(code))

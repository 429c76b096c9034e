"""The application: puts the nouns together and turns errors into one line and an exit code."""

import atexit
import os
import select
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from job import __version__
from job.cli import config, data, doctor, ema, evaluate, exchange, figure, jobs, report, runs, sample, submit, train
from job.exits import Exit, MissingInputError, ending_of
from job.processes.launched import LOST_PEER, is_launched, lost_peer
from job.progress import set_loudness

app = typer.Typer(
    name="ddpm",
    no_args_is_help=True,
    # Rich would read [/PREFIX] as markup, and need three times as long for --help.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(data.app, name="data")
app.command("train")(train.ddpm_train)
app.command("sample")(sample.ddpm_sample)
app.command("ema")(ema.ddpm_ema)
app.command("evaluate")(evaluate.ddpm_evaluate)
app.command("import")(exchange.ddpm_import)
app.command("export")(exchange.ddpm_export)
app.command("config")(config.ddpm_config)
app.add_typer(figure.app, name="figure")
app.add_typer(runs.app, name="runs")
app.command("report")(report.ddpm_report)
app.add_typer(submit.app, name="submit")
app.add_typer(jobs.app, name="jobs")
app.command("doctor")(doctor.doctor)


def _print_version(show: bool) -> None:
    if show:
        typer.echo(f"ddpm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also tell each request to a bucket, and how long it took.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell results and errors alone.")] = False,
    storage_options: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEME.OPTION=VALUE",
            help="Of fsspec, beside its own configuration, such as gs.requester_pays=my-project; may be repeated.",
        ),
    ] = None,
) -> None:
    """The diffusion training job that never loses work: packs images, trains a DDPM on them and samples from it.

    Everything lies in a bucket: a folder, or a URI such as gs://NAME.

    Example: ddpm data pack photos.zip mine --size 64 && ddpm train --dataset mine
    """
    set_loudness(verbose=verbose, quiet=quiet)
    if storage_options:
        from job.store import set_storage_options

        set_storage_options(storage_options)
    try:
        Path.cwd()
    except FileNotFoundError:
        # PyTorch's library of linear algebra would not load, and a relative path means nothing.
        raise MissingInputError("the working folder is gone: change to one that is there, with cd") from None


def main() -> None:
    """Entry point of `ddpm` and `python -m job`; ends with a code of the table in `job.exits`, or 1 after a crash."""
    try:
        run()
    except SystemExit as end:
        # Libraries clear away what they left for the end, such as a cluster's key in a temporary file.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # Nobody may take it any more.
            with suppress(OSError):
                stream.flush()
        # The interpreter would wait for threads, of which one may be asking a bucket that keeps silent; and those of a
        # process group that is no more would abort it, so that the code would be SIGABRT.
        os._exit(ending_of(end)[0])


def run() -> None:
    """Does what the command line says; an error is told in one line.

    Raises:
        SystemExit: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show ×, ᾱ or the bytes of somebody's file name would end the command otherwise.
            stream.reconfigure(errors="backslashreplace")
    output = os.fstat(1)
    try:
        app()
    except Exception as error:
        if said := lost_peer(error):
            _fail(f"another process of this run went away ({said})", LOST_PEER)
        code, said = ending_of(error)
        if not said:
            raise
        _fail(said, code)
    except SystemExit as end:
        # Typer ends with 1 when `head` or a pager closes the pipe, though the command did not fail; and for any other
        # pipe, where it did.
        left = isinstance(end.__context__, BrokenPipeError) and _is_unread(output)
        raise SystemExit(0 if left else end.code) from None


def _is_unread(output: os.stat_result) -> bool:
    """Returns whether nobody reads what a person's command prints; Rich has opened the null device there by then."""
    poll = select.poll()
    poll.register(1, 0)
    return not is_launched() and (bool(poll.poll(0)) or not os.path.samestat(os.fstat(1), output))


def _fail(message: str, code: int) -> NoReturn:
    # The launcher shows what a rank said if that one was the cause, and rank 0's in any case.
    rank = os.environ.get("RANK", "0")
    who = "ddpm" if rank == "0" or not rank.isdecimal() or is_launched() else f"ddpm (rank {rank})"
    # Whoever read it may be gone; the code is what engines decide by.
    with suppress(OSError):
        # That all were stopped is said once.
        if who == "ddpm" or code != Exit.STOPPED:
            print(f"{who}: {message}", file=sys.stderr)
    raise SystemExit(int(code))

"""The application: joins the commands, and turns an error into one line and an exit code."""

import atexit
import os
import select
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from job.cli import command, data, jobs, runs, sample
from job.exchange.exchange_requests import ExportRequest, ImportRequest
from job.exits import Exit, MissingInputError, ending_of
from job.processes.launched import is_launched, lost_peer
from job.progress import set_loudness
from job.requests import EvaluateRequest, SampleRequest, TrainRequest

_RESUMES = "--run NAME: the same command resumes that run"
_SAME = {
    "image_size": "--set data.size=VALUE",
    "lr": "--set train.learning_rate=VALUE",
    "mixed_precision": "--set train.precision=VALUE",
    "num_inference_steps": "--steps",
    "num_samples": "--count",
    "output_dir": "--bucket",
    "resolution": "--set data.size=VALUE",
    "resume": _RESUMES,
    "resume_from_checkpoint": _RESUMES,
    "train_data_dir": "--dataset",
}
"""The words to type for an option of other programs, by its name with underscores."""


class Commands(TyperGroup):
    """The group of all commands, whose error about an unknown option also knows settings and other programs."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Typer has a copy of Click. In both, only the error about an unknown option has `possibilities`.
            if hasattr(error, "possibilities"):
                _suggest(error)
            raise


def _suggest(error: Any) -> None:
    from job.config import CHOSEN_ELSEWHERE, known_keys

    name = error.option_name.lstrip("-").replace("-", "_")
    keys = [key for key in known_keys() if key.rpartition(".")[2] == name and key not in CHOSEN_ELSEWHERE]
    typed = [_SAME[name]] if name in _SAME else [f"--set {key}=VALUE" for key in keys]
    options = {option for each in error.ctx.command.params for option in each.opts}
    error.possibilities = [words for words in typed if words.split()[0] in options] or error.possibilities


app = typer.Typer(
    name="ddpm",
    cls=Commands,
    no_args_is_help=True,
    # Rich would read [/PREFIX] as markup, and --help would take three times as long.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(data.app, name="data")
command(app, "train", TrainRequest)(runs.ddpm_train)
command(app, "sample", SampleRequest)(sample.ddpm_sample)
command(app, "ema")(runs.ddpm_ema)
command(app, "evaluate", EvaluateRequest)(sample.ddpm_evaluate)
command(app, "import", ImportRequest)(runs.ddpm_import)
command(app, "export", ExportRequest)(runs.ddpm_export)
command(app, "config")(runs.ddpm_config)
app.add_typer(sample.app, name="figure")
app.add_typer(runs.app, name="runs")
command(app, "replay")(runs.ddpm_replay)
command(app, "report")(runs.ddpm_report)
app.add_typer(jobs.submit_app, name="submit")
app.add_typer(jobs.app, name="jobs")
command(app, "doctor")(jobs.ddpm_doctor)


def _print_version(show: bool) -> None:
    if show:
        from job import __version__

        typer.echo(f"ddpm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also log each request to a bucket, with its duration.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")] = False,
    storage_options: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEME.OPTION=VALUE",
            help="Option of an fsspec file system, such as gs.requester_pays=my-project; may be repeated.",
        ),
    ] = None,
) -> None:
    """Pack images, train a diffusion model (DDPM) on them and sample from it, in jobs that never lose work.

    All datasets and runs lie in a bucket: a folder, or a URI such as gs://NAME.

    Example: ddpm data pack photos.zip mine --size 64 && ddpm train --dataset mine
    """
    set_loudness(verbose=verbose, quiet=quiet)
    if storage_options:
        from job.store import set_storage_options

        set_storage_options(storage_options)
    try:
        Path.cwd()
    except FileNotFoundError:
        # Without a working folder PyTorch's library of linear algebra does not load, and relative paths mean nothing.
        raise MissingInputError("the working folder is gone: use cd to change to one that exists") from None


def main() -> None:
    """Runs `ddpm` or `python -m job`; ends with a code of the table in `job.exits`, or with 1 after a crash."""
    try:
        run()
    except SystemExit as end:
        # Libraries delete files at exit, such as a temporary file with a cluster's key.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # The reader of the stream may be gone.
            with suppress(OSError):
                stream.flush()
        # A normal exit waits for threads, and one may wait for a bucket that does not answer. The threads of a process
        # group that is gone would even abort the program, and its code would be SIGABRT.
        os._exit(ending_of(end)[0])


def run() -> None:
    """Runs the command line; prints an error as one line.

    Raises:
        SystemExit: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show ×, ᾱ or the bytes of a file name must not end the command.
            stream.reconfigure(errors="backslashreplace")
    output = os.fstat(1)
    try:
        app()
    except Exception as error:
        if said := lost_peer(error):
            _fail(f"another process of this run went away ({said})", Exit.LOST_PEER)
        code, said = ending_of(error)
        if not said:
            raise
        _fail(said, code)
    except SystemExit as end:
        # Typer ends with 1 for every broken pipe. One that `head` or a pager closes must not count as a failure.
        left = isinstance(end.__context__, BrokenPipeError) and _is_unread(output)
        raise SystemExit(0 if left else end.code) from None


def _is_unread(output: os.stat_result) -> bool:
    """Returns whether the reader of a person's command is gone. Rich has then put the null device in its place."""
    poll = select.poll()
    poll.register(1, 0)
    return not is_launched() and (bool(poll.poll(0)) or not os.path.samestat(os.fstat(1), output))


def _fail(message: str, code: int) -> NoReturn:
    # The launcher shows the last lines of rank 0, and of the rank that failed first.
    rank = os.environ.get("RANK", "0")
    who = "ddpm" if rank == "0" or not rank.isdecimal() or is_launched() else f"ddpm (rank {rank})"
    # The reader may be gone, and engines need only the exit code.
    with suppress(OSError):
        # All ranks stop together: rank 0 alone prints it.
        if who == "ddpm" or code != Exit.STOPPED:
            print(f"{who}: {message}", file=sys.stderr)
    raise SystemExit(int(code))

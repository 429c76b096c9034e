"""`ddpm submit`: the same commands, started where there are machines for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.cli import data, sample, train
from job.cli.options import Output, Targets

if TYPE_CHECKING:
    from job.jobs.command_line import ParsedCommand
    from job.jobs.spec import Verb

app = typer.Typer(
    help="Start a command as a job somewhere; only --on changes.\n\n"
    "Example: ddpm submit train --dataset celeba --on local",
    no_args_is_help=True,
)

_VERBS: dict[Verb, tuple[tuple[str, ...], Callable[..., None]]] = {
    "train": (("train",), train.ddpm_train),
    "sample": (("sample",), sample.ddpm_sample),
    "pack": (("data", "pack"), data.data_pack),
}
"""The command of each verb, and what it calls."""
_HELP: dict[Verb, str] = {
    "train": """Start `ddpm train` with the options that follow.

    See `ddpm train --help` for them. A run that is there is gone on with.

    Examples:

        ddpm submit train --dataset landscape-sample --on local --detach

        ddpm submit train --dataset celeba --on gke --gpus 8 --max-hours 48
    """,
    "sample": """Start `ddpm sample` with the options that follow.

    See `ddpm sample --help` for them.

    Example: ddpm submit sample --run celeba --count 50000 --slices 4 --on gke
    """,
    "pack": """Start `ddpm data pack` with the words that follow.

    See `ddpm data pack --help` for them. Elsewhere SOURCE must be a URI.

    Example: ddpm submit pack gs://photos/all.zip mine --size 64 --on gke
    """,
}

OnTarget = Annotated[
    str, typer.Option("--on", metavar="TARGET", help="Where: local, container, or a name of the file.")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", metavar="N", min=0, help="GPUs of each machine. Default: the target's.")
]
Nodes = Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Machines that train together.")]
GpuType = Annotated[str, typer.Option("--gpu-type", metavar="TYPE", help="Such as nvidia-l4. Default: the target's.")]
Spot = Annotated[
    bool | None,
    typer.Option(
        "--spot/--on-demand", help="Whether the machines may be taken away. Default: the target's.", show_default=False
    ),
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        "--max-hours", metavar="H", help="It is ended after so long; the plan says by whom. Default: the target's."
    ),
]
Slices = Annotated[
    int, typer.Option("--slices", metavar="N", min=0, help="Sample --count images on so many machines side by side.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")]
StayAndWatch = Annotated[
    bool, typer.Option("--watch", help="Stay, and submit it again where the engine gives up or has no machine.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; the job goes on in the background.")]


def _add_verb(verb: Verb) -> None:
    @app.command(verb, help=_HELP[verb], context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def submit_verb(
        context: typer.Context,
        on: OnTarget = "local",
        gpus: Gpus = None,
        nodes: Nodes = 1,
        gpu_type: GpuType = "",
        spot: Spot = None,
        max_hours: MaxHours = None,
        slices: Slices = 0,
        targets: Targets = None,
        dry_run: DryRun = False,
        output: Output = "",
        watch: StayAndWatch = False,
        yes: Yes = False,
        detach: Detach = False,
    ) -> None:
        from job.jobs.building import Resources
        from job.jobs.submit import SubmitOptions, submit

        resources = Resources(gpus, nodes, gpu_type, spot, max_hours, slices)
        options = SubmitOptions(dry_run, output, watch, yes, detach)
        submit(parsed(verb, context.args), on, targets, resources, options)


for _verb in _VERBS:
    _add_verb(_verb)


def parsed(verb: Verb, words: Sequence[str]) -> ParsedCommand:
    """Takes the words of a command line apart as `ddpm train`, `ddpm sample` or `ddpm data pack` would.

    Raises:
        click.UsageError: of the command line's library, which ends the program with 2 and tells the verb's usage.
    """
    from job.jobs.command_line import ParsedCommand

    path, function = _VERBS[verb]
    alone = typer.Typer(add_completion=False)
    alone.command()(function)
    command: Any = typer.main.get_command(alone)
    options = {
        each.name: () if each.param_type_name == "argument" else (each.opts[0], *each.secondary_opts)
        for each in command.params
    }
    with command.make_context(f"ddpm {' '.join(path)}", list(words)) as context:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
        return ParsedCommand(verb, path, options, dict(context.params), given)

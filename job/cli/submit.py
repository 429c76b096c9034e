"""`ddpm submit`: the same commands as jobs on other machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job.cli import data, evaluate, sample, train
from job.cli.options import OnTarget, Output, Targets

if TYPE_CHECKING:
    from job.jobs.command_line import ParsedCommand
    from job.jobs.spec import Verb

app = typer.Typer(
    help="Start a command as a job, such as on a cluster or a cloud VM.\n\n"
    "Example: ddpm submit train --dataset celeba --on local",
    no_args_is_help=True,
)

_VERBS: dict[Verb, tuple[str, Callable[..., None], str]] = {
    "train": ("train", train.ddpm_train, "train --dataset celeba --on gke --gpus 8 --max-hours 48"),
    "sample": ("sample", sample.ddpm_sample, "sample --run celeba --count 50000 --slices 4 --on gke"),
    "evaluate": ("evaluate", evaluate.ddpm_evaluate, "evaluate --run celeba --count 50000 --on gke"),
    "pack": ("data pack", data.data_pack, "pack gs://photos/all.zip mine --size 64 --slices 8 --on gke"),
    "index": ("data index", data.data_index, "index gs://theirs/{00000..00099}.tar laion --size 64 --on gke"),
    "encode": ("data encode", data.data_encode, "encode mine --autoencoder gs://models/vae --slices 8 --on gke"),
}
"""The command of each verb, its function, and an example."""


def _add_verb(verb: Verb) -> None:
    command, _, example = _VERBS[verb]

    @app.command(
        verb,
        help=f"Start `ddpm {command}` as a job. It takes all options of `ddpm {command} --help`, and these.\n\n"
        f"Example: ddpm submit {example}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def submit_verb(
        context: typer.Context,
        on: OnTarget = "local",
        gpus: Annotated[
            int | None, typer.Option(metavar="N", min=0, max=64, help="GPUs per machine. Default: the target's.")
        ] = None,
        nodes: Annotated[
            int, typer.Option(metavar="N", min=1, max=1000, help="Number of machines that train together.")
        ] = 1,
        gpu_type: Annotated[
            str, typer.Option(metavar="TYPE", help="Type of GPU, such as nvidia-l4. Default: the target's.")
        ] = "",
        spot: Annotated[
            bool | None,
            typer.Option(
                "--spot/--on-demand",
                help="Use cheap machines that may be preempted, or not. Default: the target's.",
                show_default=False,
            ),
        ] = None,
        max_hours: Annotated[
            float | None, typer.Option(metavar="H", help="End the job after H hours. Default: the target's.")
        ] = None,
        slices: Annotated[
            int,
            typer.Option(
                metavar="N", min=0, max=1000, help="Machines that share the work, such as 8; not for training."
            ),
        ] = 0,
        targets: Targets = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
        output: Output = "",
        watch: Annotated[
            bool,
            typer.Option("--watch", help="Wait, and submit again after preemptions, failures or lack of machines."),
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
        detach: Annotated[
            bool, typer.Option("--detach", help="Return at once; a local or container job runs in the background.")
        ] = False,
    ) -> None:
        from job.jobs.building import Resources
        from job.jobs.submit import submit

        resources = Resources(gpus, nodes, gpu_type, spot, max_hours=max_hours, slices=slices)
        command = parsed(verb, context.args)
        submit(command, on, targets, resources, dry_run=dry_run, output=output, watch=watch, yes=yes, detach=detach)


for _verb in _VERBS:
    _add_verb(_verb)


def parsed(verb: Verb, words: Sequence[str]) -> ParsedCommand:
    """Parses the words of a command line as the verb's own command does, such as `ddpm data pack`.

    Raises:
        click.UsageError: the words are wrong; the program then prints the verb's usage and ends with 2.
    """
    from job.jobs.command_line import ParsedCommand

    command_words, function, _ = _VERBS[verb]
    alone = typer.Typer(add_completion=False)
    alone.command()(function)
    command: Any = typer.main.get_command(alone)
    options = {
        each.name: () if each.param_type_name == "argument" else (each.opts[0], *each.secondary_opts)
        for each in command.params
    }
    with command.make_context(f"ddpm {command_words}", list(words)) as context:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
        return ParsedCommand(verb, tuple(command_words.split()), options, dict(context.params), given)

"""`ddpm submit`: the same commands, started where there are machines for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from job.cli.options import Output, Targets

if TYPE_CHECKING:
    from job.jobs.building import Wishes
    from job.jobs.spec import Verb
    from job.jobs.submit import Manner

app = typer.Typer(
    help="Start a command as a job somewhere; only --on changes.\n\n"
    "Example: ddpm submit train --dataset celeba --on local",
    no_args_is_help=True,
)

_REST = {"ignore_unknown_options": True, "allow_extra_args": True}

On = Annotated[str, typer.Option("--on", metavar="TARGET", help="Where: local, container, or a name of the file.")]
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
    int, typer.Option("--slices", metavar="N", min=0, help="Make --count images on so many machines side by side.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")]
Watch = Annotated[
    bool, typer.Option("--watch", help="Stay, and submit it again where the engine gives up or has no machine.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; the job goes on in the background.")]


@app.command("train", context_settings=_REST)
def train(
    context: typer.Context,
    on: On = "local",
    gpus: Gpus = None,
    nodes: Nodes = 1,
    gpu_type: GpuType = "",
    spot: Spot = None,
    max_hours: MaxHours = None,
    targets: Targets = None,
    dry_run: DryRun = False,
    output: Output = "",
    watch: Watch = False,
    yes: Yes = False,
    detach: Detach = False,
) -> None:
    """Start `ddpm train` with the options that follow.

    See `ddpm train --help` for them. A run that is there is gone on with.

    Examples:

        ddpm submit train --dataset landscape-sample --on local --detach

        ddpm submit train --dataset celeba --on gke --gpus 8 --max-hours 48
    """
    from job.jobs.building import Wishes
    from job.jobs.submit import Manner

    wishes = Wishes(gpus, nodes, gpu_type, spot, max_hours)
    _submit("train", context, on, targets, wishes, Manner(dry_run, output, watch, yes, detach))


@app.command("sample", context_settings=_REST)
def sample(
    context: typer.Context,
    on: On = "local",
    gpus: Gpus = None,
    gpu_type: GpuType = "",
    spot: Spot = None,
    max_hours: MaxHours = None,
    slices: Slices = 0,
    targets: Targets = None,
    dry_run: DryRun = False,
    output: Output = "",
    watch: Watch = False,
    yes: Yes = False,
    detach: Detach = False,
) -> None:
    """Start `ddpm sample` with the options that follow.

    See `ddpm sample --help` for them.

    Example: ddpm submit sample --run celeba --count 50000 --slices 4 --on gke
    """
    from job.jobs.building import Wishes
    from job.jobs.submit import Manner

    wishes = Wishes(gpus, 1, gpu_type, spot, max_hours, slices)
    _submit("sample", context, on, targets, wishes, Manner(dry_run, output, watch, yes, detach))


@app.command("pack", context_settings=_REST)
def pack(
    context: typer.Context,
    on: On = "local",
    spot: Spot = None,
    max_hours: MaxHours = None,
    targets: Targets = None,
    dry_run: DryRun = False,
    output: Output = "",
    watch: Watch = False,
    yes: Yes = False,
    detach: Detach = False,
) -> None:
    """Start `ddpm data pack` with the words that follow.

    See `ddpm data pack --help` for them. Elsewhere SOURCE must be a URI.

    Example: ddpm submit pack gs://photos/all.zip mine --size 64 --on gke
    """
    from job.jobs.building import Wishes
    from job.jobs.submit import Manner

    wishes = Wishes(spot=spot, max_hours=max_hours)
    _submit("pack", context, on, targets, wishes, Manner(dry_run, output, watch, yes, detach))


def _submit(verb: Verb, context: typer.Context, on: str, targets: Path | None, wishes: Wishes, manner: Manner) -> None:
    from job.cli.words import parsed
    from job.jobs.submit import submit

    submit(parsed(verb, context.args), on, targets, wishes, manner)

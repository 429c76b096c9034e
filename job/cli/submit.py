"""`ddpm submit`: the same commands, started where there are machines for them."""

from typing import Annotated

import typer

app = typer.Typer(
    help="Start a command as a job somewhere; only --on changes.\n\n"
    "Example: ddpm submit train --dataset celeba --on local",
    no_args_is_help=True,
)


@app.command("train", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def train(
    context: typer.Context,
    on: Annotated[str, typer.Option("--on", metavar="TARGET", help="Where: local (this machine).")] = "local",
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the job goes on in the background.")
    ] = False,
) -> None:
    """Start `ddpm train` with the options that follow.

    See `ddpm train --help` for them.

    Example: ddpm submit train --dataset landscape-sample --on local --detach
    """
    from job.submit import submit

    submit("train", context.args, on, detach)

"""The options of how images are drawn, for several commands: one for each setting that the catalogue lists."""

from collections.abc import Callable
from dataclasses import Field, fields
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ddpm.catalogue import Drawing, takers
from job.cli import completion

_OWN_OPTIONS = {"autoguidance", "autoguidance_run", "labels"}
"""Settings whose options say more, such as `--classes` by name for `labels`."""


def with_drawing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the command's `**drawing` by an option for each setting of `Drawing`, before `--classes`."""
    whole = signature(command)
    own = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for parameter in whole.parameters.values()
        if parameter.kind is not Parameter.VAR_KEYWORD
    ]
    place = [parameter.name for parameter in own].index("classes")
    added = [_option(field) for field in fields(Drawing) if field.name not in _OWN_OPTIONS]
    command.__signature__ = whole.replace(parameters=[*own[:place], *added, *own[place:]])  # type: ignore[attr-defined]
    return command


def _option(field: Field[Any]) -> Parameter:
    takes, *metadata = get_args(field.type)
    sentence = next(part for part in metadata if isinstance(part, str))
    choices = get_args(takes) if get_origin(takes) is Literal else ()
    only = f" Only for {', '.join(takers(field.name))}." if takers(field.name) else ""
    one_of = f" One of {', '.join(choices)}." if choices else ""
    name, typed = field.name.replace("_", "-"), takes if takes in (bool, int, float) else str
    option = typer.Option(
        f"--{name}/--no-{name}" if takes is bool else f"--{name}",
        metavar={bool: None, int: "N", float: "X"}.get(takes, "NAME" if choices or takes is str else "A,B"),
        help=f"{sentence[0].upper()}{sentence[1:]}.{only}{one_of}",
        autocompletion=completion.names(choices) if choices else None,
    )
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[typed | None, option])

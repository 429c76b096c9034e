"""The options of how images are drawn, for several commands: one for each setting that the catalogue lists."""

from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from annotated_types import Interval

from ddpm.catalogue import LARGEST, Drawing, takers
from job.cli import completion

_OWN_OPTIONS = {"autoguidance", "autoguidance_run", "labels"}
"""Settings whose options say more, such as `--classes` by name for `labels`."""


def with_drawing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the command's `**drawing` by an option for each setting of `Drawing`, before `--classes`."""
    whole = signature(command)
    own = [parameter for parameter in whole.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    place = [parameter.name for parameter in own].index("classes")
    added = [
        Parameter(field.name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_option(field.name, field.type))
        for field in fields(Drawing)
        if field.name not in _OWN_OPTIONS
    ]
    command.__signature__ = whole.replace(parameters=[*own[:place], *added, *own[place:]])  # type: ignore[attr-defined]
    return command


def _option(name: str, annotation: Any) -> Any:
    takes, *metadata = get_args(annotation)
    sentence = next(part for part in metadata if isinstance(part, str))
    limits = next((part for part in metadata if isinstance(part, Interval)), Interval())
    choices = get_args(takes) if get_origin(takes) is Literal else ()
    only = f" Only for {', '.join(takers(name))}." if takers(name) else ""
    one_of = f" One of {', '.join(choices)}." if choices else ""
    option = name.replace("_", "-")
    metavar = {int: "N", float: "X", str: "NAME"}.get(takes, "NAME" if choices else "A,B")
    if limits.ge is not None and limits.le is not None and limits.le != LARGEST:
        metavar = f"{limits.ge}..{limits.le}"
    typed = takes if takes in (bool, int, float) else str
    return Annotated[
        typed | None,
        typer.Option(
            f"--{option}/--no-{option}" if takes is bool else f"--{option}",
            metavar=None if takes is bool else metavar,
            help=f"{sentence[0].upper()}{sentence[1:]}.{only}{one_of}",
            autocompletion=completion.names(choices) if choices else None,
        ),
    ]

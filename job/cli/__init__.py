"""The command line. Here a request, or the parameters of a function, become a command with shell completion.

`app` has the commands.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from inspect import Parameter, Signature, getdoc, signature
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from ddpm.image_size import ImageSize
from job.exits import BadRequestError, did_you_mean
from job.options import Option, options_of, request_of

COMPLETION_SECONDS = 3.0
"""The longest time that a bucket has to answer after a press of Tab."""


def command(
    app: typer.Typer, name: str, work: str | Callable[..., None], *declarations: Callable[..., Any], **settings: Any
) -> None:
    """Adds a command.

    The options of further requests than the last one work, but the help does not repeat them.

    Args:
        app: the group of the command.
        name: of the command.
        work: a function, or its module and name, such as `job.commands:pack_command`, which a call imports. It takes
            the requests; or the bucket, and the other options by name.
        declarations: requests, dataclasses whose fields are options; or one function, whose parameters are the options.
            The help is the docstring of the first.
        settings: of Typer's command.
    """
    requests = [each for each in declarations if isinstance(each, type)]
    lists = [[*chain(*options_of(kind).values())] for kind in requests]
    lists = lists or [[*signature(declarations[0]).parameters.values()]]
    parameters = [_for_typer(each, hidden=many is not lists[-1]) for many in lists for each in many]

    def run(**values: Any) -> None:
        called = resolve_name(work) if isinstance(work, str) else work
        if requests:
            called(*(request_of(kind, values) for kind in requests))
        else:
            called(*([values.pop("bucket")] if "bucket" in values else ()), **values)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    app.command(name, **{"help": getdoc(declarations[0]), **settings})(run)


def group(help: str, example: str) -> typer.Typer:
    """Returns a group of commands."""
    return typer.Typer(help=f"{help}\n\nExample: {example}", no_args_is_help=True)


def _for_typer(parameter: Parameter, *, hidden: bool) -> Parameter:
    """Returns a parameter whose `Option` is one of Typer."""
    takes, option = get_args(parameter.annotation)
    if get_origin(takes) is tuple:
        # Typer takes a tuple for a fixed number of values.
        takes = list[str]
    settings = {
        "help": option.help,
        "metavar": option.metavar,
        "min": option.min,
        "max": option.max,
        "hidden": hidden,
        "parser": _parser(takes, option),
        "callback": usual_bucket if parameter.name == "bucket" else None,
        "autocompletion": (lambda: [*option.choices]) if option.choices else _COMPLETED.get(option.words.split()[0]),
    }
    made = typer.Option(*option.flags, **settings) if option.flags else typer.Argument(**settings)
    return parameter.replace(annotation=Annotated[takes, made], kind=Parameter.KEYWORD_ONLY)


def _parser(takes: Any, option: Option) -> Callable[[str], Any] | None:
    """Returns what reads the value of an option, with errors of its own; None for what Typer reads."""

    def one_of(text: str) -> str:
        if text and text not in option.choices:
            there = f"{', '.join(filter(None, option.choices))}{did_you_mean(text, option.choices)}"
            raise BadRequestError(f"{option.flags[0]} {text!r}: use {there}")
        return text

    def matching(text: str) -> str:
        if text and not re.fullmatch(option.pattern, text):
            raise BadRequestError(f"{option.flags[0]} {text!r} is not valid; from its help: {option.help}")
        return text

    def file(text: str) -> Path:
        path, suffix = Path(text), f".{str(option.metavar).lower()}"
        if path.suffix.lower() != suffix or path.is_dir() or not path.parent.is_dir():
            raise BadRequestError(f"--output {path}: name a file that ends in {suffix}, in a folder that is there")
        return path

    if ImageSize in get_args(takes):
        return _size
    if option.pattern:
        return matching
    # A setting of sampling has choices too: its request checks it, as it may be a function of the user.
    return file if option.metavar in ("PNG", "HTML") else one_of if option.choices and takes is str else None


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
        except Exception as raised:
            error: Any = raised
            # Typer has a copy of Click. In both, only the error about an unknown option has `possibilities`.
            if hasattr(error, "possibilities"):
                _suggest(error)
            raise


def _suggest(error: Any) -> None:
    from job.config import CHOSEN_ELSEWHERE, known_keys

    name = error.option_name.lstrip("-").replace("-", "_")
    keys = [key for key in known_keys() if key.rpartition(".")[2] == name and key not in CHOSEN_ELSEWHERE]
    keys.sort(key=lambda key: not key.startswith("train."))
    typed = [_SAME[name]] if name in _SAME else [f"--set {key}=VALUE" for key in keys]
    options = {option for each in error.ctx.command.params for option in each.opts}
    error.possibilities = [words for words in typed if words.split()[0] in options] or error.possibilities


def usual_bucket(context: typer.Context, given: str = "") -> str:
    """Returns the bucket of a command: the given one, else the usual one of its target, else that of `local`."""
    if given:
        # As in all jobs and ranks: spares the imports.
        return given
    from job.jobs.targets import target_on

    return target_on(context.params.get("on") or "local", context.params.get("targets")).usual_bucket


def _size(text: str) -> ImageSize:
    from job.config.schema import image_size

    try:
        return image_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text:.40}: {error}") from None


def _in_bucket(folder: str) -> Callable[[typer.Context], list[str]]:
    def names(context: typer.Context) -> list[str]:
        from job.store import open_store

        # An error message in the middle of a command line would disturb more than it helps.
        with suppress(Exception):
            bucket = open_store(usual_bucket(context, context.params.get("bucket") or ""))
            return sorted(bucket.within(COMPLETION_SECONDS).folders(folder))
        return []

    return names


def _datasets(context: typer.Context) -> list[str]:
    # Their folders end with their size.
    return sorted({folder.rpartition("-")[0] for folder in _in_bucket("datasets")(context)})


def _presets() -> list[str]:
    from job.config import preset_names

    return preset_names()


def _targets(context: typer.Context) -> list[str]:
    from job.jobs.targets import load_targets

    with suppress(Exception):
        return sorted(load_targets(context.params.get("targets")))
    return []


def _keys() -> list[str]:
    from job.config import CHOSEN_ELSEWHERE, known_keys

    return sorted(f"{key}=" for key in {*known_keys()} - CHOSEN_ELSEWHERE.keys())


_RUNS = _in_bucket("runs")
_COMPLETED = {
    "--dataset": _datasets,
    "--from": _RUNS,
    "--on": _targets,
    "--preset": _presets,
    "--run": _RUNS,
    "--set": _keys,
    "JOB": _in_bucket("jobs"),
    "NAME": _datasets,
    "OTHER": _RUNS,
    "RUN": _RUNS,
    "[RUN]": _RUNS,
}
"""The shell completion of values by the option's first word, from the bucket if it answers in time."""

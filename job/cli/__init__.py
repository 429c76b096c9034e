"""The command line. Here a request, or the parameters of a function, become a command with shell completion.

`app` has the commands.
"""

from collections.abc import Callable
from contextlib import suppress
from inspect import Parameter, Signature, getdoc, signature
from itertools import chain
from pkgutil import resolve_name
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from ddpm.image_size import ImageSize
from job.options import options_of, request_of

COMPLETION_SECONDS = 3.0
"""The longest time that a bucket has to answer after a press of Tab."""
Work = Callable[..., None]


def command(app: typer.Typer, name: str, *requests: type, **settings: Any) -> Callable[[Work], Work]:
    """Decorates the work of a command, which takes these requests; without any, its parameters are the options.

    The options of further requests than the last one work, but the help does not repeat them.

    Args:
        app: the group of the command.
        name: of the command.
        requests: dataclasses whose fields are options. The help is the docstring of the first one, or of the function.
        settings: of Typer's command.
    """

    def add(work: Work) -> Work:
        lists = [[*chain(*options_of(kind).values())] for kind in requests] or [[*signature(work).parameters.values()]]
        parameters = [_for_typer(each, hidden=many is not lists[-1]) for many in lists for each in many]

        def run(**values: Any) -> None:
            if requests:
                work(*(request_of(kind, values) for kind in requests))
            else:
                work(**values)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        app.command(name, **{"help": getdoc(requests[0] if requests else work), **settings})(run)
        return work

    return add


def group(help: str, example: str) -> typer.Typer:
    """Returns a group of commands."""
    return typer.Typer(help=f"{help}\n\nExample: {example}", no_args_is_help=True)


def late(work: str) -> Work:
    """Returns the work that lies in a module, such as `job.commands:pack_command`; a call imports it."""
    return lambda *requests: resolve_name(work)(*requests)


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
        "parser": _size if ImageSize in get_args(takes) else None,
        "callback": usual_bucket if parameter.name == "bucket" else None,
        "autocompletion": (lambda: [*option.choices]) if option.choices else _COMPLETED.get(parameter.name),
    }
    made = typer.Option(*option.flags, **settings) if option.flags else typer.Argument(**settings)
    return parameter.replace(annotation=Annotated[takes, made], kind=Parameter.KEYWORD_ONLY)


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
    "dataset": _datasets,
    "from_": _RUNS,
    "job": _in_bucket("jobs"),
    "name": _datasets,
    "on": _targets,
    "other": _RUNS,
    "preset": _presets,
    "run": _RUNS,
    "sets": _keys,
}
"""The shell completion of values by the parameter's name, from the bucket if it answers in time."""

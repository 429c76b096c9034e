"""The words of a verb: checked by the verb's own parser, and written down again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from job.cli import data, sample, train

if TYPE_CHECKING:
    from job.data.pack import PackRequest
    from job.jobs.spec import Verb
    from job.requests import SampleRequest, TrainRequest

_VERBS: dict[Verb, tuple[tuple[str, ...], Callable[..., None]]] = {
    "train": (("train",), train.train),
    "sample": (("sample",), sample.sample),
    "pack": (("data", "pack"), data.pack),
}
"""The command of each verb, and what it calls."""
_FIELDS = {"config": "config_file", "wait": "wait_seconds", "slice_": "slice"}
"""Parameters that a request calls otherwise."""


@dataclass(frozen=True)
class Words:
    """A verb and what was said about it."""

    verb: Verb
    values: Mapping[str, Any]
    """By parameter, with defaults and the environment filled in."""
    given: frozenset[str]
    """The parameters that were words of the command line."""

    def saying(self, **values: Any) -> Words:
        """The same, with these parameters given as well."""
        return replace(self, values={**self.values, **values}, given=self.given | set(values))

    def without(self, name: str) -> Words:
        """The same, with a parameter left out."""
        return replace(self, values={**self.values, name: None}, given=self.given - {name})

    def request(self) -> TrainRequest | SampleRequest | PackRequest:
        """What is asked for, not checked yet."""
        from job.data.pack import PackRequest
        from job.requests import SampleRequest, TrainRequest

        kinds: dict[Verb, type[TrainRequest | SampleRequest | PackRequest]] = {
            "train": TrainRequest,
            "sample": SampleRequest,
            "pack": PackRequest,
        }
        kind = kinds[self.verb]
        values = {_FIELDS.get(name, name): value for name, value in self.values.items()}
        if kind is TrainRequest:
            values["sets"] = tuple(values["sets"] or ())
        return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})

    def argv(self) -> tuple[str, ...]:
        """What comes after `ddpm`: arguments as they are, then what was given, each in the order of the parameters."""
        path, function = _VERBS[self.verb]
        arguments, options = [], []
        for parameter in _command(function).params:
            value = self.values.get(parameter.name or "")
            if parameter.name not in self.given or value is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(str(value))
            elif isinstance(value, bool):
                # An option that is off by default has no word for off.
                options += [*parameter.opts[:1]] if value else [*parameter.secondary_opts[:1]]
            else:
                for text in map(_text, value if isinstance(value, list | tuple) else (value,)):
                    # In one word where the value would be taken for an option.
                    options += [f"{parameter.opts[0]}={text}"] if text.startswith("-") else [parameter.opts[0], text]
        if any(word.startswith("-") for word in arguments):
            return (*path, *options, "--", *arguments)
        return (*path, *arguments, *options)


def parsed(verb: Verb, words: Sequence[str]) -> Words:
    """Takes the words of a command line apart as `ddpm train`, `ddpm sample` or `ddpm data pack` would.

    Raises:
        click.UsageError: of the command line's library, which ends the program with 2 and tells the verb's usage.
    """
    path, function = _VERBS[verb]
    command = _command(function)
    with command.make_context(f"ddpm {' '.join(path)}", list(words)) as context:
        given = frozenset(
            name
            for name in context.params
            if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        )
        return Words(verb, dict(context.params), given)


def _command(function: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)

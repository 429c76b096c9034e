"""A command of this program as its own parser read it: what can be looked at, changed, and written down again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from job.data.pack import PackRequest
from job.jobs.spec import Verb
from job.requests import SampleRequest, TrainRequest

_REQUESTS: dict[Verb, type[TrainRequest | SampleRequest | PackRequest]] = {
    "train": TrainRequest,
    "sample": SampleRequest,
    "pack": PackRequest,
}
_FIELDS = {"config": "config_file", "wait": "wait_seconds", "slice_": "slice"}
"""Parameters that a request calls otherwise."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command: an option by its words, or an argument, which has none."""

    name: str
    option: str = ""
    option_off: str = ""
    """For the value false, such as `--no-classes`."""


@dataclass(frozen=True)
class ParsedCommand:
    """A command line, taken apart.

    Attributes:
        verb: what it does.
        command: the words between `ddpm` and the parameters, such as `("data", "pack")`.
        parameters: all that the command has.
        values: by parameter, with defaults and the environment filled in.
        given: the parameters that were words of the command line.
    """

    verb: Verb
    command: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    values: Mapping[str, Any]
    given: frozenset[str]

    def with_values(self, **values: Any) -> ParsedCommand:
        """The same, with these parameters given as well."""
        return replace(self, values={**self.values, **values}, given=self.given | set(values))

    def without(self, name: str) -> ParsedCommand:
        """The same, with a parameter left out."""
        return replace(self, values={**self.values, name: None}, given=self.given - {name})

    def request(self) -> TrainRequest | SampleRequest | PackRequest:
        """What is asked for, not checked yet."""
        kind = _REQUESTS[self.verb]
        values = {_FIELDS.get(name, name): value for name, value in self.values.items()}
        if kind is TrainRequest:
            values["sets"] = tuple(values["sets"] or ())
        return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})

    def argv(self) -> tuple[str, ...]:
        """What comes after `ddpm`: arguments, then options, each in the order of the parameters.

        Equal commands give equal words, however they were typed.
        """
        arguments: list[str] = []
        options: list[str] = []
        for parameter in self.parameters:
            value = self.values.get(parameter.name)
            if parameter.name not in self.given or value is None:
                continue
            if not parameter.option:
                arguments.append(str(value))
            elif isinstance(value, bool):
                # An option that is off by default has no word for off.
                options += filter(None, [parameter.option if value else parameter.option_off])
            else:
                for text in map(_text, value if isinstance(value, list | tuple) else (value,)):
                    options += [parameter.option, text]
        if any(word.startswith("-") for word in arguments):
            return (*self.command, *options, "--", *arguments)
        return (*self.command, *arguments, *options)


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)

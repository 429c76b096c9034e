"""A command of this program as its own parser read it, which can be changed and written as words again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from job.data.pack_request import PackRequest
from job.jobs.spec import Verb
from job.requests import EncodeRequest, EvaluateRequest, SampleRequest, TrainRequest, chosen_of

R = TypeVar("R")
AnyRequest = TrainRequest | SampleRequest | EvaluateRequest | PackRequest | EncodeRequest
_REQUESTS: dict[Verb, type[AnyRequest]] = {
    "train": TrainRequest,
    "sample": SampleRequest,
    "evaluate": EvaluateRequest,
    "pack": PackRequest,
    "index": PackRequest,
    "encode": EncodeRequest,
}
_REQUEST_FIELDS = {"config": "config_file", "wait": "wait_seconds", "slice_": "slice"}
"""The parameters that have another name in a request."""


@dataclass(frozen=True)
class ParsedCommand:
    """A parsed command line.

    Attributes:
        verb: of the job.
        command: the words between `ddpm` and the parameters, such as `("data", "pack")`.
        options: the words of each parameter, in order: `("--gif",)`, `("--classes", "--no-classes")`, none for an
            argument.
        values: by parameter, with defaults and the environment filled in.
        given: the parameters that were words of the command line.
    """

    verb: Verb
    command: tuple[str, ...]
    options: Mapping[str, Sequence[str]]
    values: Mapping[str, Any]
    given: frozenset[str]

    def with_values(self, **values: Any) -> ParsedCommand:
        """Returns the same command with these parameters; None removes one."""
        return replace(self, values={**self.values, **values}, given=self.given | set(values))

    def request(self) -> AnyRequest:
        """Returns the request, not checked yet."""
        return request_of(_REQUESTS[self.verb], self.values)

    def argv(self) -> tuple[str, ...]:
        """Returns the words after `ddpm`: arguments, then options, each in the order of the parameters.

        Equal commands give equal words, however they were typed.
        """
        arguments: list[str] = []
        words: list[str] = []
        for name, option in self.options.items():
            value = self.values.get(name) if name in self.given else None
            if value is None:
                continue
            many = value if isinstance(value, list | tuple) else [value]
            if not option:
                arguments += map(str, many)
            elif isinstance(value, bool):
                # An option that is off by default has no word for off.
                words += option[:1] if value else option[1:2]
            else:
                words += [word for one in many for word in (option[0], _text(one))]
        if any(word.startswith("-") for word in arguments):
            return (*self.command, *words, "--", *arguments)
        return (*self.command, *arguments, *words)


def request_of(kind: type[R], parameters: Mapping[str, Any]) -> R:
    """Returns a request whose fields are the parameters of a command."""
    values = {_REQUEST_FIELDS.get(name, name): value for name, value in parameters.items()}
    if kind is TrainRequest:
        values["sets"] = tuple(values["sets"] or ())
    elif kind in (SampleRequest, EvaluateRequest):
        values["chosen"] = chosen_of(values)
    elif "tars" in values:
        values |= {"source": "", "tars": tuple(values["tars"])}
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})  # type: ignore[arg-type]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)

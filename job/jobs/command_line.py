"""A command of this program as its own parser read it: what can be looked at, changed, and written down again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from job.data.pack_request import PackRequest
from job.jobs.spec import Verb
from job.requests import EncodeRequest, EvaluateRequest, SampleRequest, TrainRequest, chosen_of

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
"""Parameters that a request calls otherwise."""


@dataclass(frozen=True)
class ParsedCommand:
    """A command line, taken apart.

    Attributes:
        verb: what it does.
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
        """The same, with these parameters given as well; one that is None is left out."""
        return replace(self, values={**self.values, **values}, given=self.given | set(values))

    def request(self) -> AnyRequest:
        """What is asked for, not checked yet."""
        kind = _REQUESTS[self.verb]
        values = {_REQUEST_FIELDS.get(name, name): value for name, value in self.values.items()}
        if kind is TrainRequest:
            values["sets"] = tuple(values["sets"] or ())
        elif kind in (SampleRequest, EvaluateRequest):
            values["chosen"] = chosen_of(values)
        elif self.verb == "index":
            values |= {"source": "", "tars": tuple(values["tars"])}
        return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})

    def argv(self) -> tuple[str, ...]:
        """What comes after `ddpm`: arguments, then options, each in the order of the parameters.

        Equal commands give equal words, however they were typed.
        """
        arguments: list[str] = []
        words: list[str] = []
        for name, option in self.options.items():
            value = self.values.get(name) if name in self.given else None
            if value is None:
                continue
            if not option:
                arguments += map(str, value) if isinstance(value, list | tuple) else [str(value)]
            elif isinstance(value, bool):
                # An option that is off by default has no word for off.
                words += option[:1] if value else option[1:2]
            else:
                for one in value if isinstance(value, list | tuple) else (value,):
                    words += [option[0], _text(one)]
        if any(word.startswith("-") for word in arguments):
            return (*self.command, *words, "--", *arguments)
        return (*self.command, *arguments, *words)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)

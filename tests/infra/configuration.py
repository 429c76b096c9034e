"""infra/terraform as python-hcl2 reads it, and the values of those of its expressions that say what node pools are.

In bodies, strings keep their quotes, all other expressions are `${…}`, and nested blocks are lists of bodies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hcl2
import jinja2

FOLDER = Path(__file__).parents[2] / "infra/terraform"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.tf"))}
IS_BLOCK = "__is_block__"
_PLAIN = hcl2.SerializationOptions(with_comments=False)
_LOOP = re.compile(r"\{\s*for (\w+)(?:, (\w+))? in (.+?) : (\S+) => (.+?)(?: if ([^{}]+))?\s*\}")
_JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
_JINJA.globals |= {"merge": lambda first, second: {**first, **second}, "keys": sorted}


class Block(NamedTuple):
    """`kind "label" { body }` at the top level."""

    kind: str
    labels: tuple[str, ...]
    body: dict[str, Any]


def read(texts: Mapping[str, str] = FILES) -> list[Block]:
    """All blocks of a module, given as texts by file name."""
    return [block for text in texts.values() for block in _blocks(text)]


@cache
def _blocks(text: str) -> list[Block]:
    found = []
    for kind, bodies in hcl2.loads(text, serialization_options=_PLAIN).items():
        for body in bodies:
            labels: list[str] = []
            while IS_BLOCK not in body:
                [(label, body)] = body.items()
                labels.append(label.strip('"'))
            found.append(Block(kind, tuple(labels), body))
    return found


def body_of(kind: str, *labels: str) -> dict[str, Any]:
    """The body of the one block with these labels."""
    [body] = [block.body for block in read() if (block.kind, block.labels) == (kind, labels)]
    return body


def value_of(value: Any, names: dict[str, Any]) -> Any:
    """What a body's value is, with `names` for what it refers to; an error for what is not known here."""
    if isinstance(value, dict):
        return {key: value_of(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [value_of(item, names) for item in value]
    if not isinstance(value, str):
        return value
    text = value[2:-1] if value.startswith("${") else value
    if loop := _LOOP.fullmatch(text):
        key, item, over, name, made, condition = loop.groups()
        items = value_of(over, names)
        inner = [names | ({key: one, item: items[one]} if item else {key: one}) for one in items]
        taken = [each for each in inner if value_of(condition or "true", each)]
        return {value_of(name, each): value_of(made, each) for each in taken}
    # What is left of HCL differs from Jinja's expressions in these.
    text = re.sub(r"^(.+) \? (.+) : (.+)$", r"\2 if \1 else \3", text).replace("&&", "and")
    text = re.sub(r"(\w+) = ", r'"\1": ', re.sub(r"\$\{(.+?)\}", r'" ~ \1 ~ "', text))
    return _JINJA.compile_expression(text, undefined_to_none=False)(names)

"""infra/terraform as python-hcl2 reads it, and the values of those of its expressions that say what node pools are.

In bodies, strings keep their quotes, all other expressions are `${…}`, and nested blocks are lists of bodies.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hcl2
from lark import Token, Tree

FOLDER = Path(__file__).parents[2] / "infra/terraform"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.tf"))}
IS_BLOCK = "__is_block__"
_PLAIN = hcl2.SerializationOptions(with_comments=False)
_OPERATORS = {"==": operator.eq, ">": operator.gt, "&&": lambda left, right: left and right}
_FUNCTIONS = {"merge": lambda first, second: {**first, **second}, "keys": sorted}


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
    """What a body's value is, with `names` for what it refers to; KeyError for what is not known here."""
    if isinstance(value, dict):
        return {key: value_of(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [value_of(item, names) for item in value]
    if not isinstance(value, str):
        return value
    return _evaluated(_parsed(value[2:-1] if value.startswith("${") else value), names)


@cache
def _parsed(expression: str) -> Tree[Token]:
    [attribute] = hcl2.parses_to_tree(f"x = {expression}\n").find_data("attribute")
    return _trees(attribute)[-1]


def _evaluated(tree: Tree[Token], names: dict[str, Any]) -> Any:
    parts = _trees(tree)
    match tree.data:
        case "expr_term":
            return _evaluated(parts[0], names)
        case "identifier":
            return names[_text(tree)]
        case "get_attr_expr_term":
            return _evaluated(parts[0], names)[_text(_trees(parts[1])[0])]
        case "literal_value" | "int_lit":
            return json.loads(_text(tree))
        case "string":
            inner = [(_trees(part), _text(part)) for part in parts]
            return "".join(str(_evaluated(_trees(trees[0])[0], names)) if trees else text for trees, text in inner)
        case "tuple":
            return [_evaluated(part, names) for part in parts]
        case "object":
            return {_text(key).strip('"'): _evaluated(value, names) for key, value in map(_trees, parts)}
        case "for_object_expr":
            return _for_object(parts, names)
        case "conditional":
            return _evaluated(parts[1] if _evaluated(parts[0], names) else parts[2], names)
        case "binary_op":
            sign, right = _trees(parts[1])
            return _OPERATORS[_text(sign)](_evaluated(parts[0], names), _evaluated(right, names))
        case "function_call":
            return _FUNCTIONS[_text(parts[0])](*(_evaluated(part, names) for part in _trees(parts[1])))
    raise KeyError(tree.data)


def _for_object(parts: list[Tree[Token]], names: dict[str, Any]) -> dict[str, Any]:
    intro, key, value, *conditions = parts
    *loop, over = _trees(intro)
    items = _evaluated(over, names)
    made = {}
    for item in items.items() if isinstance(items, dict) else [(item,) for item in items]:
        inner = names | dict(zip(map(_text, loop), item, strict=True))
        if all(_evaluated(_trees(condition)[0], inner) for condition in conditions):
            made[_evaluated(key, inner)] = _evaluated(value, inner)
    return made


def _trees(tree: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree) and child.data != "new_line_or_comment"]


def _text(tree: Tree[Token]) -> str:
    return "".join(str(token) for token in tree.scan_values(lambda value: isinstance(value, Token))).strip()

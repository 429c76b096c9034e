"""The values of Terraform's expressions, as far as those of the node pools go."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from lark import Token, Tree

from tests.infra.configuration import Block

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    ">": operator.gt,
    "&&": lambda a, b: a and b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "merge": lambda *maps: {key: value for part in maps for key, value in part.items()},
    "keys": sorted,
}


def value_of(tree: Tree[Token], names: dict[str, Any]) -> Any:
    """What an expression is, with `names` for what it refers to; a kind that is not known raises KeyError."""
    return _KINDS[str(tree.data)](_trees(tree), tree, names)


def attributes_of(block: Block, names: dict[str, Any]) -> dict[str, Any]:
    """Its arguments, where these can be told from `names`."""
    found = {}
    for attribute in block.attributes:
        try:
            found[attribute.name] = value_of(attribute.expression, names)
        except KeyError:
            continue
    return found


def blocks_of(block: Block, kind: str, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of each block of that kind in it, with those that a `dynamic` block makes."""
    for child in block.blocks:
        if child.kind == kind:
            yield attributes_of(child, names)
        elif child.kind == "dynamic" and child.labels == (kind,):
            repeated, (content,) = child.attribute("for_each"), child.blocks
            assert repeated is not None
            for item in value_of(repeated.expression, names):
                yield attributes_of(content, names | {kind: {"value": item}})


def defaults(text: str, variable: str) -> dict[str, Any]:
    """The fields of a variable that is an object, with what they are unless somebody says otherwise."""
    block = text[text.index(f'variable "{variable}"') :].split("\n}\n")[0]
    return {name: json.loads(value) for name, value in re.findall(r"(\w+) += optional\(\w+, ([^)]*)\)", block)}


def _trees(tree: Tree[Token]) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree) and child.data != "new_line_or_comment"]


def _text(tree: Tree[Token]) -> str:
    return "".join(str(token) for token in tree.scan_values(lambda value: isinstance(value, Token))).strip()


def _string(parts: list[Tree[Token]], _: Tree[Token], names: dict[str, Any]) -> str:
    found = [_trees(part) for part in parts]
    return "".join(
        str(value_of(_trees(inner[0])[0], names)) if inner else _text(part)
        for inner, part in zip(found, parts, strict=True)
    )


def _object(elements: list[Tree[Token]], _: Tree[Token], names: dict[str, Any]) -> dict[str, Any]:
    pairs = [_trees(element) for element in elements]
    return {_text(key).strip('"'): value_of(value, names) for key, value in pairs}


def _for_object(parts: list[Tree[Token]], _: Tree[Token], names: dict[str, Any]) -> dict[str, Any]:
    intro, key, value, *conditions = parts
    *loop, over = _trees(intro)
    items = value_of(over, names)
    made = {}
    for item in items.items() if isinstance(items, dict) else [(item,) for item in items]:
        inner = names | dict(zip(map(_text, loop), item, strict=True))
        if all(value_of(_trees(condition)[0], inner) for condition in conditions):
            made[value_of(key, inner)] = value_of(value, inner)
    return made


def _binary(parts: list[Tree[Token]], _: Tree[Token], names: dict[str, Any]) -> Any:
    sign, right = _trees(parts[1])
    return _OPERATORS[_text(sign)](value_of(parts[0], names), value_of(right, names))


def _call(parts: list[Tree[Token]], _: Tree[Token], names: dict[str, Any]) -> Any:
    return _FUNCTIONS[_text(parts[0])](*(value_of(part, names) for part in _trees(parts[1])))


_Kind = Callable[[list[Tree[Token]], Tree[Token], dict[str, Any]], Any]
_KINDS: dict[str, _Kind] = {
    "expr_term": lambda parts, _, names: value_of(parts[0], names),
    "identifier": lambda _, tree, names: names[_text(tree)],
    "get_attr_expr_term": lambda parts, _, names: value_of(parts[0], names)[_text(_trees(parts[1])[0])],
    "literal_value": lambda _, tree, __: json.loads(_text(tree)),
    "int_lit": lambda _, tree, __: int(_text(tree)),
    "string": _string,
    "tuple": lambda parts, _, names: [value_of(part, names) for part in parts],
    "object": _object,
    "for_object_expr": _for_object,
    "conditional": lambda parts, _, names: value_of(parts[1] if value_of(parts[0], names) else parts[2], names),
    "binary_op": _binary,
    "function_call": _call,
}

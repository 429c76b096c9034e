"""Terraform configuration as blocks and expressions, from python-hcl2's syntax tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hcl2
from lark import Token, Tree


@dataclass
class Attribute:
    """`name = expression`."""

    name: str
    expression: Tree[Token]


@dataclass
class Block:
    """`kind "label" { … }`; `path` says where it is, for messages."""

    kind: str
    labels: tuple[str, ...]
    path: str
    attributes: list[Attribute] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def attribute(self, name: str) -> Attribute | None:
        """The attribute of that name."""
        return next((attribute for attribute in self.attributes if attribute.name == name), None)

    def below(self) -> Iterator[Block]:
        """This block and all in it."""
        yield self
        for block in self.blocks:
            yield from block.below()


def read_folder(folder: Path) -> list[Block]:
    """All top-level blocks of a module. Raises what the parser raises for a file that is no HCL."""
    return [block for path in sorted(folder.glob("*.tf")) for block in read(path.read_text(), path.name)]


def read(text: str, where: str) -> list[Block]:
    """The top-level blocks of one file."""
    root = Block("", (), where)
    _fill(root, _children(hcl2.parses_to_tree(text), "body")[0], where)
    assert not root.attributes, f"{where}: {root.attributes[0].name} stands outside of all blocks"
    return root.blocks


def references(expression: Tree[Token]) -> set[tuple[str, ...]]:
    """What an expression refers to, as chains of names such as `("var", "project")`, without its own loop variables."""
    return set(_references(expression, frozenset()))


def functions(expression: Tree[Token]) -> set[str]:
    """Names of the functions that it calls."""
    return {str(_name(call)) for call in expression.find_data("function_call")}


def literal_type(expression: Tree[Token]) -> str:
    """`string`, `number`, `bool`, `list` or `map` if that can be seen; empty if it depends on other things."""
    tree = _unwrapped(expression)
    if tree.data == "string":
        return "string"
    kinds = {"int_lit": "number", "float_lit": "number", "tuple": "list", "object": "map"}
    kinds |= {"for_tuple_expr": "list", "for_object_expr": "map"}
    if tree.data == "literal_value":
        return "" if str(tree.children[0]) == "null" else "bool"
    return kinds.get(str(tree.data), "")


def string_value(expression: Tree[Token]) -> str:
    """The text of a string without interpolations."""
    tree = _unwrapped(expression)
    return "".join(str(token) for part in _children(tree, "string_part") for token in part.scan_values(_is_token))


def object_items(expression: Tree[Token]) -> dict[str, Tree[Token]]:
    """Keys and values of an object."""
    items = {}
    for element in _children(_unwrapped(expression), "object_elem"):
        trees = [child for child in element.children if isinstance(child, Tree)]
        items["".join(str(token) for token in trees[0].scan_values(_is_token)).strip('"')] = trees[1]
    return items


def _fill(block: Block, body: Tree[Token], where: str) -> None:
    for child in body.children:
        if not isinstance(child, Tree):
            continue
        if child.data == "attribute":
            trees = [part for part in child.children if isinstance(part, Tree)]
            block.attributes.append(Attribute(str(trees[0].children[0]), trees[-1]))
        elif child.data == "block":
            trees = [part for part in child.children if isinstance(part, Tree)]
            labels = tuple(
                "".join(str(token) for token in label.scan_values(_is_token)).strip('"')
                for label in trees[1:]
                if label.data in ("string", "identifier")
            )
            kind = str(trees[0].children[0])
            inner = Block(kind, labels, f"{where}: {' '.join((kind, *labels))}")
            _fill(inner, trees[-1], inner.path)
            block.blocks.append(inner)


def _references(tree: Tree[Token], bound: frozenset[str]) -> Iterator[tuple[str, ...]]:
    if tree.data == "object_elem_key":
        # A plain key is a name, a key in parentheses an expression.
        if len(list(tree.iter_subtrees())) > 3:
            yield from _of_children(tree, bound)
        return
    if tree.data in ("for_tuple_expr", "for_object_expr"):
        [intro] = _children(tree, "for_intro")
        names = frozenset(str(child.children[0]) for child in _children(intro, "identifier"))
        yield from _of_children(intro, bound)
        for child in tree.children:
            if isinstance(child, Tree) and child is not intro:
                yield from _references(child, bound | names)
        return
    chain = _chain(tree)
    if chain:
        if chain[0] not in bound:
            yield chain
        # Indices may hold expressions of their own.
        for index in tree.find_data("braces_index"):
            yield from _of_children(index, bound)
        return
    yield from _of_children(tree, bound)


def _of_children(tree: Tree[Token], bound: frozenset[str]) -> Iterator[tuple[str, ...]]:
    for child in tree.children:
        if isinstance(child, Tree) and child.data != "identifier":
            yield from _references(child, bound)


def _chain(tree: Tree[Token]) -> tuple[str, ...]:
    """`a.b[0].c` as `(a, b, c)`; empty if the tree is something else."""
    tree = _unwrapped(tree)
    if tree.data == "identifier":
        return (str(tree.children[0]),)
    trees = [child for child in tree.children if isinstance(child, Tree)]
    if tree.data == "get_attr_expr_term":
        before = _chain(trees[0])
        return (*before, str(_name(trees[1]))) if before else ()
    if tree.data in ("index_expr_term", "full_splat_expr_term", "attr_splat_expr_term"):
        return _chain(trees[0])
    return ()


def _unwrapped(tree: Tree[Token]) -> Tree[Token]:
    while tree.data == "expr_term":
        trees = [child for child in tree.children if isinstance(child, Tree) and child.data != "new_line_or_comment"]
        if len(trees) != 1:
            break
        tree = trees[0]
    return tree


def _children(tree: Tree[Token], data: str) -> list[Tree[Token]]:
    return [child for child in tree.children if isinstance(child, Tree) and child.data == data]


def _name(tree: Tree[Token]) -> Token:
    token = _children(tree, "identifier")[0].children[0]
    assert isinstance(token, Token)
    return token


def _is_token(value: object) -> bool:
    return isinstance(value, Token)

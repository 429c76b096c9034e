"""What `terraform validate` would say, as far as it can be said without it: each check returns a list of problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.infra.configuration import Attribute, Block, functions, literal_type, references
from tests.infra.provider_schema import Schema

OWN: dict[str, tuple[set[str], set[str], set[str]]] = {
    # Terraform's own blocks: arguments that are needed, that are allowed, blocks that are allowed.
    "variable": ({"description", "type"}, {"default", "sensitive", "nullable"}, {"validation"}),
    "output": ({"description", "value"}, {"sensitive", "depends_on"}, {"precondition"}),
    "validation": ({"condition", "error_message"}, set(), set()),
    "precondition": ({"condition", "error_message"}, set(), set()),
    "postcondition": ({"condition", "error_message"}, set(), set()),
    "lifecycle": (
        set(),
        {"ignore_changes", "prevent_destroy", "create_before_destroy", "replace_triggered_by"},
        {"precondition", "postcondition"},
    ),
    "terraform": (set(), {"required_version"}, {"required_providers", "backend"}),
}
FUNCTIONS = set(
    """
    alltrue anytrue can coalesce compact concat contains distinct element endswith flatten floor format formatlist join
    jsonencode keys length lookup lower max merge min one range regex regexall replace setproduct setunion sort split
    startswith sum templatefile tobool tolist tomap tonumber toset tostring trim try upper values yamlencode zipmap
    """.split()  # noqa: SIM905
)


def problems(blocks: list[Block], schema: Schema) -> list[str]:
    """All of them."""
    return [*duplicates(blocks), *own_blocks(blocks), *provider_blocks(blocks, schema), *undefined(blocks, schema)]


def duplicates(blocks: list[Block]) -> list[str]:
    """Arguments that are given twice in a block, and things that are declared twice."""
    found = []
    for top in blocks:
        for block in top.below():
            counted = Counter(attribute.name for attribute in block.attributes)
            found += [f"{block.path}: {name} is given twice" for name, count in counted.items() if count > 1]
    declared = Counter((block.kind, block.labels) for block in blocks if block.labels)
    found += [f"{' '.join((kind, *labels))} is declared twice" for (kind, labels), n in declared.items() if n > 1]
    local = Counter(attribute.name for block in blocks if block.kind == "locals" for attribute in block.attributes)
    return found + [f"local.{name} is declared twice" for name, count in local.items() if count > 1]


def own_blocks(blocks: list[Block]) -> list[str]:
    """Mistakes in `variable`, `output`, `lifecycle` and their like."""
    found = []
    for top in blocks:
        if top.kind not in ("terraform", "provider", "locals", "variable", "output", "resource", "data"):
            found.append(f"{top.path}: there are no blocks of this kind")
        labels = {"resource": 2, "data": 2, "variable": 1, "output": 1, "provider": 1}.get(top.kind, 0)
        if len(top.labels) != labels:
            found.append(f"{top.path}: {len(top.labels)} labels instead of {labels}")
        for block in top.below():
            if block.kind not in OWN or (block.kind == "lifecycle" and top.kind not in ("resource", "data")):
                continue
            needed, allowed, inner = OWN[block.kind]
            given = {attribute.name for attribute in block.attributes}
            found += [f"{block.path}: {name} is missing" for name in sorted(needed - given)]
            found += [f"{block.path}: unknown argument {name}" for name in sorted(given - needed - allowed)]
            found += [f"{child.path}: unknown block" for child in block.blocks if child.kind not in inner]
    return found


def provider_blocks(blocks: list[Block], schema: Schema) -> list[str]:
    """What the provider's schema says against resources, data sources and the provider itself."""
    found: list[str] = []
    for block in blocks:
        if block.kind in ("resource", "data", "provider"):
            arguments = schema.arguments(block.kind, block.labels[0])
            if arguments is None:
                found.append(f"{block.path}: the provider has no {block.kind} {block.labels[0]}")
            else:
                found += _against(block, arguments, schema)
    return found


def _against(block: Block, arguments: dict[str, Any], schema: Schema) -> Iterator[str]:
    given = {attribute.name for attribute in block.attributes}
    blocks = [child for child in block.blocks if child.kind != "lifecycle"]
    blocks = [_content(child) if child.kind == "dynamic" else child for child in blocks]
    given_blocks = Counter(child.kind for child in blocks)
    for name, (required, _) in arguments.items():
        if required and name not in given and name not in given_blocks:
            yield f"{block.path}: {name} is missing"
    for attribute in block.attributes:
        if attribute.name not in arguments:
            yield f"{block.path}: unknown argument {attribute.name}"
        elif arguments[attribute.name][1][0] == "block":
            yield f"{block.path}: {attribute.name} is a block, not an argument"
        else:
            yield from _wrong_type(block, attribute, arguments[attribute.name][1])
    for child in blocks:
        of_type = arguments.get(child.kind, (False, ""))[1]
        if child.kind not in arguments:
            yield f"{child.path}: unknown block"
        elif of_type[0] != "block":
            yield f"{child.path}: is an argument, not a block"
        else:
            if given_blocks[child.kind] > 1 and not of_type[2]:
                yield f"{child.path}: there can be one only"
            yield from _against(child, schema.struct(of_type[1]), schema)


def _wrong_type(block: Block, attribute: Attribute, of_type: Any) -> Iterator[str]:
    literal = literal_type(attribute.expression)
    wanted = of_type if isinstance(of_type, str) else of_type[0]
    if literal and wanted != "any" and literal != wanted:
        yield f"{block.path}: {attribute.name} is a {literal} instead of a {wanted}"


def _content(dynamic: Block) -> Block:
    """What a `dynamic` block makes."""
    content = next((block for block in dynamic.blocks if block.kind == "content"), Block("", (), ""))
    return Block(dynamic.labels[0], (), dynamic.path, content.attributes, content.blocks)


def undefined(blocks: list[Block], schema: Schema) -> list[str]:
    """References to what is not there, functions that do not exist, and variables and locals that nobody uses."""
    variables = {block.labels[0] for block in blocks if block.kind == "variable"}
    local = {attribute.name for block in blocks if block.kind == "locals" for attribute in block.attributes}
    things = {(block.kind, *block.labels) for block in blocks if block.kind in ("resource", "data")}
    used: set[tuple[str, ...]] = set()
    found = []
    for top in blocks:
        for block, names in _with_iterators(top, frozenset()):
            for attribute in block.attributes:
                if (top.kind, attribute.name) == ("variable", "type") or attribute.name == "ignore_changes":
                    continue
                where = f"{block.path}: {attribute.name}"
                unknown = sorted(functions(attribute.expression) - FUNCTIONS)
                found += [f"{where}: there is no function {name}" for name in unknown]
                for chain in references(attribute.expression):
                    used.add(chain[:2])
                    problem = _problem(chain, variables, local, things, schema, top, names)
                    found += [f"{where}: {'.'.join(chain)}: {problem}"] if problem else []
    found += [f"variable {name}: nobody uses it" for name in sorted(variables) if ("var", name) not in used]
    return found + [f"local {name}: nobody uses it" for name in sorted(local) if ("local", name) not in used]


def _problem(
    chain: tuple[str, ...],
    variables: set[str],
    local: set[str],
    things: set[tuple[str, ...]],
    schema: Schema,
    top: Block,
    iterators: frozenset[str],
) -> str:
    root, second = chain[0], chain[1] if len(chain) > 1 else ""
    if root == "var":
        return "" if second in variables else "there is no such variable"
    if root == "local":
        return "" if second in local else "there is no such local value"
    if root in ("each", "count"):
        repeated = top.attribute("for_each" if root == "each" else "count")
        return "" if repeated and second in ("key", "value", "index") else f"the block has no {root}.{second}"
    if root == "path":
        return "" if second in ("module", "root", "cwd") else "there is no such path"
    if root in iterators:
        return "" if second in ("key", "value") else "an iterator has a key and a value"
    kind, names = ("data", chain[1:]) if root == "data" else ("resource", chain)
    if len(names) < 2 or (kind, *names[:2]) not in things:
        return "there is nothing of this name"
    if len(names) > 2 and names[2] not in schema.attributes(kind, names[0]):
        return f"{names[0]} has no {names[2]}"
    return ""


def _with_iterators(block: Block, names: frozenset[str]) -> Iterator[tuple[Block, frozenset[str]]]:
    """A block and all in it, with the names that `dynamic` blocks around it bring."""
    yield block, names
    for child in block.blocks:
        yield from _with_iterators(child, names | {child.labels[0]} if child.kind == "dynamic" else names)

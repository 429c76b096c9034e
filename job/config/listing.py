"""`ddpm config`: all keys of a configuration with their values, and the configuration of a new run with its origins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddpm.catalogue import LARGEST, takers
from job.config.resolve import (
    CHOSEN_ELSEWHERE,
    EMBEDDED,
    FOLLOWS,
    description_of,
    draft,
    known_keys,
    parse_sets,
    preset_keys,
    read_config_file,
)
from job.config.run_config import RunConfig
from job.config.schema import NETWORKS
from job.exits import BadRequestError, did_you_mean
from job.printing import print_json, print_table

Value = TypeVar("Value")
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
"""The limits in a JSON schema."""


@dataclass(frozen=True)
class Setting:
    """One setting of the schema."""

    key: str
    takes: str
    """Its type and limits."""
    default: Any
    description: str
    option: str = ""
    """The option that sets it instead of `--set`."""


def all_settings() -> Iterator[Setting]:
    """Yields all keys; a key that several kinds of networks have comes once, with the limits of the first kind."""
    schema = RunConfig.model_json_schema()
    sections = {name: _resolved(section, schema) for name, section in schema["properties"].items()}
    models = {kind: model.model_json_schema()["properties"] for kind, model in NETWORKS.items()}
    for key in known_keys():
        section, _, leaf = key.rpartition(".")
        if key == "model.kind":
            yield Setting(key, "|".join(NETWORKS), "unet", "kind of network")
            continue
        kinds = [kind for kind, fields in models.items() if leaf in fields] if section == "model" else []
        if kinds:
            field = models[kinds[0]][leaf]
        else:
            field = sections[section]["properties"][leaf] if section else sections[leaf]
        only = kinds if len(kinds) < len(models) else []
        of = only or (takers(leaf) if section == "sample" else [])
        description = description_of(key, *kinds[:1])
        said = "; ".join(filter(None, (description, f"only for {', '.join(of)}" if of else "")))
        takes = values_of(field, schema)
        yield Setting(key, takes, _resolved(field, schema).get("default"), said, CHOSEN_ELSEWHERE.get(key, ""))


def _resolved(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref", "")
    return {**schema["$defs"][reference.rpartition("/")[2]], **field} if reference else field


def values_of(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Returns the values of a field of a JSON schema: `integer ≥ 1`, `ddim|ddpm`, `list of number > 0 ≤ 1`."""
    field = _resolved(field, schema)
    if "anyOf" in field:
        return " or ".join(values_of(each, schema) for each in field["anyOf"])
    if "enum" in field or "const" in field:
        return "|".join(map(str, field.get("enum") or [field["const"]]))
    if items := field.get("items") or field.get("prefixItems"):
        return f"list of {values_of(items[0] if isinstance(items, list) else items, schema)}"
    # The largest limits only protect the program; no person needs to know them.
    known = {name: field[name] for name in _SIGNS if field.get(name, LARGEST) < LARGEST}
    return " ".join([field["type"], *(f"{_SIGNS[name]} {limit:,}" for name, limit in known.items())])


def list_keys(begin: str = "", *, as_json: bool) -> None:
    """Prints the keys that begin with `begin`, each with its default, its meaning and its values.

    Raises:
        BadRequestError: no key does.
    """
    chosen = _beginning({key.key: key for key in all_settings()}, begin)
    if as_json:
        print_json([asdict(key) for key in chosen.values()])
        return
    rows = []
    for key in chosen.values():
        said = "; ".join(filter(None, (key.description, f"set by {key.option}" if key.option else "")))
        rows.append((key.key, shown(key.default), f"{said} ({key.takes})"))
    _print_rows(("default", "meaning"), rows)


def show_config(preset: str, sets: Iterable[str], config_file: Path | None, begin: str = "", *, as_json: bool) -> None:
    """Prints the configuration of a new run, with the origin of each value; its dataset may fill in more.

    Args:
        preset: its name; empty for the default one.
        sets: assignments to dotted keys.
        config_file: with further settings.
        begin: the keys to print begin with it.
        as_json: whether to print JSON.

    Raises:
        BadConfigError, BadRequestError, MissingInputError: as `ddpm train`, or no key begins so.
    """
    preset, file, assigned = preset or EMBEDDED, read_config_file(config_file), parse_sets(sets)
    config = draft(preset, file | assigned)
    layers = {"--set": assigned, f"{config_file}": file, f"preset {preset}": preset_keys(preset)}

    def origin(key: str) -> str:
        follows = {*FOLLOWS, *(key for key in CHOSEN_ELSEWHERE if key.startswith("data."))}
        usual = "the dataset" if key in follows else "default"
        return next((name for name, layer in layers.items() if key in layer), usual)

    settings = {*known_keys()} - {"preset"}
    told = {key: {"value": value, "from": origin(key)} for key, value in config.flat().items() if key in settings}
    told = _beginning(told, begin)
    if as_json:
        print_json(told)
    else:
        _print_rows(("value", "from"), [(key, shown(values["value"]), values["from"]) for key, values in told.items()])


def _beginning(known: dict[str, Value], begin: str) -> dict[str, Value]:
    """Returns the keys that begin with `begin`; raises BadRequestError if none does."""
    if chosen := {key: value for key, value in known.items() if key.startswith(begin)}:
        return chosen
    sections = dict.fromkeys(key.partition(".")[0] for key in known)
    raise BadRequestError(f"no key begins with {begin!r}{did_you_mean(begin, sections)} ({', '.join(sections)})")


def _print_rows(titles: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None)
    # A key that is cut cannot be typed.
    table.add_column("key", no_wrap=True, overflow="fold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(table, "no keys", wraps=True)


def shown(value: Any) -> str:
    """Returns a value as `--set` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "[]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'

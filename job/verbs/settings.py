"""`ddpm config`: the settings of a new run with the origin of each, or all keys with their values and meanings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter
from rich.table import Table

from ddpm.catalogue import LARGEST, takers
from job.config import (
    CHOSEN_ELSEWHERE,
    FOLLOWS,
    Start,
    description_of,
    draft,
    known_keys,
    parse_sets,
    read_config_file,
    read_preset,
    settings,
    shown,
)
from job.config.schema import NETWORKS, flatten
from job.exits import BadRequestError, did_you_mean
from job.printing import print_json, print_table
from job.processes.group import gpu_gib


def all_settings(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns of each key its default, its meaning, with the option that sets it instead of `--set`, and its values.

    Args:
        values: the defaults of a new run, by key; other kinds of networks have further keys.
    """
    rows = {}
    for key in known_keys():
        section, _, leaf = key.rpartition(".")
        kinds = [kind for kind, network in NETWORKS.items() if section == "model" and leaf in network.model_fields]
        only = takers(leaf) if section == "sample" else kinds if len(kinds) < len(NETWORKS) else []
        field, notes = settings()[key], [description_of(key)]
        if only:
            notes.append(f"only for {', '.join(only)}")
        if key in CHOSEN_ELSEWHERE:
            notes.append(f"set by {CHOSEN_ELSEWHERE[key]}")
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        takes = values_of(adapter.json_schema())
        default, meaning = values.get(key, field.default), f"{'; '.join(notes)} ({takes})"
        rows[key] = {"default": default, "meaning": meaning, "takes": takes}
    return rows


def values_of(schema: dict[str, Any]) -> str:
    """Returns the values that a JSON schema permits: `integer ≥ 1`, `ddim|ddpm`, `list of number > 0 ≤ 1`."""
    if "anyOf" in schema:
        return " or ".join(map(values_of, schema["anyOf"]))
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        return f"list of {values_of(schema.get('items') or schema['prefixItems'][0])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    # The largest limits only protect the program; no person needs to know them.
    limits = [f"{sign} {schema[name]:,}" for name, sign in signs.items() if schema.get(name, LARGEST) < LARGEST]
    return " ".join([schema["type"], *limits])


def _resolved(start: Start, sets: Iterable[str], config_file: Path | None) -> dict[str, dict[str, Any]]:
    """Returns of each key of a new run its value, and the origin of that."""
    file, assigned = read_config_file(config_file), parse_sets(sets)
    values = draft(start.preset, file | assigned, start.set).flat()
    layers: dict[str, Any] = {"--set": assigned, str(config_file): file, "this machine": start.set}
    layers[f"preset {start.preset}"] = flatten(read_preset(start.preset))
    layers["the dataset"] = {*FOLLOWS, *(key for key in CHOSEN_ELSEWHERE if key[:5] == "data.")}
    layers["default"] = values
    return {
        key: {"value": values[key], "from": next(name for name, layer in layers.items() if key in layer)}
        for key in known_keys()
        if key in values and key != "preset"
    }


def show_config(
    preset: str, sets: Iterable[str], config_file: Path | None, begin: str, *, list_all: bool, as_json: bool
) -> None:
    """Prints the configuration of a new run, with the origin of each value; its dataset may fill in more.

    Args:
        preset: its name; empty for what suits this machine and images of 32 pixels.
        sets: assignments to dotted keys.
        config_file: with further settings.
        begin: the keys to print begin with it.
        list_all: whether to print every key instead, with its default, its meaning and its values.
        as_json: whether to print JSON.

    Raises:
        BadConfigError, BadRequestError, MissingInputError: as `ddpm train`, or no key begins so.
    """
    rows = _resolved(Start(preset, {}) if preset else Start.of(gpu_gib()), sets, config_file)
    if list_all:
        rows = all_settings({key: row["value"] for key, row in rows.items()})
    chosen = {key: row for key, row in rows.items() if key.startswith(begin)}
    if not chosen:
        sections = dict.fromkeys(key.partition(".")[0] for key in rows)
        raise BadRequestError(f"no key begins with {begin!r}{did_you_mean(begin, sections)} ({', '.join(sections)})")
    if as_json:
        print_json(chosen)
        return
    table = Table(box=None)
    # A key that is cut cannot be typed.
    table.add_column("key", no_wrap=True, overflow="fold")
    for title in (titles := ("default", "meaning") if list_all else ("value", "from")):
        table.add_column(title, overflow="fold")
    for key, row in chosen.items():
        table.add_row(key, *(shown(row[title]) for title in titles))
    print_table(table, "no keys", wraps=True)

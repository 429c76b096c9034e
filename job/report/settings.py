"""`ddpm config`: all keys of a configuration with their values, and the configuration of a new run with its origins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm.catalogue import takers
from job.config import EMBEDDED, LARGEST, NETWORKS, RunConfig, preset_keys
from job.config.resolve import CHOSEN_ELSEWHERE, FOLLOWS, description_of, draft, known_keys
from job.exits import BadRequestError, did_you_mean
from job.requests import TrainRequest

if TYPE_CHECKING:
    from rich.table import Table

Value = TypeVar("Value")


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    key: str
    takes: str
    """Its type and limits, in words."""
    default: Any
    description: str
    of: str = ""
    """The option that sets it instead of `--set`."""


def keys() -> Iterator[Key]:
    """Yields all keys; a key that several kinds of networks have comes once, with the limits of the first kind."""
    schema = RunConfig.model_json_schema()
    sections = {name: _resolved(section, schema) for name, section in schema["properties"].items()}
    models = {kind: model.model_json_schema()["properties"] for kind, model in NETWORKS.items()}
    for key in known_keys():
        section, _, leaf = key.rpartition(".")
        if key == "model.kind":
            yield Key(key, "|".join(NETWORKS), "unet", "kind of network")
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
        takes = words_of(field, schema)
        yield Key(key, takes, _resolved(field, schema).get("default"), said, CHOSEN_ELSEWHERE.get(key, ""))


def _resolved(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref", "")
    return {**schema["$defs"][reference.rpartition("/")[2]], **field} if reference else field


def words_of(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Returns the values of a field of a schema: `whole number from 1`, `ddim|ddpm`, `2 numbers above 0 up to 1`."""
    field = _resolved(field, schema)
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " or ".join(words_of(each, schema) for each in field["anyOf"])
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            return f"{len(field['prefixItems'])} {_several(words_of(field['prefixItems'][0], schema))}"
        return f"list of {_several(words_of(field['items'], schema))}"
    if kind in ("integer", "number"):
        return " ".join(filter(None, ("whole number" if kind == "integer" else "number", _limits(field))))
    return {"boolean": "true|false", "string": "text", "null": "null"}[str(kind)]


def _several(words: str) -> str:
    return words.replace("number", "numbers", 1)


def _limits(field: dict[str, Any]) -> str:
    low = f"from {field['minimum']:g}" if "minimum" in field else ""
    low = f"above {field['exclusiveMinimum']:g}" if "exclusiveMinimum" in field else low
    # The largest limits only protect the program; no person needs to know them.
    high = f"up to {field['maximum']:,}" if field.get("maximum", LARGEST) < LARGEST else ""
    below = field.get("exclusiveMaximum", LARGEST)
    return " ".join(filter(None, (low, f"below {below:g}" if below < LARGEST else high)))


def list_keys(begin: str = "", *, as_json: bool) -> None:
    """Prints the keys that begin with `begin`, each with its default, its meaning and its values.

    Raises:
        BadRequestError: no key does.
    """
    from job.verbs.runs import print_json, print_table

    chosen = _beginning({key.key: key for key in keys()}, begin)
    if as_json:
        print_json([vars(key) for key in chosen.values()])
        return
    table = _table("default", "meaning")
    for key in chosen.values():
        said = "; ".join(filter(None, (key.description, f"set by {key.of}" if key.of else "")))
        table.add_row(key.key, shown(key.default), f"{said} ({key.takes})")
    print_table(table, "no keys", wraps=True)


def _beginning(known: dict[str, Value], begin: str) -> dict[str, Value]:
    """Returns the keys that begin with `begin`; raises BadRequestError if none does."""
    if chosen := {key: value for key, value in known.items() if key.startswith(begin)}:
        return chosen
    sections = dict.fromkeys(key.partition(".")[0] for key in known)
    raise BadRequestError(f"no key begins with {begin!r}{did_you_mean(begin, sections)} ({', '.join(sections)})")


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None)
    # A key that is cut cannot be typed.
    table.add_column("key", no_wrap=True, overflow="fold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def show_config(request: TrainRequest, begin: str = "", *, as_json: bool) -> None:
    """Prints the configuration of a new run, with the origin of each value; its dataset may fill in more.

    Args:
        request: the run.
        begin: the keys to print begin with it.
        as_json: whether to print JSON.

    Raises:
        BadConfigError, BadRequestError, MissingInputError: as `ddpm train`, or no key begins so.
    """
    from job.config import parse_sets, read_config_file
    from job.verbs.runs import print_json, print_table

    file, sets = read_config_file(request.config_file), parse_sets(request.sets)
    preset = request.preset or EMBEDDED
    config = draft(preset, file | sets)
    layers = {"--set": sets, f"{request.config_file}": file, f"preset {preset}": preset_keys(preset)}

    def origin(key: str) -> str:
        follows = {*FOLLOWS, *(key for key in CHOSEN_ELSEWHERE if key.startswith("data."))}
        usual = "the dataset" if key in follows else "default"
        return next((name for name, layer in layers.items() if key in layer), usual)

    settings = {*known_keys()} - {"preset"}
    told = {key: {"value": value, "from": origin(key)} for key, value in config.flat().items() if key in settings}
    told = _beginning(told, begin)
    if as_json:
        print_json(told)
        return
    table = _table("value", "from")
    for key, values in told.items():
        table.add_row(key, shown(values["value"]), values["from"])
    print_table(table, "no keys", wraps=True)


def shown(value: Any) -> str:
    """Returns a value as `--set` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value)) or "[]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'

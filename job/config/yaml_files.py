"""YAML files that people write by hand, and those of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from job.exits import BadConfigError

MOST_SETTINGS_BYTES = 1 << 18
"""Of a file with settings or targets."""


class _PlainLoader(yaml.CSafeLoader):
    """YAML with each key once and without aliases: they can make a small file refer to itself, or be gigabytes.

    It is libyaml's: the loader in Python takes 10 ms for a run's configuration, and a bucket has hundreds.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node in self.constructed_objects or node in self.recursive_objects:
            raise yaml.YAMLError(f"aliases are not supported, as of line {node.start_mark.line + 1}")
        value = super().construct_object(node, deep)
        if isinstance(value, int) and value.bit_length() > 64:
            # Thousands of hexadecimal digits would be one that no message can repeat.
            raise yaml.YAMLError("a number is beyond 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # The last one would win without a word.
            ((twice, _),) = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"{twice!r} is there twice, below line {node.start_mark.line + 1}")
        return mapping


def parse_yaml(text: str | bytes) -> Any:
    """Plain data from YAML.

    Raises:
        yaml.YAMLError: not YAML, or with aliases, or a key that is there twice, or nested too deeply.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 -- a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # What a tag or the look of a value promised: 2020-99-99, !!int x, a number of thousands of digits.
        raise yaml.YAMLError(f"not the value it seems to be: {error}") from None


def parse_mapping(text: str, where: str, of: str = "sections such as `train:`") -> dict[str, Any]:
    """A YAML file that is a mapping `of` something, or empty; `where` it lies is named if it is neither.

    Raises:
        BadConfigError: it is something else, or not valid.
    """
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict | None):
        raise BadConfigError(f"{where} must be a mapping of {of}")
    return document or {}


def read_settings(path: Path) -> str:
    """A file that somebody wrote by hand, such as `targets.yaml`.

    Raises:
        OSError: it cannot be read.
        BadConfigError: it is a pipe, or longer than such a file can be; /dev/zero never ends.
    """
    if path.is_fifo():
        raise BadConfigError(f"{path} is a pipe, and each process of a command reads it anew: name a file")
    with path.open("rb") as file:
        text = file.read(MOST_SETTINGS_BYTES + 1)
    if len(text) > MOST_SETTINGS_BYTES:
        raise BadConfigError(f"{path} has more than {MOST_SETTINGS_BYTES >> 10} KiB: is it the file that you mean?")
    # What is no text is no YAML either, which says so.
    return text.decode(errors="surrogateescape")

"""Reading YAML: files that people write by hand, and values after `--set`."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from job.exits import BadConfigError

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]{0,18})")
LARGEST_FILE_BYTES = 1 << 18
"""Limit of a file with settings or targets."""


class _PlainLoader(yaml.CSafeLoader):
    """Loads YAML without aliases and repeated keys; an alias lets a small file contain itself, or expand to gigabytes.

    The C loader is needed: the one in Python takes 10 ms for a run's configuration, and a bucket has hundreds.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node in self.constructed_objects or node in self.recursive_objects:
            raise yaml.YAMLError(f"aliases are not supported (line {node.start_mark.line + 1})")
        value = super().construct_object(node, deep)
        if type(value) is int and not _DECIMAL.fullmatch(node.value):
            # YAML 1.1 would read 0x10 as 16, 010 as 8 and 1:30 as 90.
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"write {node.value:.40} as a decimal number of up to 19 digits (line {line})")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # The last value would silently win.
            ((twice, _),) = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"key {twice!r} appears twice below line {node.start_mark.line + 1}")
        return mapping


def parse_yaml(text: str | bytes) -> Any:
    """Returns the plain data of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, is nested too deeply, or has an alias or a repeated key.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 -- a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The value contradicts its tag or form: 2020-99-99, !!int x, a number of thousands of digits.
        raise yaml.YAMLError(f"invalid value: {error}") from None


def parse_mapping(text: str, where: str, of: str = "sections such as `train:`") -> dict[str, Any]:
    """Returns a YAML text that is empty or a mapping `of` something; an error begins with `where` it comes from.

    Raises:
        BadConfigError: it is something else, or not valid YAML.
    """
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict | None):
        raise BadConfigError(f"{where} must be a mapping of {of}")
    return document or {}


def read_settings(path: Path) -> str:
    """Returns the text of a file that a person writes, such as `targets.yaml`; the path may begin with `~`.

    Raises:
        OSError: the file cannot be read.
        BadConfigError: it is a pipe, or too large; /dev/zero never ends.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111 -- a user may have no home
    if path.is_fifo():
        raise BadConfigError(f"{path} is a pipe, and several processes have to read it: name a file")
    with path.open("rb") as file:
        text = file.read(LARGEST_FILE_BYTES + 1)
    if len(text) > LARGEST_FILE_BYTES:
        raise BadConfigError(f"{path} is larger than {LARGEST_FILE_BYTES >> 10} KiB: is it the right file?")
    # The parser reports bytes that are not text.
    return text.decode(errors="surrogateescape")

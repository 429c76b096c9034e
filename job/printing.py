"""Results of commands for people and programs: tables, lines with titles, JSON, pages in the browser."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from job.progress import note
from job.store import Store, is_remote

if TYPE_CHECKING:
    from rich.table import Table

PIPE_COLUMNS = 1000
"""The width of tables without a terminal, so that other programs get whole lines."""


def print_json(document: Any) -> None:
    """Prints a document for programs: times in ISO 8601, and null for NaN and infinite numbers."""
    print(json.dumps(to_jsonable_python(document, inf_nan_mode="null"), indent=2, ensure_ascii=False))


def print_table(table: Table, without_rows: str, *, wraps: bool = False) -> None:
    """Prints a table, or a text in the place of an empty one; in a terminal its cells wrap, or its lines are cut."""
    from rich.console import Console
    from rich.text import Text

    if not table.row_count:
        print(without_rows)
        return
    # A licence may contain text that Rich would read as [/MARKUP].
    console = Console(markup=False, emoji=False, color_system=None)
    if console.is_terminal and wraps:
        console.print(table)
        return
    columns = console.width if console.is_terminal else PIPE_COLUMNS
    console.width = PIPE_COLUMNS
    with console.capture() as text:
        console.print(table)
    for line in text.get().splitlines():
        # A pager would break the spaces at the ends of the lines into empty ones.
        shown = Text(line.rstrip())
        # Rich itself would cut every column, and so the names.
        shown.truncate(columns, overflow="ellipsis")
        print(shown)


def in_lines(titled: Iterable[tuple[str, str]]) -> str:
    """Returns texts beside their titles, a line for each."""
    return "\n".join(f"{title:<11} {text}" for title, text in titled)


def open_page(folder: Store, key: str, output: Path | None = None) -> None:
    """Opens a page in this machine's browser: `output`, else an object; without a page or a browser this is a note."""
    path = output
    if path is None and folder.exists(key):
        path = Path(folder.uri, key)
        if is_remote(folder.uri):
            import tempfile

            # The browser reads it after this process has ended.
            path = Path(tempfile.mkdtemp(prefix="ddpm-"), key)
            path.write_bytes(folder.read(key).data)
    if path is None or not webbrowser.open(path.absolute().as_uri()):
        note(f"no browser has opened {output or folder.uri_of(key)}")

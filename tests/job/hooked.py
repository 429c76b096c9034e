"""Lines of a test that run inside the program's own processes, right after these have imported a module."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

_SITECUSTOMIZE = '''
import sys
from contextlib import suppress
from importlib.util import find_spec

HOOKS = {hooks!r}


class Finder:
    """Executes the lines for a module in its own namespace, after its own."""

    def find_spec(self, name, path, target=None):
        if name not in HOOKS:
            return None
        lines = HOOKS.pop(name)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            exec(lines, vars(module))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
# Python imports the first module of this name; another one may be waiting behind it.
sys.path.remove({folder!r})
this = sys.modules.pop("sitecustomize")
with suppress(ImportError):
    import sitecustomize
sys.modules.setdefault("sitecustomize", this)
'''


def hooked(folder: Path, **hooks: str) -> str:
    """`PYTHONPATH` of processes that execute `hooks`; a name's double underscore stands for the dot of a module."""
    folder.mkdir()
    lines = {name.replace("__", "."): textwrap.dedent(text) for name, text in hooks.items()}
    assert all(map(find_spec, lines)), f"a module of {[*lines]} is not there, so its lines would never run"
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(hooks=lines, folder=str(folder)))
    return str(folder)

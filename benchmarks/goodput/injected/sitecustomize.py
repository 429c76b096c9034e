"""Runs before everything else in each process of the goodput benchmark, which puts this folder on their PYTHONPATH."""

import importlib
import sys
from contextlib import suppress
from pathlib import Path

from benchmarks.goodput.trace import install

install()

# The machine may have its own module of this name, which must run as usual.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
this = sys.modules.pop("sitecustomize")
with suppress(ImportError):
    importlib.import_module("sitecustomize")
sys.modules.setdefault("sitecustomize", this)

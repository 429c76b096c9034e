"""Found by Python before anything else runs, because the campaign puts this folder on PYTHONPATH of what it starts."""

import importlib
import sys
from contextlib import suppress
from pathlib import Path

from benchmarks.crash_campaign.injection import install

install()

# The machine may have a module of this name as well, which is to run as if this one were not there.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
this = sys.modules.pop("sitecustomize")
with suppress(ImportError):
    importlib.import_module("sitecustomize")
sys.modules.setdefault("sitecustomize", this)

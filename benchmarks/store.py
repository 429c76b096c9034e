"""Buckets: our store against the clouds' official clients, on servers on this machine, with and without a distance.

With `DDPM_BENCH_BASE=FOLDER`, a checkout of an earlier commit with its own `.venv`, the store of that commit takes part
in the same turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.measuring import Figure, faster, in_turn
from benchmarks.store_subject import BYTES_PER_SECOND
from tests.servers import SERVERS, new_bucket

BASE_VARIABLE = "DDPM_BENCH_BASE"
ROOT = str(Path(__file__).parents[1])
FAR_AT_LEAST = {"upload": 0.95, "download": 2.5}
"""The targets at a distance, in parts of what one connection has."""


def store(quick: bool) -> list[Figure]:
    """Measures large files and many small objects for each cloud, then large files with 20 ms and 50 MB/s between."""
    size_bytes, small = (8_000_000, 20) if quick else (200_000_000, 200)
    figures = []
    with TemporaryDirectory(prefix="ddpm-bench-") as name, ExitStack() as stack:
        path, folder = Path(name) / "content", Path(name)
        path.write_bytes(os.urandom(size_bytes))
        for kind in ("gs", "s3", "az"):
            (folder / kind).mkdir()
            url = stack.enter_context(SERVERS[kind].start(folder / kind))
            files = {"upload": str(path), "download": str(folder / "out")}
            near = files | {"puts": str(small), "gets": str(small)}
            figures += list(rows(kind, url, near, 1 if quick else 2).values())
            with distance(url) as far:
                for row, found in rows(f"{kind}_far", far, files, turns=1, server=url, warmup_turns=0).items():
                    link_seconds, ours = size_bytes / BYTES_PER_SECOND, found.raw["ours_seconds"]
                    what = f"{kind}: {row} at a distance / what one connection has, ×"
                    beside, shares = f"{median(ours):.3g} s of {link_seconds:.3g} s", [link_seconds / s for s in ours]
                    key = f"{found.key}_of_link"
                    figures += [found, Figure(key, what, shares, at_least=FAR_AT_LEAST[row], beside=beside)]
    return figures


def rows(
    name: str, url: str, operations: dict[str, str], turns: int, server: str = "", warmup_turns: int = 1
) -> dict[str, Figure]:
    """Returns a figure for each operation, in turn by our store, the earlier one if given, and the raw client."""
    kind, figures = name.partition("_")[0], {}
    bucket = new_bucket(kind, server or url).partition("://")[2]
    with ExitStack() as workers:
        participants = ["ours", *(["base"] if BASE_VARIABLE in os.environ else []), "raw"]
        everybody = {one: workers.enter_context(worker(one, kind, url, bucket)) for one in participants}
        for row, word in operations.items():
            # Each participant writes its own keys; all read the same.
            writes, key = row in ("upload", "puts"), "large" if row in ("upload", "download") else "small"
            asked = {
                one: lambda one=one, ask=ask: ask(row, word, f"{key}-{one if writes else 'ours'}")  # noqa: B023
                for one, ask in everybody.items()
            }
            took = in_turn(f"{name}: {row}", asked, turns, warmup_turns)
            peer = "base" if "base" in took else "raw"
            figures[row] = faster(f"store_{name}_{row}", f"{name}: {row}, speed / {peer}", took, peer, at_least=0.9)
    return figures


@contextmanager
def worker(name: str, kind: str, url: str, bucket: str) -> Iterator[Callable[..., float]]:
    """Starts a process that runs the requested operations, and yields a function that returns their seconds."""
    root = os.environ[BASE_VARIABLE] if name == "base" else ROOT
    environment = {**os.environ, **SERVERS[kind].variables(url), "PYTHONPATH": root}
    # An earlier store has other parameters, which its own script knows.
    python = f"{root}/.venv/bin/python" if name == "base" else sys.executable
    words = [*script(python, root), "raw" if name == "raw" else "store", kind, bucket]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, cwd=root, **pipes) as child:

        def ask(*asked: str) -> float:
            print(json.dumps(asked), file=child.stdin, flush=True)
            return float(child.stdout.readline())

        yield ask
        child.stdin.close()


def script(python: str, root: str) -> list[str]:
    """Returns the words that start the participants' script of a checkout."""
    # Without -P the folder of the script comes first, whose `requests.py` hides the library of that name.
    return [python, "-P", f"{root}/benchmarks/store_subject.py"]


@contextmanager
def distance(url: str) -> Iterator[str]:
    """Puts the server behind a slow network, in a separate process that takes no time of the participants."""
    words = [*script(sys.executable, ROOT), "network", url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline().strip()
        finally:
            child.kill()

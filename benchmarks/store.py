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
from functools import partial
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
    """Moves a large file for each cloud, then with 20 ms and 50 MB/s a connection between."""
    size_bytes = 8_000_000 if quick else 200_000_000
    figures = []
    with TemporaryDirectory(prefix="ddpm-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "content").write_bytes(os.urandom(size_bytes))
        for kind in ("gs", "s3", "az"):
            (folder / kind).mkdir()
            url = stack.enter_context(SERVERS[kind].start(folder / kind))
            figures += rows(kind, kind, url, url, folder, turns=1 if quick else 2).values()
            with distance(url) as far:
                found = rows(f"{kind}_far", kind, url, far, folder, turns=1)
            for row, figure in found.items():
                link_seconds, ours = size_bytes / BYTES_PER_SECOND, figure.raw["ours_seconds"]
                what = f"{kind}: {row} at a distance / what one connection has, ×"
                beside, shares = f"{median(ours):.3g} s of {link_seconds:.3g} s", [link_seconds / each for each in ours]
                key, at_least = f"{figure.key}_of_link", FAR_AT_LEAST[row]
                figures += [figure, Figure(key, what, shares, at_least=at_least, beside=beside)]
    return figures


def rows(name: str, kind: str, server: str, url: str, folder: Path, turns: int) -> dict[str, Figure]:
    """Returns figures of an upload and a download, in turn by our store, the earlier one if given, and the raw client.

    `url` leads to the server, at a distance or not.
    """
    bucket = new_bucket(kind, server).partition("://")[2]
    participants, figures = ["ours", *(["base"] if BASE_VARIABLE in os.environ else []), "raw"], {}
    with ExitStack() as workers:
        everybody = {one: workers.enter_context(worker(one, kind, url, bucket)) for one in participants}
        for row, file in (("upload", "content"), ("download", "out")):
            # Each participant writes its own object; all read the same.
            works = {
                one: partial(ask, row, str(folder / file), f"large-{one if row == 'upload' else 'ours'}")
                for one, ask in everybody.items()
            }
            took = in_turn(f"{name}: {row}", works, turns, warmup_turns=int(url == server))
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

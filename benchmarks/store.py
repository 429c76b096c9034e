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

from benchmarks.measuring import Figure
from benchmarks.store_subject import BYTES_PER_SECOND
from job.progress import Progress
from tests.servers import SERVERS, new_bucket

BASE_VARIABLE = "DDPM_BENCH_BASE"


def measure(quick: bool) -> list[Figure]:
    """Measures large files and many small objects, for each cloud."""
    sizes = {"megabytes": 8, "small": 20, "listed": 30} if quick else {"megabytes": 200, "small": 200, "listed": 2_000}
    figures = []
    with TemporaryDirectory(prefix="ddpm-bench-") as name, servers(Path(name)) as urls:
        folder = Path(name)
        (folder / "content").write_bytes(os.urandom(sizes["megabytes"] * 10**6))
        for kind, url in urls.items():
            figures += near(kind, url, folder, sizes, turns=1 if quick else 2)
        for kind, url in urls.items():
            with distance(url) as far:
                figures += at_distance(kind, url, far, folder, sizes, turns=1)
    return figures


def near(kind: str, url: str, folder: Path, sizes: dict[str, int], turns: int) -> list[Figure]:
    """Measures each row without a distance, in turn: our store, the raw client and, if given, the earlier store."""
    bucket = new_bucket(kind, url).partition("://")[2]
    rows = {
        "upload": ["upload", folder / "content", "large"],
        "download": ["download", folder / "out", "large"],
        "ranges": ["ranges", "64", "large"],
        "puts": ["puts", sizes["small"], "small"],
        "gets": ["gets", sizes["small"], "small"],
        "list": ["list", sizes["listed"], "listed"],
    }
    figures = []
    with ExitStack() as workers:
        everybody = {name: workers.enter_context(worker(name, kind, url, bucket)) for name in participants()}
        with Progress(f"{kind}: at no distance", total=len(rows) * (turns + 1), unit="turns") as bar:
            for number, (row, words) in enumerate(rows.items()):
                took: dict[str, list[float]] = {name: [] for name in everybody}
                if row == "list":
                    # Filled last, since servers are slower with many objects.
                    everybody["ours"]("fill", str(sizes["listed"]), "listed")
                for turn in range(-1, turns):
                    for name, ask in everybody.items():
                        # Each participant writes its own keys; all read the same.
                        own = f"{words[2]}-{name}" if row in ("upload", "puts") else str(words[2])
                        if row in ("download", "ranges", "gets"):
                            own += "-ours"
                        spent = ask(str(words[0]), str(words[1]), own)
                        if turn >= 0:
                            took[name].append(spent)
                    bar.update(number * (turns + 1) + turn + 2)
                figures.append(figure(f"store_{kind}_{row}", f"{kind}: {row}", took))
    return figures


def at_distance(kind: str, url: str, far: str, folder: Path, sizes: dict[str, int], turns: int) -> list[Figure]:
    """Measures uploads and downloads with 20 ms per answer and 50 MB/s per connection."""
    bucket = new_bucket(kind, url).partition("://")[2]
    figures, link_seconds = [], sizes["megabytes"] * 1e6 / BYTES_PER_SECOND
    with ExitStack() as workers:
        everybody = {name: workers.enter_context(worker(name, kind, far, bucket)) for name in participants()}
        with Progress(f"{kind}: at a distance", total=2 * turns, unit="turns") as bar:
            for number, (row, path) in enumerate((("upload", "content"), ("download", "out"))):
                took: dict[str, list[float]] = {name: [] for name in everybody}
                for turn in range(turns):
                    for name, ask in everybody.items():
                        took[name].append(ask(row, str(folder / path), f"large-{name if row == 'upload' else 'ours'}"))
                    bar.update(number * turns + turn + 1)
                found = figure(f"store_{kind}_far_{row}", f"{kind}: {row} at a distance", took)
                figures.append(found)
                figures.append(
                    Figure(
                        f"store_{kind}_far_{row}_of_link",
                        f"{kind}: {row} at a distance / what one connection has, ×",
                        [link_seconds / each for each in took["ours"]],
                        at_least=0.95 if row == "upload" else 2.5,
                        beside=f"{median(took['ours']):.3g} s of {link_seconds:.3g} s",
                    )
                )
    return figures


def figure(key: str, what: str, took: dict[str, list[float]]) -> Figure:
    """Returns our speed divided by that of the earlier store, else by that of the raw client."""
    peer = "base" if "base" in took else "raw"
    speeds = [theirs / ours for theirs, ours in zip(took[peer], took["ours"], strict=True)]
    beside = ", ".join(f"{name} {median(spent):.3g} s" for name, spent in took.items())
    return Figure(
        key,
        f"{what}, speed / {peer}, ×",
        speeds,
        at_least=0.9,
        beside=beside,
        raw={f"{n}_seconds": s for n, s in took.items()},
    )


def participants() -> list[str]:
    """Returns the names of the participants."""
    return ["ours", *(["base"] if BASE_VARIABLE in os.environ else []), "raw"]


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """Starts a server of each cloud."""
    with ExitStack() as stack:
        urls = {}
        for kind in ("gs", "s3", "az"):
            (folder / kind).mkdir()
            urls[kind] = stack.enter_context(SERVERS[kind].start(folder / kind))
        yield urls


@contextmanager
def worker(name: str, kind: str, url: str, bucket: str) -> Iterator[Callable[..., float]]:
    """Starts a process that runs the requested operations, and yields a function that returns their seconds."""
    root = os.environ[BASE_VARIABLE] if name == "base" else str(Path(__file__).parents[1])
    environment = {**os.environ, **SERVERS[kind].variables(url), "PYTHONPATH": root}
    # An earlier store has other parameters, which its own script knows.
    python = f"{root}/.venv/bin/python" if name == "base" else sys.executable
    words = [*script(python, root), "raw" if name == "raw" else "store", kind, bucket]
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

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
    words = [*script(sys.executable, str(Path(__file__).parents[1])), "network", url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline().strip()
        finally:
            child.kill()

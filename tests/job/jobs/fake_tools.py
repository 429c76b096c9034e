#!/usr/bin/env python3
"""What a VM's script finds on its PATH: docker and others, which do as they are told, and write down their calls.

Links of their names point here. `FAKE_TOOLS` is a folder: `codes` holds a word for each `docker run`, an exit code or
`hold:CODE` for a container that ends with it when it is told to stop; `calls` is where the calls go, as JSON lines.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_TOOLS"])


def main() -> int:
    tool, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (FOLDER / "calls").open("a") as calls:
        calls.write(json.dumps([tool, *words]) + "\n")
    if tool == "docker" and words[:1] == ["run"]:
        return run(words)
    if tool == "docker" and words[:1] == ["stop"]:
        return stop(words[-1])
    return int(popped(f"{tool}-{words[0]}" if tool == "docker" else tool, "0"))


def run(words: list[str]) -> int:
    """A container in the foreground; its name is taken while it runs."""
    name = words[words.index("--name") + 1]
    stopped = False

    def stop_it(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    word = popped("codes", "0")
    if word.startswith("late:"):
        # The engine takes a while before there is a container that could be stopped.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1)
        word = word.removeprefix("late:")
    signal.signal(signal.SIGTERM, stop_it)
    pid = FOLDER / f"container-{name}"
    pid.write_text(str(os.getpid()))
    try:
        if not word.startswith("hold:"):
            return int(word)
        while not stopped:
            time.sleep(0.02)
        (FOLDER / "stopped").write_text(word)
        return int(word.removeprefix("hold:"))
    finally:
        pid.unlink()


def stop(name: str) -> int:
    """Sends SIGTERM to the container and waits for its end."""
    pid = FOLDER / f"container-{name}"
    try:
        os.kill(int(pid.read_text()), signal.SIGTERM)
    except (OSError, ValueError):
        print(f"Error response from daemon: No such container: {name}", file=sys.stderr)
        return 1
    while pid.exists():
        time.sleep(0.02)
    return 0


def popped(name: str, otherwise: str) -> str:
    """The next word of a file, which is taken out of it."""
    path = FOLDER / name
    words = path.read_text().split() if path.exists() else []
    path.write_text(" ".join(words[1:]))
    return words[0] if words else otherwise


if __name__ == "__main__":
    raise SystemExit(main())

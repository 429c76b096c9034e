#!/usr/bin/env python3
"""What a VM's script finds on its PATH: docker and others, which do as they are told, and write down their calls.

Links of their names point here. `FAKE_TOOLS` is a folder: `calls` is where the calls go, as JSON lines; a file of a
tool's name, such as `docker-run`, holds a word for each of its calls: an exit code, or `hold:CODE` for a container that
ends with it when it is told to stop, or `deaf` for what hangs and hears no signal but SIGKILL.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_TOOLS"])
CONTAINER = FOLDER / "container"


def main() -> int:
    tool, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (FOLDER / "calls").open("a") as calls:
        calls.write(json.dumps([tool, *words]) + "\n")
    if tool == "docker":
        tool = f"docker-{words[0]}"
    if tool == "docker-stop":
        os.kill(int(CONTAINER.read_text()), signal.SIGTERM)
        while CONTAINER.exists():
            time.sleep(0.02)
        return 0
    own = FOLDER / tool
    word, *rest = own.read_text().split() if own.exists() else ["0"]
    own.write_text(" ".join(rest or [word]))
    if word == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if word.startswith("hold:"):
        hold()
    return int(word.removeprefix("hold:"))


def hold() -> None:
    """Waits for SIGTERM, as a container of which there is one."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    CONTAINER.write_text(str(os.getpid()))
    while not stopped:
        time.sleep(0.02)
    CONTAINER.unlink()


if __name__ == "__main__":
    raise SystemExit(main())

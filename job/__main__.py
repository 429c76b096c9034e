"""`ddpm`, also as `python -m job`; what the launcher starts begins here.

Process 1 of a container does not even notice a signal that it has no handler for. So there is one before anything else
is imported, which takes half a second, and longer in an image that was never read before.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_LAST_SECONDS = 5


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"ddpm: stopped by {signal.Signals(number).name}; the same command begins again\n".encode())
    if not _has_begun:
        # An exception would be lost where a module is imported with `except`, or in a callback of the interpreter's.
        os._exit(75)
    # There may be a progress bar to end, or a temporary folder to remove. A library that is imported late may catch it.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(75))
    signal.alarm(_LAST_SECONDS)
    raise SystemExit(75)


_has_begun = False


def main() -> None:
    """Entry point; ends with a code of the table in `job.exits`, or 1 after a crash."""
    global _has_begun
    # A rank ends at a signal that comes before its work: its launcher knows what that means.
    if "DDPM_LAUNCHED" not in os.environ:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _leave)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # What is opened later would get the number of a closed one, and be written to by whoever means a terminal.
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))

    from job.processes.launched import attach

    attach()

    from job.cli import app

    _has_begun = True
    app.main()


if __name__ == "__main__":
    main()

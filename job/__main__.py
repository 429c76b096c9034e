"""`ddpm`, also as `python -m job`; what the launcher starts begins here.

Process 1 of a container does not even notice a signal that it has no handler for. So there is one before anything else
is imported, which takes half a second, and longer in an image that was never read before.
"""

import os
import signal
from types import FrameType
from typing import NoReturn


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    os.write(2, f"ddpm: stopped by {name}; the same command begins again\n".encode())
    raise SystemExit(75)


def main() -> None:
    """Entry point; ends with a code of the table in `job.exits`, or 1 after a crash."""
    # A rank ends at a signal that comes before its work: its launcher knows what that means.
    if "DDPM_LAUNCHED" not in os.environ:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _leave)

    from job.processes.launched import attach

    attach()

    from job.cli import app

    app.main()


if __name__ == "__main__":
    main()

"""`ddpm`, also as `python -m job`; what the launcher starts begins here.

Process 1 of a container does not even notice a signal that it has no handler for. So there is one before anything
large is imported, which takes half a second, and longer in an image that was never read before.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from job.exits import ending_of
from job.stop import StopSignal, handle_stop_signals, ignore_stop_signals

_LAST_SECONDS = 5
_is_ending = False


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends this process, with a progress bar to close and a temporary folder to remove; its work has not begun yet."""
    global _is_ending
    _is_ending = True
    ignore_stop_signals()
    os.write(2, f"ddpm: stopped by {signal.Signals(number).name}; the same command begins again\n".encode())
    # The exception may be lost in a module that is imported with `except`, or in a callback of the interpreter's.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(75))
    signal.alarm(_LAST_SECONDS)
    raise StopSignal(75)


def _open_closed_streams() -> None:
    # What is opened later would get their numbers, and be written to by whoever means a terminal.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def main() -> None:
    """Entry point; ends with a code of the table in `job.exits`, or 1 after a crash."""
    # A rank ends at a signal that comes before its work: its launcher knows what that means.
    if "DDPM_LAUNCHED" not in os.environ:
        handle_stop_signals(_end)
    _open_closed_streams()
    try:
        from job.processes.launched import attach

        attach()

        from job.cli import app

        app.main()
    except BaseException as error:
        # A library that was being imported may have made another exception of it.
        if _is_ending:
            os._exit(75)
        # What `app` does with errors, before there is one.
        code, said = ending_of(error)
        if not said:
            raise
        print(f"ddpm: {said}", file=sys.stderr)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()

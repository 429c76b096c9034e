"""The entry point of `ddpm`, of `python -m job`, and of the processes that the launcher starts.

Process 1 of a container ignores a signal without a handler. So the handler is set before the large imports, which take
half a second, and longer in a new image.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from job.exits import Exit, ending_of
from job.stop import StopSignal, handle_stop_signals, ignore_stop_signals

_LAST_SECONDS = 5
_is_ending = False


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends this process before its work begins; closes its progress bar and deletes its temporary folder."""
    global _is_ending
    _is_ending = True
    ignore_stop_signals()
    os.write(2, f"ddpm: stopped by {signal.Signals(number).name}; the same command begins again\n".encode())
    # An `except` around an import, or a callback of the interpreter, may swallow the exception: the alarm ends those.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(Exit.STOPPED))
    signal.alarm(_LAST_SECONDS)
    raise StopSignal(Exit.STOPPED)


def _open_closed_streams() -> None:
    # The next opened file would get the number of a closed stream, and messages for the terminal would go into it.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def main() -> None:
    """Runs the program; ends with a code of the table in `job.exits`, or 1 after a crash."""
    # A rank needs no handler: a signal before its work ends it, and its launcher knows the reason.
    if "DDPM_LAUNCHED" not in os.environ:
        handle_stop_signals(_end)
    _open_closed_streams()
    try:
        from job.processes.launched import attach

        attach()

        from job.cli import app

        app.main()
    except BaseException as error:
        # A library that was being imported may have replaced the exception.
        if _is_ending:
            os._exit(Exit.STOPPED)
        # Errors before `app` exists print like those in it.
        code, said = ending_of(error)
        if not said:
            raise
        print(f"ddpm: {said}", file=sys.stderr)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()

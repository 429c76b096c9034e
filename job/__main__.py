"""The entry point of `ddpm`, of `python -m job`, and of the processes that the launcher starts: signals, errors, exit.

Process 1 of a container ignores a signal without a handler. So the handler is set before the large imports, which take
half a second, and longer in a new image.
"""

import atexit
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from job.platform import check_system

# The modules below import what Windows lacks.
check_system()

from job.exits import Exit, ending_of  # noqa: E402
from job.processes.launcher import attach, is_launched, lost_peer  # noqa: E402
from job.stop import StopSignal, handle_stop_signals, ignore_stop_signals  # noqa: E402

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
    """Runs the program; ends with a code of the table in `job.exits`, or with 1 after a crash."""
    # A rank needs no handler: a signal before its work ends it, and its launcher knows the reason.
    if not is_launched():
        handle_stop_signals(_end)
    _open_closed_streams()
    try:
        with errors_as_lines():
            attach()

            from job.cli.app import app

            app()
    except SystemExit as end:
        # Libraries delete files at exit, such as a temporary file with a cluster's key.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # The reader of the stream may be gone.
            with suppress(OSError):
                stream.flush()
        # A normal exit waits for threads, and one may wait for a bucket that does not answer. The threads of a process
        # group that is gone would even abort the program, and its code would be SIGABRT.
        os._exit(ending_of(end)[0])
    except BaseException:
        # A library that was being imported may have replaced the exception.
        if _is_ending:
            os._exit(Exit.STOPPED)
        raise


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Prints an error of a command as one line.

    Raises:
        SystemExit: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show ×, ᾱ or the bytes of a file name must not end the command.
            stream.reconfigure(errors="backslashreplace")
    output = os.fstat(1)
    try:
        yield
    except Exception as error:
        code, said = ending_of(error)
        if peer := lost_peer(error):
            code, said = Exit.LOST_PEER, f"another process of this run went away ({peer})"
        if not said or _is_ending:
            raise
        _say(said, code)
        raise SystemExit(int(code)) from None
    except SystemExit as end:
        # Typer ends with 1 for every broken pipe. One that `head` or a pager closes must not count as a failure.
        left = isinstance(end.__context__, BrokenPipeError) and _is_unread(output)
        raise SystemExit(0 if left else end.code) from None


def _is_unread(output: os.stat_result) -> bool:
    """Returns whether the reader of a person's command is gone. Rich has then put the null device in its place."""
    poll = select.poll()
    poll.register(1, 0)
    return not is_launched() and (bool(poll.poll(0)) or not os.path.samestat(os.fstat(1), output))


def _say(message: str, code: int) -> None:
    # The launcher shows the last lines of rank 0, and of the rank that failed first.
    rank = os.environ.get("RANK", "0")
    who = "ddpm" if rank == "0" or not rank.isdecimal() or is_launched() else f"ddpm (rank {rank})"
    # The reader may be gone, and engines need only the exit code.
    with suppress(OSError):
        # All ranks stop together: rank 0 alone prints it.
        if who == "ddpm" or code != Exit.STOPPED:
            print(f"{who}: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()

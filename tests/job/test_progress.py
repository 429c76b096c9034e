"""Progress is watched from outside: a child process draws it into a pipe or into a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from job.progress import THIN_SPACE, Progress, count_text, duration_text

COLUMNS = 80
HEAD = "import sys, time, job.progress\nfrom job.progress import Progress\n"
SOON = "job.progress.QUIET_SECONDS = 0.2\n"


def run_piped(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HEAD + script], capture_output=True, text=True, timeout=60)


def run_on_terminal(script: str, term: str = "xterm-256color") -> tuple[str, str]:
    """What a child wrote to its terminal (stderr), and what to its stdout, which is a pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-c", HEAD + script],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": term},
        text=True,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says EIO when the last writer has gone
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, written.decode()
    return written.decode(), output


def screen_after(written: str) -> list[str]:
    """The lines that a person sees in the end: a terminal with the few controls that a live display uses."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            continue
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b"):
            lines[row] += token
    return [line for line in lines if line]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (1505, "25 min"),
        (3599, "59 min"),
        (3780, "1 h 03 min"),
        (86399, "23 h 59 min"),
        (187200, "2 d 04 h"),
        (-1, "0 s"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration_text(seconds) == text


def test_numbers_are_grouped_by_spaces_that_do_not_break():
    assert [count_text(n) for n in (0, 999, 1000, 1234567)] == ["0", "999", "1\u202f000", "1\u202f234\u202f567"]


def test_a_pipe_gets_plain_lines_with_everything_on_them():
    script = """
with Progress("packing", total=24000, line_seconds=0.25) as bar:
    for i in range(12):
        time.sleep(0.1)
        bar.update((i + 1) * 1000, loss=0.0213456, epoch="3/80", next_checkpoint="in 2 min", gone=None)
"""
    result = run_piped(SOON + script)
    *lines, last = result.stderr.replace(THIN_SPACE, " ").splitlines()
    assert 3 <= len(lines) <= 12
    pattern = (
        r"packing: (\d+) % · (\d+) 000/24 000 images · [\d ]+ images/s · ETA \d+ s"
        r" · loss 0\.02135 · epoch 3/80 · next checkpoint in 2 min"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), lines
    assert all(int(match[1]) == int(match[2]) * 100 // 24 for match in found if match)
    assert re.fullmatch(r"packing: 12 000/24 000 images in \d s · [\d ]+ images/s", last)
    assert "\x1b" not in result.stderr and result.stdout == ""


def test_two_seconds_decide_whether_a_line_is_left():
    under = run_piped('with Progress("packing", total=9) as bar: bar.update(9); time.sleep(1)')
    over = run_piped('with Progress("packing", total=9) as bar: bar.update(9); time.sleep(2.05)')
    assert (under.stderr, under.returncode) == ("", 0)
    assert re.fullmatch(r"packing: 9 images in 2 s · [\d.]+ images/s\n", over.stderr)


def test_rates_and_time_left_count_from_where_a_resumed_run_began():
    script = """
bar = Progress("training", total=1_002_000, line_seconds=0.8)
with bar.started_at(1_000_000):
    for i in range(10):
        time.sleep(0.1)
        bar.update(1_000_000 + (i + 1) * 100)
"""
    line, *_, last = run_piped(SOON + script).stderr.replace(THIN_SPACE, "").splitlines()
    rate, left = re.search(r"(\d+) images/s · ETA (\d+) s", line).groups()  # type: ignore[union-attr]
    assert 300 <= int(rate) <= 1000
    assert 1 <= int(left) <= 4
    assert 300 <= int(re.search(r"(\d+) images/s", last)[1]) <= 1000  # type: ignore[index]


def test_a_total_may_become_known_later_and_may_stay_unknown():
    script = """
with Progress("packing", line_seconds=0.3) as bar:
    bar.update(10)
    time.sleep(0.45)
    bar.update(20, total=40)
    time.sleep(0.3)
"""
    first, *_, second, _ = run_piped(SOON + script).stderr.replace(THIN_SPACE, " ").splitlines()
    assert re.fullmatch(r"packing: 10 images · [\d.]+ images/s", first)
    assert re.match(r"packing: 50 % · 20/40 images · [\d.]+ images/s · ETA \d+ s", second)


def test_an_error_passes_through_and_the_last_line_says_where():
    script = """
try:
    with Progress("training", total=500) as bar:
        bar.update(120)
        time.sleep(0.25)
        raise ValueError("as it was")
except ValueError as error:
    print(error)
"""
    result = run_piped(SOON + script)
    assert re.match(r"training: stopped at 120/500 images in \d s · ", result.stderr)
    assert result.stdout == "as it was\n"


def test_disabled_it_is_silent_and_starts_nothing():
    script = """
import threading
with Progress("training", total=500, disable=True, line_seconds=0.05) as bar:
    bar.update(120)
    bar.note("nobody")
    time.sleep(0.3)
    print(threading.active_count())
"""
    result = run_piped(SOON + script)
    assert (result.stderr, result.stdout) == ("", "1\n")


def test_neither_import_nor_a_pipe_loads_rich():
    result = run_piped("with Progress('a') as bar: bar.note('hello')\nprint('rich' in sys.modules)")
    assert (result.stdout, result.stderr) == ("False\n", "hello\n")


def test_a_reader_that_went_away_does_not_end_the_run():
    script = 'with Progress("a", line_seconds=0.05) as bar:\n    time.sleep(0.3)\n    bar.note("x")\nprint("done")'
    ours, theirs = os.pipe()
    os.close(ours)
    child = subprocess.run(
        [sys.executable, "-c", HEAD + SOON + script], stdout=subprocess.PIPE, stderr=theirs, timeout=60
    )
    os.close(theirs)
    assert child.stdout == b"done\n"


def test_a_terminal_gets_one_live_bar_and_keeps_only_what_is_worth_keeping():
    script = """
with Progress("training", total=24000, start=6000) as bar:
    for i in range(8):
        time.sleep(0.1)
        bar.update(6000 + (i + 1) * 2000, loss=0.0213456, epoch="3/80", next_checkpoint="in 2 min")
        if i == 3:
            bar.note("checkpoint [red]saved[/red] " + "x" * 60)
            print("for the pipe")
"""
    written, output = run_on_terminal(SOON + script)
    assert output == "for the pipe\n" and "for the pipe" not in written
    summary = rf"training: 22{THIN_SPACE}000/24{THIN_SPACE}000 images in \d s · \d+{THIN_SPACE}\d+ images/s"
    *above, last = screen_after(written)
    assert above == ["checkpoint [red]saved[/red] " + "x" * 60]
    assert re.fullmatch(summary, last)
    drawn = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)
    assert drawn.count("━") > 40
    assert "loss 0.02135 · epoch 3/80 · next checkpoint in 2 min" in drawn
    assert max(len(line) for line in re.split(r"[\r\n]+", drawn) if "saved" not in line) <= COLUMNS
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is hidden once and given back"


def test_a_narrow_terminal_cuts_the_details_and_never_wraps():
    script = 'with Progress("training", total=9) as bar:\n    bar.update(5, path="y" * 200)\n    time.sleep(0.5)'
    written, _ = run_on_terminal(script)
    drawn = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)
    assert "yyy…" in drawn
    assert max(len(line) for line in re.split(r"[\r\n]+", drawn)) == COLUMNS
    assert screen_after(written) == [], "what is over within two seconds leaves nothing behind"


def test_bars_nest_on_a_terminal():
    script = """
with Progress("training", total=100) as outer:
    outer.update(40)
    with Progress("sampling", total=64) as inner:
        inner.update(64)
        time.sleep(0.5)
    outer.update(100)
    time.sleep(0.3)
"""
    written, _ = run_on_terminal(SOON + script)
    both = re.compile(r"training[^\r]*\r\n[^\n]*\x1b\[1msampling")
    assert both.search(written), "one below the other"
    sampling, training = screen_after(written)
    assert sampling.startswith("sampling: 64 images in ") and training.startswith("training: 100 images in ")


def test_a_dumb_terminal_gets_lines():
    written, _ = run_on_terminal(
        SOON + 'with Progress("packing", total=9, line_seconds=0.2) as bar: bar.update(3); time.sleep(0.5)', term="dumb"
    )
    assert "\x1b" not in written
    assert written.startswith(f"packing: 33{THIN_SPACE}% · 3/9 images")


def test_updates_from_many_threads_never_turn_it_back(capsys, monkeypatch):
    monkeypatch.setattr("job.progress.QUIET_SECONDS", 0.0)
    bar = Progress("packing", total=8000)

    def work(first: int) -> None:
        for done in range(first, 8001, 8):
            bar.update(done)

    with bar:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bar.update(17)
    assert f"packing: 8{THIN_SPACE}000 images in " in capsys.readouterr().err


def test_an_update_is_cheap_enough_for_every_step():
    microseconds = []
    with Progress("training", total=10**9) as bar:
        for images in range(20_000):
            began = time.perf_counter()
            bar.update(images, loss="0.0213", epoch="3/80")
            microseconds.append((time.perf_counter() - began) * 1e6)
    assert statistics.median(microseconds) < 20

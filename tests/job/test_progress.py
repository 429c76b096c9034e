"""Progress is watched from outside: a child process draws it into a pipe or into a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

COLUMNS = 120
HEAD = "import os, sys, time, job.progress\nfrom job.progress import Progress, note\n"
SOON = "job.progress.QUIET_SECONDS, job.progress.LINE_SECONDS = 0.2, 0.25\n"


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
        written += piece
    os.close(ours)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, written.decode()
    return written.decode(), output


def screen_after(written: str) -> list[str]:
    """The lines that a person sees in the end: a terminal with the one control that a live line uses."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line for line in lines if line]


def test_a_pipe_gets_plain_lines():
    """Rates count from where a resumed run began; a total may become known later."""
    script = """
with Progress("packing", start=1_000_000) as bar:
    for i in range(12):
        time.sleep(0.1)
        bar.update(1_000_000 + (i + 1) * 100, total=None if i < 4 else 1_002_000, loss="0.0213", next_checkpoint="soon")
    # From another thread, which comes late.
    bar.update(1_000_017)
"""
    result = run_piped(SOON + script)
    first, *lines, last = result.stderr.splitlines()
    assert re.fullmatch(r"packing: 1,000,\d+ images · [\d,.]+ images/s · loss 0.0213 · next checkpoint soon", first)
    pattern = (
        r"packing: 99 % · 1,00[01],\d+/1,002,000 images · ([\d,.]+) images/s · ETA 0:00:0[1-9]"
        r" · loss 0\.0213 · next checkpoint soon"
    )
    assert all(300 <= float(re.fullmatch(pattern, line)[1].replace(",", "")) <= 1000 for line in lines[1:]), lines
    counts = r"1,200 images in 0:00:0\d · [\d,.]+ images/s · 1,001,200/1,002,000 in all"
    assert re.fullmatch(rf"packing: {counts}", last)


def test_the_rate_has_a_window():
    script = """
job.progress.RATE_SECONDS = 0.5
with Progress("quick", total=10_000) as bar:
    for i in range(8):
        time.sleep(0.1)
        bar.update(5000 + i)
with Progress("slow", total=100, start=50) as bar:
    for i in range(2):
        time.sleep(0.8)
        bar.update(50.5 + i)
"""
    lines = run_piped(SOON + script).stderr.splitlines()
    (*_, quick, _), (*_, slow, _) = ([line for line in lines if line.startswith(name)] for name in ("quick", "slow"))
    assert 5 < float(re.search(r" ([\d.]+) images/s · ETA", quick)[1]) < 11, quick
    assert 0.5 < float(re.search(r"51 % · 52/100 images · ([\d.]+) images/s · ETA 0:00:[45]\d", slow)[1]) < 1, slow


def test_the_last_line_has_the_error():
    script = """
try:
    with Progress("training", total=500) as bar:
        bar.update(120)
        time.sleep(0.22)
        raise ValueError("as it was")
except ValueError as error:
    print(error)
os.environ["RANK"] = "1"
with Progress("quiet", total=500) as bar:
    note("nobody")
    time.sleep(0.3)
"""
    result = run_piped(SOON + script)
    last = result.stderr.splitlines()[-1]
    pattern = r"training: stopped after 120 images in 0:00:0\d · \d+ images/s · 120/500 in all"
    assert re.fullmatch(pattern, last)
    assert result.stdout == "as it was\n"


def test_a_closed_reader_ends_no_work():
    script = 'with Progress("a") as bar:\n    time.sleep(0.3)\n    note("x")\nprint("done")'
    ours, theirs = os.pipe()
    os.close(ours)
    child = subprocess.run(
        [sys.executable, "-c", HEAD + SOON + script], stdout=subprocess.PIPE, stderr=theirs, timeout=60
    )
    os.close(theirs)
    assert child.stdout == b"done\n"


def test_a_terminal_gets_a_live_line():
    script = """
with Progress("training", total=24000, start=6000) as bar:
    for i in range(8):
        time.sleep(0.1)
        bar.update(6000 + (i + 1) * 2000, loss="0.02135", epoch="3/80", path="y" * 200)
        if i == 3:
            note("checkpoint [red]saved[/red] " + "x" * 60)
            print("for the pipe")
    with Progress("sampling", total=64) as inner:
        inner.update(64)
        time.sleep(0.5)
with Progress("over soon") as bar:
    bar.update(1)
"""
    written, output = run_on_terminal(SOON + script)
    assert output == "for the pipe\n" and "for the pipe" not in written
    above, sampling, training = screen_after(written)
    assert above == "checkpoint [red]saved[/red] " + "x" * 60
    assert sampling.startswith("sampling: 64 images in 0:00:0")
    counts = r"16,000 images in 0:00:0\d · \d+,\d+ images/s · 22,000/24,000 in all"
    assert re.fullmatch(rf"training: {counts}", training)
    drawn = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)
    assert re.search(r"training: \d+ % · [\d,]+/24,000 images · .* · loss 0.02135 · epoch 3/80 · path y+…", drawn)
    assert "sampling: 100 % · 64 images" in drawn
    assert max(len(line) for line in re.split(r"[\r\n]+", drawn) if "saved" not in line) <= COLUMNS


def test_a_dumb_terminal_gets_lines():
    written, _ = run_on_terminal(
        SOON + 'with Progress("packing", total=9) as bar: time.sleep(0.5); bar.update(3)', term="dumb"
    )
    assert written.startswith("packing: 33 % · 3/9 images") and "\x1b" not in written

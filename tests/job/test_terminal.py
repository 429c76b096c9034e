"""What people, their shells and scripts get of the command line: progress, JSON, loudness, completion, keys, help.

Progress is watched from outside: a child process draws it into a pipe or into a real pseudo-terminal.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios
from contextlib import suppress

from job.config import NETWORKS, draft, known_keys, parse_sets
from job.exits import Exit
from job.verbs.settings import all_settings
from tests.job.command_line import ddpm, ddpm_here, on_screen, ran, refused, refuses

COLUMNS = 120
HEAD = """
import os, sys, time, job.progress
from job.progress import Progress, note
job.progress.QUIET_SECONDS, job.progress.LINE_SECONDS = 0.2, 0.25
"""


def drawn_on_terminal(script: str, term: str = "xterm-256color") -> tuple[str, str]:
    """What a child wrote to its terminal (stderr), and what to its stdout, which is a pipe."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, COLUMNS))
    words, variables, written = [sys.executable, "-c", HEAD + script], {**os.environ, "TERM": term}, b""
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=variables, text=True)
    os.close(theirs)
    # Linux says EIO when the last writer has gone.
    with os.fdopen(ours, "rb", buffering=0) as shown, suppress(OSError):
        while piece := shown.read(65536):
            written += piece
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, written.decode()
    return written.decode(), output


def screen_after(written: str) -> list[str]:
    """The lines that a person sees in the end: a terminal with the one control that a live line uses."""
    lines = [""]
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            lines.append("")
        elif token == "\x1b[2K":
            lines[-1] = ""
        elif not token.startswith("\x1b"):
            lines[-1] += token
    return [line for line in lines if line]


PIPED = """
with Progress("packing", start=1_000_000) as bar:
    for i in range(12):
        time.sleep(0.1)
        bar.update(1_000_000 + (i + 1) * 100, total=None if i < 4 else 1_002_000, loss="0.0213", next_checkpoint="soon")
    # From another thread, which comes late.
    bar.update(1_000_017)
job.progress.RATE_SECONDS = 0.5
with Progress("quick", total=10_000) as bar:
    for i in range(8):
        time.sleep(0.1)
        bar.update(5000 + i)
with Progress("slow", total=100, start=50) as bar:
    for i in range(2):
        time.sleep(0.8)
        bar.update(50.5 + i)
try:
    with Progress("training", total=500) as bar:
        bar.update(120)
        time.sleep(0.25)
        raise ValueError("as it was")
except ValueError as error:
    print(error)
os.environ["RANK"] = "1"
with Progress("quiet", total=500) as bar:
    note("nobody")
    time.sleep(0.3)
"""


def test_a_pipe_gets_plain_lines():
    """Rates have a window and count from where a resumed run began; a total may become known later."""
    result = ddpm("-c", HEAD + PIPED, program=(sys.executable,))
    assert result.stdout == "as it was\n"
    lines = result.stderr.splitlines()
    packing, quick, slow = ([line for line in lines if line.startswith(name)] for name in ("packing", "quick", "slow"))
    more = "loss 0.0213 · next checkpoint soon"
    assert re.fullmatch(rf"packing: 1,000,\d+ images · [\d,.]+ images/s · {more}", packing[0])
    pattern = r"packing: 99 % · 1,00[01],\d+/1,002,000 images · ([\d,.]+) images/s · ETA 0:00:0[1-9] · " + more
    rates = [float(re.fullmatch(pattern, line)[1].replace(",", "")) for line in packing[2:-1]]
    assert all(300 <= rate <= 1000 for rate in rates), packing
    counts = r"1,200 images in 0:00:0\d · [\d,.]+ images/s · 1,001,200/1,002,000 in all"
    assert re.fullmatch(rf"packing: {counts}", packing[-1])
    assert 5 < float(re.search(r" ([\d.]+) images/s · ETA", quick[-2])[1]) < 11, quick
    rate = re.search(r"51 % · 52/100 images · ([\d.]+) images/s · ETA 0:00:[45]\d", slow[-2])[1]
    assert 0.5 < float(rate) < 1, slow
    last = r"training: stopped after 120 images in 0:00:0\d · [\d,]+ images/s · 120/500 in all"
    assert re.fullmatch(last, lines[-1])


LIVE = """
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


def test_a_terminal_gets_a_live_line():
    """A dumb one gets lines, and a reader that is gone ends no work."""
    written, output = drawn_on_terminal(LIVE)
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

    written, _ = drawn_on_terminal('with Progress("a", total=9) as bar: time.sleep(0.5); bar.update(3)', term="dumb")
    assert written.startswith("a: 33 % · 3/9 images") and "\x1b" not in written
    ours, theirs = os.pipe()
    os.close(ours)
    child = subprocess.run([sys.executable, "-c", HEAD + LIVE], stdout=subprocess.PIPE, stderr=theirs, timeout=60)
    os.close(theirs)
    assert child.stdout == b"for the pipe\n"


def asked(*words, code=Exit.FINISHED):
    done = ddpm_here(*words, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_programs_get_everything_as_json(bucket):
    at = ("--bucket", bucket)
    (listed,) = asked("runs", "list", *at)
    assert listed.items() >= {"name": "walk", "state": "finished", "epoch": 3.0, "hours_left": None}.items()
    shown = asked("runs", "show", "walk", *at)
    assert (shown["checkpoints"], shown["uri"]) == (["epoch 1", "epoch 3"], f"{bucket}/runs/walk")
    assert shown["attempts"][0]["world_size"] == 1
    (dataset,) = asked("data", "list", *at)
    assert (dataset["name"], dataset["images"], len(dataset["classes"])) == ("tiles", 299, 5)
    folder = bucket / "datasets/tiles-16"
    (folder / "preview.png").unlink()
    assert asked("data", "show", "tiles", *at) == dataset
    assert not (folder / "preview.png").exists()
    verify = [(kind, "verify", name, *at) for kind, name in (("runs", "walk"), ("data", "tiles"))]
    assert [asked(*words)["problems"] for words in verify] == [[], []]
    path = next(folder.glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-1])
    (bucket / "runs/walk/LATEST").write_text("{}")
    of_run, of_data = (asked(*words, code=Exit.BAD_DATA)["problems"] for words in verify)
    assert "LATEST is corrupt" in of_run[0] and len(of_data) == 1


def test_quiet_and_verbose(bucket):
    said = ddpm_here("-v", "runs", "list", "--bucket", bucket).stderr
    assert re.search(rf"(?m)^read {re.escape(str(bucket))}/runs/walk/status\.json: \d\.\d\d\d s$", said)
    quiet = ddpm_here("-q", "runs", "show", "wal", "--bucket", bucket)
    assert "there is no run 'wal'" in refused(quiet, Exit.MISSING_INPUT)
    (bucket / "datasets/tiles-16/index.json").unlink()
    words = ("report", "walk", "--bucket", bucket)
    quiet, usual = ddpm_here("-q", *words), ddpm_here(*words)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "going on without the dataset" in usual.stderr
    assert quiet.stdout == usual.stdout


TAKES = {
    "train.batch_size": "integer ≥ 1 ≤ 1,000,000",
    "train.learning_rate": "number > 0",
    "data.crop_scale": "list of number > 0 ≤ 1",
    "data.size": "integer ≥ 1 ≤ 4,096 or string or null",
    "model.kind": "|".join(NETWORKS),
    "train.precision": "auto|fp32|bf16|fp16",
}


def test_every_key_has_its_values():
    listed = all_settings({})
    assert list(listed) == known_keys() == list(asked("config", "--list"))
    assert [key for key, setting in listed.items() if not setting["meaning"].partition(" (")[0]] == []
    assert "data.order" not in listed
    assert {key: listed[key]["takes"] for key in TAKES} == TAKES


def test_keys_and_names_are_whole_however_narrow_the_terminal_is(bucket):
    keys_listed = list(asked("config", "--list", "train"))
    assert len(keys_listed) == 20 and all(key.startswith("train") for key in keys_listed)
    of_adam = ["train.adam_betas", "train.adam_eps"]
    assert list(asked("config", "--list", "train.adam")) == list(asked("config", "train.adam")) == of_adam
    said = "no key begins with 'trian'; did you mean 'train'? (preset, imported, data, model, "
    refuses([("config --list trian", Exit.BAD_REQUEST, said)])
    # A pager gets one line for each key, as long as its text.
    header, *lines = ran("config", "--list").splitlines()
    assert header.split() == ["key", "default", "meaning"]
    assert [line.split()[0] for line in lines] == known_keys()
    assert all(line == line.rstrip() for line in (header, *lines))
    _, *lines = on_screen("config", "--list", columns=60).splitlines()
    assert [line[1:].partition(" ")[0] for line in lines if line[1] != " "] == known_keys()
    name = "walk-with-a-name-of-31-letters"
    (bucket / "runs/walk").rename(bucket / "runs" / name)
    for columns in (80, 40):
        header, row = on_screen("runs", "list", "--bucket", bucket, columns=columns).splitlines()
        assert max(len(header), len(row)) == columns and row.endswith("…")
        assert row.split()[0] == name and "finished".startswith(row.split()[1].rstrip("…"))


def test_values_have_an_origin(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("train: {batch_size: 32, seed: 7}\n")
    words = ("config", "--preset", "celeba", "--config", mine, "--set", "train.batch_size=64")
    told = asked(*words)
    assert told["train.batch_size"] == {"value": 64, "from": "--set"}
    assert told["train.seed"] == {"value": 7, "from": str(mine)}
    assert told["model.channel_mults"] == {"value": [1, 2, 2, 2, 4], "from": "preset celeba"}
    assert told["train.warmup_images"]["from"] in ("default", "preset celeba")
    assert told["data.size"] == {"value": None, "from": "the dataset"}
    sets, unset = parse_sets(["train.batch_size=64", "train.seed=7"]), {"preset": "celeba", "data.order": "feistel-1"}
    assert {key: values["value"] for key, values in told.items()} | unset == draft("celeba", sets).flat()
    # What it prints is what one types.
    lines = [line.split() for line in ran(*words).splitlines()]
    (mults,) = (words[1] for words in lines if words[0] == "model.channel_mults")
    assert parse_sets([f"model.channel_mults={mults}"])["model.channel_mults"] == "1,2,2,2,4"
    refuses([("config --preset celebs", Exit.BAD_REQUEST, "there is no preset 'celebs'")])

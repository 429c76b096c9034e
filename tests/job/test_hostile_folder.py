"""What anybody may have put into a bucket: whatever an object holds, a command ends as it should, and says why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from job.exits import TABLE, Exit
from job.progress import printable
from tests.fuzzing import examples, forged, sealed, search
from tests.job.command_line import ddpm_here, ran, refused
from tests.job.report.hostile import FORGED, gif, png
from tests.job.report.hostile import forged as forged_picture

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
AT = "000001-000000000912"
OBJECTS = f"""
    runs/walk/status.json runs/walk/lease.json runs/walk/LATEST runs/walk/config.yaml runs/walk/attempts/000001.json
    runs/walk/checkpoints/{AT}/MANIFEST.json runs/walk/checkpoints/{AT}/ema-00.safetensors
    runs/walk/checkpoints/{AT}/averages/ema-0.2.json runs/walk/snapshots/000001-000000000312/ema-0.1-00.safetensors
    runs/walk/metrics/{AT}.jsonl runs/walk/tensorboard/events.out.tfevents.{AT}
    runs/walk/samples/epoch-0003-ddim-4-0-3-*/index.json runs/walk/samples/epoch-0003-ddim-4-0-3-*/pieces/00000.json
    datasets/tiles-16/index.json datasets/tiles-16/shard-00000.offsets jobs/train-walk/0-of-1.json
""".split()
PICTURES = [
    "runs/walk/samples/epoch-0001-ddim-4.png",
    "runs/walk/samples/epoch-0003-ddim-4.png",
    "runs/walk/samples/images-000000007-ddim-4.png",
    "runs/walk/samples/denoising-epoch-0003-ddim-4.gif",
    "runs/walk/figures/loss.png",
    "datasets/tiles-16/preview.png",
]
STRANGERS = f"""
    runs/walk/checkpoints/999999-000000000000/MANIFEST.json runs/walk/checkpoints/000002-999999999999/MANIFEST.json
    runs/walk/checkpoints/٠٠٠٠٠٢-٠٠٠٠٠٠٠٠٠٩١٢/MANIFEST.json runs/walk/reading/{AT}-{"0" * 32}.json
    runs/walk/attempts/000000.json runs/walk/attempts/000002.json runs/walk/attempts/999999.json
    datasets/other-16/index.json runs/other/status.json
""".split()
READING = """
    runs list | runs list --json | runs show walk | runs show walk --json | runs verify walk | runs compare walk walk
    runs prune walk --dry-run | report | report walk | data list | data show tiles | jobs list | jobs status train-walk
    submit train --dataset tiles --run walk --dry-run | submit sample --run walk --dry-run
    submit evaluate --run walk --dry-run | figure noising --dataset tiles --timesteps 5,9
""".replace("\n", "|")
WRITING = """
    sample --run walk --seeds 0 --no-nearest | sample --run walk --count 3 | runs prune walk | runs delete walk --yes
    sample --run walk --seeds 0 --weights ema-0.2 | ema --run walk --std 0.2 | ema --run walk --std 0.15
    data verify tiles | train --dataset tiles --run walk --epochs 4
""".replace("\n", "|")
READING, WRITING = ([words.strip() for words in lines.split("|") if words.strip()] for lines in (READING, WRITING))
NUMBERS = [True, 0, -1, 10**6, 999_999, 2**63, 10**400, 1e308, 1e-300, -1e-300, float("nan"), float("inf")]
TEXTS = [None, "", "nan", ESCAPE, "../../x", "\ud800", "9" * 5000, "2026-13-01T00:00:00Z", "2026-01-01T00:00:00"]
TEXTS += ["9999-12-31T23:59:59Z", "2026-99-99T99:99:99Z", "٢٠٢٦-٠١-٠١T٠٠:٠٠:٠٠Z"]
VALUES: Any = st.recursive(
    st.sampled_from(NUMBERS + TEXTS) | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def harm(path: Path, what: Any) -> None:
    """Puts something into an object's place: what is made of its bytes, a folder or a pipe."""
    if path.exists() and not path.is_file():
        # Harmed already; the test would wait at a pipe.
        return
    before = path.read_bytes() if path.exists() else b'{\n "fence": 1\n}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if what in (Path.mkdir, os.mkfifo):
        what(path)
    else:
        path.write_bytes(what if isinstance(what, bytes) else forged(before, *what))


BYTES = st.sampled_from([b"", b"{}", b"[" * 10_000, b'"' + b"\xff" * 9]) | st.binary(max_size=99)
FORGERY = st.tuples(st.integers(0, 60), VALUES)
KINDS = st.one_of(st.just(Path.mkdir), st.just(os.mkfifo), BYTES, *[FORGERY] * 3, VALUES.map(sealed))
SIDES = st.sampled_from([0, 1, 16, 9000, 30_000, 65_535])
HEADERS = st.one_of(
    st.builds(png, SIDES, SIDES | st.just(2**31 - 1), st.binary(max_size=99), st.binary(min_size=5, max_size=5)),
    st.builds(gif, st.just(16), st.just(16), st.integers(1, 9), SIDES, SIDES),
)
OF_OBJECTS = st.tuples(st.sampled_from([*OBJECTS, *OBJECTS, *STRANGERS]), KINDS)
OF_PICTURES = st.tuples(st.sampled_from(PICTURES), st.sampled_from(sorted(FORGED)).map(forged_picture) | HEADERS)
HARM = st.lists(OF_OBJECTS | OF_PICTURES, min_size=1, max_size=2, unique_by=lambda one: one[0])


@pytest.fixture(scope="module")
def sampled(walked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a few images of its last checkpoint, and an average that was made for it."""
    folder = shutil.copytree(walked, tmp_path_factory.mktemp("sampled") / "bucket")
    ran("sample", "--run", "walk", "--count", 3, "--bucket", folder)
    ran("ema", "--run", "walk", "--std", 0.2, "--bucket", folder)
    (folder / "jobs/train-walk").mkdir(parents=True)
    job = {"state": "running", "exit_code": None, "updated": "2026-01-01T00:00:00Z", "message": "", "machine": 0}
    (folder / "jobs/train-walk/0-of-1.json").write_bytes(sealed({**job, "machines": 1, "sha256": ""}))
    return folder


def ends_as_it_should(words: str, bucket: Path) -> None:
    """With a code of the table, and a line that says why if that is not 0; and with nothing that a terminal obeys."""
    done = ddpm_here(*words.split(), DDPM_BUCKET=str(bucket))
    assert done.returncode in TABLE, words
    said = [line for line in done.stderr.splitlines() if line.startswith("ddpm")]
    assert len(said) == (done.returncode != 0), done.stderr
    for line in [*done.stdout.split("\n"), *done.stderr.split("\n")]:
        assert line.expandtabs() == printable(line.expandtabs())


@examples(few=2, many=60)
def test_any_bucket_gives_a_known_code(sampled, tmp_path, monkeypatch, count) -> None:
    monkeypatch.setattr("job.coordination.lease.EXPIRE_SECONDS", 0.3)
    monkeypatch.setattr("job.coordination.lease.WATCH_SECONDS", 0.05)
    # Where a figure goes.
    monkeypatch.chdir(tmp_path)
    bucket = tmp_path / "bucket"

    @search(count, HARM, st.sampled_from(WRITING))
    def check(harms: list[tuple[str, Any]], writing: str) -> None:
        shutil.rmtree(bucket, ignore_errors=True)
        shutil.copytree(sampled, bucket)
        for name, what in harms:
            # The name of a set ends with a hash.
            harm(next(bucket.glob(name), bucket / name), what)
        for words in (*READING, writing):
            ends_as_it_should(words, bucket)


STATUS, ATTEMPT = "status.json", "attempts/000001.json"


def forge(bucket: Path, key: str, changes: dict[str, Any], place: str = "runs/walk") -> None:
    """Changes a record, with a hash that is right."""
    path = bucket / place / key
    path.write_bytes(sealed(json.loads(path.read_bytes()) | changes))


def shown(bucket: Path) -> list[str]:
    """The run in the list, and by itself; all else that shows it ends well, too."""
    for words in ("runs list --json", "report", "report walk"):
        ran(*words.split(), "--bucket", bucket)
    return [ran("runs", *words, "--bucket", bucket) for words in (["list"], ["show", "walk"])]


def test_escape_sequences_are_never_obeyed(bucket, tmp_path):
    """Nor is what nobody can read taken for the newest checkpoint."""
    run = bucket / "runs/walk"
    forge(bucket, STATUS, {"state": ESCAPE})
    forge(bucket, "index.json", {"licence": f"{ESCAPE}\n", "source": ESCAPE, "crop": ESCAPE}, "datasets/tiles-16")
    (run / "checkpoints/000002-000000000999").mkdir()
    (run / "checkpoints/000002-000000000999/MANIFEST.json").write_text("garbage")
    commands = ("runs list", "runs show walk", "data list", f"data show tiles -o {tmp_path}/sheet.png")
    told = [ran(*words.split(), "--bucket", bucket) for words in commands]
    assert all("%1B]0;owned%07%1B[2J" in out and "\x1b" not in out for out in told)
    assert f"newest      checkpoints/{AT}, 912 images seen" in told[1]
    config = (run / "config.yaml").read_text().replace("preset:", '"\\e[2J": 1\npreset:')
    (run / "config.yaml").write_text(config)
    (run / ATTEMPT).unlink()
    assert "%1B[2J" in refused(ddpm_here("runs", "show", "walk", "--bucket", bucket), Exit.BAD_DATA)


ODD = [
    (STATUS, {"updated": "2026-13-01T00:00:00Z"}),
    (STATUS, {"updated": "٢٠٢٦-٠١-٠١T٠٠:٠٠:٠٠Z"}),
    (ATTEMPT, {"started": "yesterday"}),
    (ATTEMPT, {"started": "2026-01-01T00:00:00"}),
    (ATTEMPT, {"previous_seen": {"state": "running", "images_seen": 1, "updated": "2026-01-01T25:00:00Z"}}),
]


def test_an_odd_moment_costs_its_record(bucket):
    """What lists and shows goes on, and what verifies names it."""
    for key, changes in ODD:
        before = (bucket / "runs/walk" / key).read_bytes()
        forge(bucket, key, changes)
        listed, alone = shown(bucket)
        assert ("cannot be read" in listed) == (key == STATUS), changes
        assert ("attempt 1   cannot be read: " in alone) == (key == ATTEMPT), changes
        done = ddpm_here("runs", "verify", "walk", "--bucket", bucket)
        assert f"/runs/walk/{key} " in done.stdout, changes
        refused(done, Exit.BAD_DATA)
        (bucket / "runs/walk" / key).write_bytes(before)
    # An impossible speed has no end.
    for speed in (1e-300, 5e-324, float("nan"), float("inf")):
        running = {"state": "running", "images_per_second": speed, "updated": "9999-12-31T23:59:59Z"}
        forge(bucket, STATUS, running | {"images_seen": 0, "target_images": 10**400})
        assert "running" in shown(bucket)[0], speed


def test_wrong_changes_name_their_attempt(bucket):
    forge(bucket, ATTEMPT, {"changes": {"train.epochs": "many"}})
    place, wrong = ("--bucket", bucket), f"{ATTEMPT}: train.epochs"
    for words in ("runs prune walk", "train --dataset tiles --run walk"):
        told = refused(ddpm_here(*words.split(), *place), Exit.BAD_DATA)
        assert wrong in told and "config.yaml" not in told
    done = ddpm_here("runs", "verify", "walk", *place)
    assert wrong in done.stdout
    refused(done, Exit.BAD_DATA)
    assert "taking the run as it began" in ddpm_here("report", "walk", *place).stderr

"""What anybody may have put into a bucket: whatever an object holds, a command ends as it should, and says why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from job.exits import TABLE
from job.progress import printable
from tests.fuzzing import examples, forged, sealed, search
from tests.job.command_line import ddpm_here, refused, succeeded
from tests.job.report.hostile import FORGED, gif, png
from tests.job.report.hostile import forged as forged_picture

RUN = "runs/walk"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
FENCE_AND_IMAGES = "000001-000000000912"
OBJECTS = [
    *(f"{RUN}/{name}" for name in ("status.json", "lease.json", "LATEST", "config.yaml", "attempts/000001.json")),
    f"{RUN}/checkpoints/{FENCE_AND_IMAGES}/MANIFEST.json",
    f"{RUN}/metrics/{FENCE_AND_IMAGES}.jsonl",
    f"{RUN}/tensorboard/events.out.tfevents.{FENCE_AND_IMAGES}",
    f"{RUN}/checkpoints/{FENCE_AND_IMAGES}/ema-00.safetensors",
    f"{RUN}/checkpoints/{FENCE_AND_IMAGES}/averages/ema-0.2.json",
    f"{RUN}/snapshots/000001-000000000312/ema-0.1-00.safetensors",
    f"{RUN}/samples/epoch-0003-ddim-4-0-3-*/index.json",
    f"{RUN}/samples/epoch-0003-ddim-4-0-3-*/pieces/00000.json",
    *(f"datasets/tiles-16/{name}" for name in ("index.json", "shard-00000.offsets")),
    "jobs/train-walk/0-of-1.json",
]
PICTURES = [
    *(f"{RUN}/samples/{name}-ddim-4.png" for name in ("epoch-0001", "epoch-0003", "images-000000007")),
    *(f"{RUN}/{name}" for name in ("samples/denoising-epoch-0003-ddim-4.gif", "figures/loss.png")),
    "datasets/tiles-16/preview.png",
]
STRANGERS = [
    f"{RUN}/checkpoints/999999-000000000000/MANIFEST.json",
    f"{RUN}/checkpoints/000002-999999999999/MANIFEST.json",
    f"{RUN}/checkpoints/٠٠٠٠٠٢-٠٠٠٠٠٠٠٠٠٩١٢/MANIFEST.json",
    *(f"{RUN}/attempts/{fence}.json" for fence in ("000000", "000002", "999999")),
    f"{RUN}/reading/{FENCE_AND_IMAGES}-{'0' * 32}.json",
    "datasets/other-16/index.json",
    "runs/other/status.json",
]
READING = (
    *("runs list", "runs list --json", "runs show walk", "runs show walk --json", "runs verify walk"),
    *("runs compare walk walk", "runs prune walk --dry-run", "report", "report walk", "data list", "data show tiles"),
    *("jobs list", "jobs status train-walk", "submit train --dataset tiles --run walk --dry-run"),
    *("submit sample --run walk --dry-run", "submit evaluate --run walk --dry-run"),
    "figure noising --dataset tiles --timesteps 5,9",
)
WRITING = (
    *("sample --run walk --seeds 0 --no-nearest", "sample --run walk --count 3", "runs prune walk"),
    *("sample --run walk --seeds 0 --weights ema-0.2", "ema --run walk --std 0.2", "ema --run walk --std 0.15"),
    *("runs delete walk --yes", "data verify tiles", "train --dataset tiles --run walk --epochs 4"),
)
VALUES: Any = st.recursive(
    st.sampled_from([None, True, 0, -1, 10**6, 999_999, 2**63, 10**400, 1e308, "", "nan", ESCAPE, "../../x", "\ud800"])
    | st.sampled_from([1e-300, -1e-300, "2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "9999-12-31T23:59:59Z"])
    | st.sampled_from([float("nan"), float("inf"), "9" * 5000, "2026-99-99T99:99:99Z", "٢٠٢٦-٠١-٠١T٠٠:٠٠:٠٠Z"])
    | st.integers()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def harm(path: Path, how: tuple[str, Any]) -> None:
    kind, value = how
    if path.exists() and not path.is_file():
        # Harmed already; the test would wait at a pipe.
        return
    before = path.read_bytes() if path.exists() else b'{\n "fence": 1\n}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "bytes":
            path.write_bytes(value)
        case "picture":
            path.write_bytes(forged_picture(value))
        case "forged":
            path.write_bytes(forged(before, *value))
        case "sealed":
            path.write_bytes(sealed(value))


KINDS = st.one_of(
    st.tuples(st.just("folder"), st.none()),
    st.tuples(st.just("pipe"), st.none()),
    st.tuples(
        st.just("bytes"), st.sampled_from([b"", b"{}", b"[" * 10_000, b'"' + b"\xff" * 9]) | st.binary(max_size=99)
    ),
    st.tuples(st.just("forged"), st.tuples(st.integers(0, 60), VALUES)),
    st.tuples(st.just("forged"), st.tuples(st.integers(0, 60), VALUES)),
    st.tuples(st.just("forged"), st.tuples(st.integers(0, 60), VALUES)),
    st.tuples(st.just("sealed"), VALUES),
)
NAMES = st.sampled_from([*OBJECTS, *OBJECTS, *STRANGERS])
SIDES = st.sampled_from([0, 1, 16, 9000, 30_000, 65_535])
HEADERS = st.one_of(
    st.builds(png, SIDES, SIDES | st.just(2**31 - 1), st.binary(max_size=99), st.binary(min_size=5, max_size=5)),
    st.builds(gif, st.just(16), st.just(16), st.integers(1, 9), SIDES, SIDES),
)
OF_PICTURES = st.tuples(
    st.sampled_from(PICTURES),
    st.tuples(st.just("picture"), st.sampled_from(sorted(FORGED))) | st.tuples(st.just("bytes"), HEADERS),
)
HARM = st.lists(st.tuples(NAMES, KINDS) | OF_PICTURES, min_size=1, max_size=2, unique_by=lambda one: one[0])


@pytest.fixture(scope="module")
def sampled(walked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a few images of its last checkpoint, and an average that was made for it."""
    folder = shutil.copytree(walked, tmp_path_factory.mktemp("sampled") / "bucket")
    succeeded(ddpm_here("sample", "--run", "walk", "--count", 3, "--bucket", folder))
    succeeded(ddpm_here("ema", "--run", "walk", "--std", 0.2, "--bucket", folder))
    (folder / "jobs/train-walk").mkdir(parents=True)
    job = {"state": "running", "exit_code": None, "updated": "2026-01-01T00:00:00Z", "message": "", "machine": 0}
    (folder / "jobs/train-walk/0-of-1.json").write_bytes(sealed({**job, "machines": 1, "sha256": ""}))
    return folder


def test_escape_sequences_are_never_obeyed(bucket: Path, tmp_path: Path) -> None:
    """Nor is what nobody can read taken for the newest checkpoint."""
    run, index = bucket / RUN, bucket / "datasets/tiles-16/index.json"
    for path, changes in (
        (run / "status.json", {"state": ESCAPE}),
        (index, {"licence": f"{ESCAPE}\n", "source": ESCAPE, "crop": ESCAPE}),
    ):
        path.write_bytes(sealed(json.loads(path.read_bytes()) | changes))
    (run / "checkpoints/000002-000000000999").mkdir()
    (run / "checkpoints/000002-000000000999/MANIFEST.json").write_text("garbage")
    commands = ("runs list", "runs show walk", "data list", f"data show tiles -o {tmp_path}/sheet.png")
    told = [succeeded(ddpm_here(*words.split(), "--bucket", bucket)) for words in commands]
    assert all("%1B]0;owned%07%1B[2J" in out and "\x1b" not in out for out in told)
    assert "newest      checkpoints/000001-000000000912, 912 images seen" in told[1]
    config = (run / "config.yaml").read_text().replace("preset:", '"\\e[2J": 1\npreset:')
    (run / "config.yaml").write_text(config)
    (run / "attempts/000001.json").unlink()
    assert "%1B[2J" in refused(ddpm_here("runs", "show", "walk", "--bucket", bucket), 65)


def ends_as_it_should(words: str, bucket: Path) -> None:
    """With a code of the table, and a line that says why if that is not 0; and with nothing that a terminal obeys."""
    place = () if words.startswith("jobs list") else ("--bucket", bucket)
    done = ddpm_here(*words.split(), *place)
    assert done.returncode in TABLE, words
    said = [line for line in done.stderr.splitlines() if line.startswith("ddpm")]
    assert len(said) == (done.returncode != 0), done.stderr
    for line in [*done.stdout.split("\n"), *done.stderr.split("\n")]:
        assert line.expandtabs() == printable(line.expandtabs())


@examples(few=2, many=80)
def test_any_bucket_gives_a_known_code(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("job.coordination.lease.EXPIRE_SECONDS", 0.3)
    monkeypatch.setattr("job.coordination.lease.WATCH_SECONDS", 0.05)
    # Where a figure goes, and where `jobs list` looks.
    monkeypatch.chdir(tmp_path)
    bucket = tmp_path / "bucket"
    monkeypatch.setenv("DDPM_BUCKET", str(bucket))

    @search(count, HARM, st.sampled_from(WRITING))
    def check(harms: list[tuple[str, tuple[str, Any]]], writing: str) -> None:
        shutil.rmtree(bucket, ignore_errors=True)
        shutil.copytree(sampled, bucket)
        for name, how in harms:
            # The name of a set ends with a hash.
            harm(next(bucket.glob(name), bucket / name), how)
        for words in (*READING, writing):
            ends_as_it_should(words, bucket)

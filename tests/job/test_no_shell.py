"""Names, paths and configuration values are text: no shell sees them, and neither does make."""

from __future__ import annotations

from job.exits import Exit
from tests.job.command_line import ddpm_here, settings, succeeded
from tests.job.some_images import encoded, folder_of, picture
from tests.job.test_makefile import make  # noqa: F401 -- a fixture

HOSTILE = [
    "$(touch marker)",
    "; touch marker;",
    "`touch marker`",
    "a' || touch marker '",
    "--bucket=x",
    "a\ntouch marker",
]


def test_names_and_values_reach_no_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in HOSTILE:
        for words, codes in (
            (["train", "--dataset", value], (Exit.BAD_REQUEST, Exit.USAGE)),
            (["train", "--dataset", "a", "--run", value], (Exit.BAD_REQUEST, Exit.USAGE)),
            (["train", "--dataset", "a", "--preset", value], (Exit.BAD_REQUEST, Exit.USAGE)),
            (["train", "--dataset", "a", "--set", f"train.seed={value}"], (Exit.BAD_CONFIG,)),
            (["train", "--dataset", "a", "--set", f"{value}=1"], (Exit.BAD_CONFIG,)),
            (["sample", "--run", value], (Exit.BAD_REQUEST, Exit.USAGE)),
            (["data", "pack", "a", value], (Exit.BAD_REQUEST, Exit.USAGE)),
            (["submit", "train", "--dataset", "a", "--on", value], (Exit.BAD_REQUEST, Exit.USAGE)),
        ):
            done = ddpm_here(*words)
            assert done.returncode in codes, (words, done.stderr)
            assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*"))


def test_names_of_files_and_classes_are_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes = ["$(touch marker)", "; touch marker", "`touch marker` [red]x"]
    files = [(f"{name}/{n}$(touch marker).png", encoded(picture(n, 12, 12))) for name in classes for n in range(4)]
    bucket = tmp_path / "$(touch marker) bucket"
    images = folder_of(tmp_path / "; touch marker; images", files)
    words = ["--size", 8, "--bucket", bucket, "--licence", "$(touch marker)"]
    out = succeeded(ddpm_here("data", "pack", images, "small", *words))
    assert all(name in out for name in classes)
    variables = {"DDPM_CACHE": str(tmp_path / "cache")}
    words = ["--dataset", "small", "--bucket", bucket, "--epochs", 1, *settings(train__batch_size="12")]
    succeeded(ddpm_here("train", *words, **variables))
    for words in (["data", "show", "small"], ["data", "list"], ["runs", "show", "small"], ["runs", "list"]):
        succeeded(ddpm_here(*words, "--bucket", bucket, **variables))


HOSTILE_TO_MAKE = """'; touch {m}; '$(touch {m})$(shell touch {m})"$$(touch {m})"#`touch {m}`
touch {m}"""


def test_neither_make_nor_its_shell_sees_what_its_variables_hold(make, tmp_path):  # noqa: F811
    hostile = HOSTILE_TO_MAKE.format(m=tmp_path / "marker")
    names = ("DATASET", "RUN", "SOURCE", "BUCKET", "SIZE", "EPOCHS", "ON", "TARGETS")
    # -i: whatever one line of a recipe says, make goes on with the next.
    for verb in ("submit-train", "sample", "pack"):
        done = make("-i", verb, *(f"{name}={hostile}" for name in names), f"ARGS=--set train.seed={hostile}")
        assert "ddpm: " in done.stderr or "Error: " in done.stderr
        assert "not found" not in done.stderr and "Syntax error" not in done.stderr
    assert not (tmp_path / "marker").exists()


def test_make_passes_a_value_on_as_it_was_typed(make, tmp_path):  # noqa: F811
    name = 'it\'s a "b" $HOME #1\\c'
    done = make("train", f"DATASET={name}", f"BUCKET={tmp_path}")
    assert f"ddpm: {name!r} cannot be a dataset's name" in done.stderr

"""Sourcing setup.sh in bash and zsh, and setting up this machine alone: two variables are all a shell gets of it."""

from __future__ import annotations

import shutil

import pytest

from job.jobs.targets import parse_targets
from tests.infra.recorded import BUCKET, PROJECT, Place, make_place, real_program
from tests.job.some_images import jpeg, zip_of

CLOUD = ("--project", PROJECT, "--yes")
# All that a shell has: options, traps, folder, functions, aliases, open files, positional parameters, variables.
STATE = {
    "bash": r"""
state() {
  set +o; shopt -p; trap -p; pwd; declare -F; alias; echo "$#:$*"; echo /proc/$$/fd/*
  declare -p | grep -vE '^declare -[^ ]* (_|PIPESTATUS|BASH_[A-Z]*|FUNCNAME|LINENO|S?RANDOM|SECONDS|EPOCH[A-Z]*)(=|$)'
}
""",
    "zsh": r"""
state() {
  setopt; trap; pwd; echo /proc/$$/fd/*; print -l ${(ok)functions}; alias; echo "$#:$*"
  typeset -p | grep -vE '^(typeset|export|integer|float)[^=]* (_|status|LINENO|RANDOM|SECONDS|EPOCH[A-Z]*|'\
'TTYIDLE|funcstack|pipestatus|options|parameters|commands|historywords|history|jobdirs|jobstates|jobtexts|'\
'functions[a-z_]*|ZSH_EVAL_CONTEXT|zsh_eval_context|COLUMNS|LINES|\?)(=|$)'
}
""",
}
SOURCING = """
state "$@" >../before
source ./setup.sh {words}; echo $? >../code
state "$@" >../after
diff ../before ../after
echo "code $(cat ../code), bucket ${{DDPM_BUCKET-unset}}, targets ${{DDPM_TARGETS-unset}}, still here"
"""


pytestmark = pytest.mark.infra


@pytest.fixture
def place(tmp_path) -> Place:
    made = make_place(tmp_path / "place")
    for name in ("diff", "ls", "grep"):
        (made.programs / name).symlink_to(str(shutil.which(name)))
    return made


@pytest.fixture(params=["bash", "zsh"])
def shell(request) -> str:
    assert shutil.which(request.param), f"{request.param} is missing: apt-get install {request.param}"
    return str(request.param)


def changes(out: str) -> list[str]:
    """Names of what is other than before."""
    lines = [line[2:] for line in out.splitlines() if line[:2] in ("> ", "< ")]
    return sorted({line.split("=")[0].split()[-1] for line in lines})


def sourced(place: Place, shell: str, words: str, first: str = "") -> str:
    script = STATE[shell] + first + SOURCING.format(words=words)
    done = place.bash(script, "one", "two words", shell=shell)
    assert "still here" in done.stdout, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_sourcing_sets_two_variables(place, shell):
    out = sourced(place, shell, " ".join(CLOUD))
    assert changes(out) == ["DDPM_BUCKET", "DDPM_TARGETS"]
    assert f"code 0, bucket {BUCKET}, targets {place.checkout}/targets.yaml" in out


def test_failures_leave_the_shell_alone(place, shell):
    first = "trap 'echo bye' EXIT\nshopt -s nullglob 2>/dev/null\n" * (shell == "bash")
    for part in ("services enable", " apply ", "output -raw bucket"):
        place.answer((part, "", 9))
        out = sourced(place, shell, " ".join(CLOUD), first)
        assert changes(out.split("bye")[0]) == [], part
        assert "code 9, bucket unset, targets unset" in out, part


def test_other_commands_set_no_variable(place, shell):
    for words in ("--no-such-option", "--help", "--dry-run --project my-project", "--project my-project --plan"):
        out = sourced(place, shell, words)
        assert changes(out) == [], words
        assert f"code {2 if 'no-such' in words else 0}, bucket unset" in out, words


def test_another_folder_and_strict_shell(place, shell):
    first = "cd ..\nset -eu\n"
    script = first + f'source "my checkout/setup.sh" {" ".join(CLOUD)}\necho "$DDPM_BUCKET in $PWD"; echo $-'
    done = place.bash(script, shell=shell)
    assert done.returncode == 0, done.stderr
    assert f"{BUCKET} in {place.folder}\n" in done.stdout


def test_other_shells_are_refused(place):
    done = place.bash("sh ./setup.sh --local")
    assert done.returncode == 2 and "use bash" in done.stderr
    done = place.bash(". ./setup.sh --local; echo $?", shell="sh")
    assert done.stdout == "2\n" and "use bash" in done.stderr
    done = place.bash("zsh ./setup.sh --help")
    assert done.returncode == 0 and "--celeba SOURCE" in done.stdout


def test_local_packs_embedded_images_once(place):
    real_program(place)
    archive = zip_of(place.folder / "it's mine.zip", [(f"{n}.jpg", jpeg(n)) for n in range(12)])
    run = place.folder / "elsewhere/runs/example"
    run.mkdir(parents=True)
    words = f'--local --landscape "{archive}"'
    out = sourced(place, "bash", words)
    bucket, targets = place.checkout / "bucket", place.checkout / "targets.yaml"
    assert changes(out) == ["DDPM_BUCKET", "DDPM_TARGETS"]
    assert f"code 0, bucket {bucket}, targets {targets}" in out
    assert "299 colour, 32×32 pixels" in out and "12 colour, 64×64 pixels" in out
    parsed = parse_targets(targets.read_text(), "targets.yaml")
    assert {target.bucket for target in parsed.values()} == {str(bucket)}
    assert sorted(path.name for path in (bucket / "datasets").iterdir()) == ["landscape-64", "landscape-sample-32"]
    # No cloud: neither gcloud nor Terraform was called.
    assert place.calls() == []

    before = {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()}
    out = sourced(place, "bash", words)
    assert "code 0" in out and "it is there already" in out and "it is in" in out
    assert {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()} == before


def test_local_says_what_it_would_do(place):
    done = place.setup("--local", "--dry-run")
    assert done.returncode == 0 and place.calls() == []
    lines = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert lines[0].startswith("+ make ") and "landscape-sample" in lines[1]
    assert not (place.checkout / "bucket").exists()

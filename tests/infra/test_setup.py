"""setup.sh, as far as it goes without an account: what it runs, in which order, what it leaves of files and in a shell.

Two variables are all that a shell that sources it gets of it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from job.jobs.targets import parse_targets
from tests.infra.recorded import BUCKET, DATA, DIGEST, IMAGE, PROJECT, TARGETS, TOKEN, Place
from tests.job.some_images import jpeg, zip_of

pytestmark = pytest.mark.infra
CLOUD = ("--project", PROJECT, "--yes")
EVERYTHING = (*CLOUD, "--region", "us-central1", "--gke")
IS_THERE = ("buckets describe", "", 0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    archive = tmp_path / "my $(touch marker) archive.zip"
    archive.write_bytes(b"zip")
    words = ["--landscape", str(archive), "--celeba", "https://example.com/a/img_align_celeba.zip?token=1"]
    return [*words, "--checkpoints", "gs://examples/runs/celeba/"]


def test_dry_runs_print_all_commands_and_the_second_time_nothing_is_made(place, sources):
    dry = place.setup(*EVERYTHING, *sources, "--dry-run")
    target = place.checkout / "targets.yaml"
    assert dry.stderr == "" and not (place.folder / "calls").exists() and not target.exists()
    done = place.setup(*EVERYTHING, *sources)
    ran = place.calls()
    assert TOKEN not in str(ran) and TOKEN not in done.stdout + done.stderr, "in no list of processes"
    assert (place.folder / "standard-input").read_text().strip() == TOKEN

    def plain(text: str) -> str:
        """Without what differs from run to run: the folder for temporary files, and that of a program."""
        return re.sub(r"(=)?/[^ =]*/tmp\.\w+/", r"\1TMP/", text).replace(f"{place.checkout}/.venv/bin/", "")

    printed = [line[2:].split(" | ")[-1] for line in dry.stdout.splitlines() if line.startswith("+ ")]
    # Only Terraform knows the cluster's zone, and what was made a moment ago.
    said = [[plain(word).replace("ZONE", "us-central1-a") for word in shlex.split(line)] for line in printed]
    ran = [[*map(plain, words)] for words in ran]
    assert [words for words in said if words[0] not in ("mv", "mkdir")] == ran
    steps = [[word for word in words if not word.startswith(("-", "/"))][:2] for words in ran]
    assert ", ".join(map(" ".join, steps)) == (
        "gcloud services, gcloud storage, gcloud storage, terraform init, terraform plan, terraform apply, "
        f"gcloud container, kubectl gke_{PROJECT}_us-central1-a_ddpm, make setup, podman login, make image, "
        "gcloud storage, ddpm data, curl 3, gcloud storage, ddpm data, gcloud storage, ddpm runs"
    )
    for words in (
        # Without them the next command, which submits, would end with 66.
        ["make", "-C", str(place.checkout), "setup", "EXTRAS=google,kubernetes"],
        ["make", "-C", str(place.checkout), "image", "push-image", f"IMAGE={IMAGE}", "ENGINE=podman"],
        ["gcloud", "storage", "cp", "--no-clobber", sources[1], f"{DATA}/landscape/"],
        ["ddpm", "data", "pack", sources[1], "landscape", "--bucket", BUCKET],
        ["ddpm", "data", "pack", "TMP/img_align_celeba.zip", "celeba", "--bucket", BUCKET],
        ["ddpm", "runs", "verify", "celeba", "--bucket", BUCKET],
    ):
        assert words in ran
    assert not list(place.folder.rglob("marker"))
    assert shlex.split(done.stdout.splitlines()[-1]) == ["export", f"DDPM_BUCKET={BUCKET}", f"DDPM_TARGETS={target}"]
    written = target.read_text()
    assert written.split("\n", 1)[1] == TARGETS.replace(IMAGE, f"{IMAGE.removesuffix(':latest')}@{DIGEST}") + "\n"
    assert list(parse_targets(written, "targets.yaml")) == ["vm"]

    place.answer(IS_THERE, ("terraform plan", "", 0), ("-detailed-exitcode", "", 0), ("data ensure", "", 0))
    done = place.setup(*EVERYTHING, *sources)
    again = "\n".join(" ".join(words) for words in place.calls())
    assert not re.search(" apply -input|buckets create|data pack", again)
    assert "nothing to change" in done.stdout and "it is there already" in done.stdout
    assert target.read_text() == written
    # A changed set-up replaces what an earlier one wrote, but nothing that a person has edited.
    place.answer(IS_THERE, ("output -raw targets", TARGETS + "\n  max_hours: 3", 0))
    done = place.setup(*EVERYTHING)
    assert "replacing the one that an earlier set-up wrote" in done.stdout and done.stderr == ""
    edited = target.read_text().replace("max_hours: 3", "max_hours: 5")
    assert edited != target.read_text()
    target.write_text(edited)
    assert "was edited and stays as it is" in place.setup(*EVERYTHING).stderr
    assert target.read_text() == edited
    assert "max_hours: 3" in target.with_name("targets.yaml.new").read_text()


def test_failing_commands_stop_all(place, sources):
    parts = "services enable|buckets create|buckets update| init | plan | apply -input|get-credentials|kubectl"
    parts += "|setup EXTRAS|login|push-image|cp --no-clobber|pack|curl|--recursive|verify"
    for part in parts.split("|"):
        place.answer((part, "", 9))
        done = place.setup(*EVERYTHING, *sources, code=9)
        assert "setup.sh: " in done.stderr and "code 9" in done.stderr, part
        assert part in f"{' '.join(place.calls()[-1])} ", "nothing was run after it"
        assert "== done" not in done.stdout


def test_missing_tools_are_named_at_once(place, sources):
    tools = ["make", "gcloud", "terraform", "kubectl", "gke-gcloud-auth-plugin", "curl", "podman"]
    (place.programs / "podman").unlink()
    place.setup(*EVERYTHING)
    assert any(words[0] == "docker" for words in place.calls())
    (place.programs / "docker").unlink()
    place.setup(*EVERYTHING, "--no-image")
    assert not any("push-image" in words for words in place.calls())
    for tool in tools[:-1]:
        (place.programs / tool).unlink()
    done = place.setup(*EVERYTHING, *sources, code=66)
    assert place.calls() == []
    assert re.findall(r"^  ([\w-]+): \S+", done.stderr, re.MULTILINE) == tools


def test_wrong_words_and_missing_credentials_are_refused_first(place):
    nobody, no_token = ("auth list", "", 0), ("application-default print", "", 1)
    no_project = ("get-value project", "", 0)
    for words, code, said, *answers in (
        ("--help", 0, ""),
        ("--projekt x", 2, "no option --projekt"),
        ("--project", 2, "--project needs a value"),
        ("--project --gke", 2, "--project needs a value"),
        ("--project 'My Project'", 2, "use the project's ID"),
        ("--region us-central1-a", 2, "us-central1"),
        ("--name x", 2, "3 to 12"),
        ("--local --gke", 2, "leave out"),
        (f"--local --project {PROJECT}", 2, "leave out"),
        ("--celeba 'no such file.zip'", 66, "there is nothing at"),
        (shlex.join(EVERYTHING), 77, "gcloud auth login", nobody),
        (shlex.join(EVERYTHING), 77, "application-default login", no_token),
        ("--yes", 2, "--project ID", no_project),
        ("--dry-run", 2, "--project ID", no_project),
    ):
        place.answer(*answers)
        assert said in place.setup(*shlex.split(words), code=code).stderr, words
    assert place.calls() == []


def test_changes_need_a_word(place):
    lost = {"address": "google_container_cluster.this[0]", "change": {"actions": ["delete"]}}
    removes = ("show -json", json.dumps({"resource_changes": [lost]}), 0)
    for words, code, said, *answers in (
        ((), 64, "add --yes"),
        (("--plan",), 0, ""),
        (("--yes",), 64, lost["address"], removes),
    ):
        place.answer(*answers)
        assert said in place.setup("--project", PROJECT, *words, code=code).stderr
        assert not [words for words in place.calls() if "apply" in words]
        assert not (place.checkout / "targets.yaml").exists()
    place.setup(*CLOUD, "--allow-destroy")
    # The project is by default gcloud's; without an image that was pushed, targets have its tag.
    place.calls()
    place.answer(IS_THERE, ("images describe", "", 1))
    place.setup("--yes", "--infra-only")
    assert f"-var=project={PROJECT}" in place.calls()[2]
    assert f"image: {IMAGE}\n" in (place.checkout / "targets.yaml").read_text()


def test_destroying_leaves_the_buckets(place):
    named = ['google_project_iam_member.job["roles/x"]', "google_compute_network.this"]
    state = "\n".join(["data.google_project.this", "google_storage_bucket.runs", *named])
    place.answer(IS_THERE, ("state list", state, 0))
    done = place.setup(*CLOUD, "--destroy")
    [plan] = [words for words in place.calls() if "plan" in words]
    assert [word for word in plan if word.startswith("-target=")] == [f"-target={name}" for name in named]
    assert "-destroy" in plan
    assert f"gcloud storage rm --recursive {BUCKET} {DATA} gs://{PROJECT}-ddpm-terraform" in done.stdout
    place.answer()
    assert "nothing is there" in place.setup(*CLOUD, "--destroy").stdout
    assert place.calls() == []


SOURCING = """
state "$@" >../before
source ./setup.sh {words}; echo $? >../code
state "$@" >../after
diff ../before ../after
echo "code $(cat ../code), bucket ${{DDPM_BUCKET-unset}}, targets ${{DDPM_TARGETS-unset}}, still here"
"""
TWO = ["DDPM_BUCKET", "DDPM_TARGETS"]


def sourced(place: Place, shell: str, words: str, first: str = "") -> tuple[list[str], str]:
    """Names of what a shell has other than before, and what was said."""
    state = Path(__file__).with_name(f"state.{shell}").read_text()
    done = place.bash(state + first + SOURCING.format(words=words), "one", "two words", shell=shell)
    assert "still here" in done.stdout, done.stdout + done.stderr
    lines = [line[2:] for line in done.stdout.split("bye")[0].splitlines() if line[:2] in ("> ", "< ")]
    return sorted({line.split("=")[0].split()[-1] for line in lines}), done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_sourcing_sets_two_variables_or_leaves_the_shell_alone(place, shell):
    assert shutil.which(shell), f"{shell} is missing: apt-get install {shell}"
    first = "trap 'echo bye' EXIT\nshopt -s nullglob 2>/dev/null\n" * (shell == "bash")
    cloud, unset = " ".join(CLOUD), "bucket unset, targets unset"
    for words, first, changed, said, *answers in (
        (cloud, "", TWO, f"code 0, bucket {BUCKET}, targets {place.checkout}/targets.yaml"),
        *(
            (cloud, first, [], f"code 9, {unset}", (part, "", 9))
            for part in ("services enable", " apply ", "raw bucket")
        ),
        ("--no-such-option", "", [], f"code 2, {unset}"),
        ("--help", "", [], f"code 0, {unset}"),
        (f"--dry-run --project {PROJECT}", "", [], f"code 0, {unset}"),
        (f"--project {PROJECT} --plan", "", [], f"code 0, {unset}"),
    ):
        place.answer(*answers)
        found, out = sourced(place, shell, words, first)
        assert (found, said in out) == (changed, True), (words, out)
    # In another folder, and a strict shell.
    script = f'cd ..\nset -eu\nsource "my checkout/setup.sh" {cloud}\necho "$DDPM_BUCKET in $PWD"; echo $-'
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
    done = place.setup("--local", "--dry-run")
    bucket, targets = place.checkout / "bucket", place.checkout / "targets.yaml"
    lines = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert lines[0].startswith("+ make ") and "landscape-sample" in lines[1]
    assert place.calls() == [] and not bucket.exists()
    place.use_real_programs()
    archive = zip_of(place.folder / "it's mine.zip", [(f"{n}.jpg", jpeg(n)) for n in range(12)])
    words = f'--local --landscape "{archive}"'
    changed, out = sourced(place, "bash", words)
    assert changed == TWO and f"code 0, bucket {bucket}, targets {targets}" in out
    assert "299 colour, 32×32 pixels" in out and "12 colour, 64×64 pixels" in out
    parsed = parse_targets(targets.read_text(), "targets.yaml")
    assert {target.bucket for target in parsed.values()} == {str(bucket)}
    assert sorted(path.name for path in (bucket / "datasets").iterdir()) == ["landscape-64", "landscape-sample-32"]

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()}

    before = files()
    _, out = sourced(place, "bash", words)
    assert "code 0" in out and "it is there already" in out and "it is in" in out
    assert files() == before
    # No cloud: neither gcloud nor Terraform was called.
    assert place.calls() == []

"""setup.sh on Google Cloud, as far as it goes without an account: what it runs, in which order, and what it leaves."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from job.jobs.targets import parse_targets
from tests.infra.recorded import BUCKET, DATA, DIGEST, IMAGE, PROJECT, TARGETS, TOKEN, Place, make_place

EVERYTHING = ("--project", PROJECT, "--region", "us-central1", "--gke", "--yes")

pytestmark = pytest.mark.infra


@pytest.fixture
def place(tmp_path) -> Place:
    made = make_place(tmp_path / "place")
    # The state's bucket is not there at first.
    made.answer(("buckets describe", "", 1))
    return made


@pytest.fixture
def sources(tmp_path) -> list[str]:
    archive = tmp_path / "my $(touch marker) archive.zip"
    archive.write_bytes(b"zip")
    return ["--landscape", str(archive), "--celeba", "https://example.com/a/img_align_celeba.zip?token=1",
            "--checkpoints", "gs://examples/runs/celeba/"]  # fmt: skip


def printed(out: str) -> list[list[str]]:
    """Commands of a dry run."""
    lines = [line[2:] for line in out.splitlines() if line.startswith("+ ")]
    return [shlex.split(line.split(" | ")[-1]) for line in lines]


def plain(commands: list[list[str]], place: Place) -> list[list[str]]:
    """Without what differs from run to run: the folder for temporary files, and the name of a program's folder."""

    def word(text: str) -> str:
        return re.sub(r"(=)?/[^ =]*/tmp\.\w+/", r"\1TMP/", text).replace(f"{place.checkout}/.venv/bin/", "")

    return [[word(text) for text in command] for command in commands]


def test_dry_run_prints_all_commands(place, sources):
    dry = place.setup(*EVERYTHING, *sources, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert not (place.folder / "calls").exists()
    assert not (place.checkout / "targets.yaml").exists()
    done = place.setup(*EVERYTHING, *sources)
    assert done.returncode == 0, done.stderr
    said = plain(printed(dry.stdout), place)
    ran = plain(place.calls(), place)
    # Only Terraform knows the cluster's zone, and what was made a moment ago.
    said = [[word.replace("ZONE", "us-central1-a") for word in command] for command in said]
    assert [command for command in said if command[0] not in ("mv", "mkdir")] == ran
    steps = [[word for word in command if not word.startswith(("-", "/"))][:2] for command in ran]
    assert ", ".join(map(" ".join, steps)) == (
        "gcloud services, gcloud storage, gcloud storage, terraform init, terraform plan, terraform apply, "
        f"gcloud container, kubectl gke_{PROJECT}_us-central1-a_ddpm, make setup, podman login, make image, "
        "gcloud storage, ddpm data, curl 3, gcloud storage, ddpm data, gcloud storage, ddpm runs"
    )
    # Without them the next command, which submits, would end with 66.
    assert ["make", "-C", str(place.checkout), "setup", "EXTRAS=google,kubernetes"] in ran
    assert ["make", "-C", str(place.checkout), "image", "push-image", f"IMAGE={IMAGE}", "ENGINE=podman"] in ran
    assert ["gcloud", "storage", "cp", "--no-clobber", sources[1], f"{DATA}/landscape/"] in ran
    assert ["ddpm", "data", "pack", sources[1], "landscape", "--bucket", BUCKET] in ran
    assert ["ddpm", "data", "pack", "TMP/img_align_celeba.zip", "celeba", "--bucket", BUCKET] in ran
    assert ["ddpm", "runs", "verify", "celeba", "--bucket", BUCKET] in ran
    assert not list(place.folder.rglob("marker"))


def test_what_comes_out_of_it(place):
    done = place.setup(*EVERYTHING)
    target = place.checkout / "targets.yaml"
    assert shlex.split(done.stdout.splitlines()[-1]) == ["export", f"DDPM_BUCKET={BUCKET}", f"DDPM_TARGETS={target}"]
    written = target.read_text()
    pushed = f"{IMAGE.removesuffix(':latest')}@{DIGEST}"
    assert written.split("\n", 1)[1] == TARGETS.replace(IMAGE, pushed) + "\n"
    assert list(parse_targets(written, "targets.yaml")) == ["vm"]
    assert TOKEN not in str(place.calls()) and TOKEN not in done.stdout + done.stderr, "in no list of processes"
    assert (place.folder / "standard-input").read_text().strip() == TOKEN


def test_the_second_time_nothing_is_made(place, sources):
    assert place.setup(*EVERYTHING, *sources).returncode == 0
    place.calls()
    before = (place.checkout / "targets.yaml").read_text()
    place.answer(("terraform plan", "", 0), ("-detailed-exitcode", "", 0), ("data ensure", "", 0))
    done = place.setup(*EVERYTHING, *sources)
    assert done.returncode == 0
    again = [" ".join(command) for command in place.calls()]
    assert not [line for line in again if " apply -input" in line or "buckets create" in line or "data pack" in line]
    assert "nothing to change" in done.stdout and "it is there already" in done.stdout
    assert (place.checkout / "targets.yaml").read_text() == before


def test_failing_commands_stop_all(place, sources):
    parts = "services enable|buckets create|buckets update| init | plan | apply -input|get-credentials|kubectl"
    parts += "|setup EXTRAS|login|push-image|cp --no-clobber|pack|curl|--recursive|verify"
    for part in parts.split("|"):
        place.answer((part, "", 9), ("buckets describe", "", 1))
        done = place.setup(*EVERYTHING, *sources)
        assert done.returncode == 9, (part, done.stdout, done.stderr)
        assert "setup.sh: " in done.stderr and "code 9" in done.stderr, part
        assert part in f"{' '.join(place.calls()[-1])} ", "nothing was run after it"
        assert "== done" not in done.stdout


def test_missing_tools_are_named_at_once(place, sources):
    tools = ["make", "gcloud", "terraform", "kubectl", "gke-gcloud-auth-plugin", "curl", "podman"]
    for tool in (*tools, "docker"):
        (place.programs / tool).unlink()
    done = place.setup(*EVERYTHING, *sources)
    assert done.returncode == 66 and place.calls() == []
    assert re.findall(r"^  ([\w-]+): \S+", done.stderr, re.MULTILINE) == tools


def test_docker_or_no_engine_suffices(place):
    (place.programs / "podman").unlink()
    assert place.setup(*EVERYTHING).returncode == 0
    assert any(command[0] == "docker" for command in place.calls())
    (place.programs / "docker").unlink()
    assert place.setup(*EVERYTHING, "--no-image").returncode == 0
    assert not any("push-image" in command for command in place.calls())


def test_without_credentials_nothing_is_begun(place):
    logins = [("auth list", 0, "gcloud auth login"), ("application-default print", 1, "application-default login")]
    for asked, code, said in logins:
        place.answer((asked, "", code))
        done = place.setup(*EVERYTHING)
        assert done.returncode == 77 and said in done.stderr
        assert place.calls() == []


def test_default_project_is_gclouds(place):
    done = place.setup("--yes", "--infra-only")
    assert done.returncode == 0
    assert f"-var=project={PROJECT}" in place.calls()[4]
    place.answer(("get-value project", "", 0))
    done = place.setup("--yes")
    assert done.returncode == 2 and "--project ID" in done.stderr
    assert place.setup("--dry-run").returncode == 2


def test_wrong_words_are_refused_first(place):
    for words, code, said in (
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
    ):
        done = place.setup(*shlex.split(words))
        assert (done.returncode, said in done.stderr) == (code, True), (words, done.stderr)
    assert place.calls() == []


def test_applying_needs_a_word(place):
    done = place.setup("--project", PROJECT)
    assert done.returncode == 64 and "add --yes" in done.stderr
    assert not [command for command in place.calls() if "apply" in command]
    done = place.setup("--project", PROJECT, "--plan")
    assert done.returncode == 0
    assert not [command for command in place.calls() if "apply" in command]
    assert not (place.checkout / "targets.yaml").exists()


def test_removing_needs_a_word(place):
    lost = {"address": "google_container_cluster.this[0]", "change": {"actions": ["delete"]}}
    place.answer(("show -json", json.dumps({"resource_changes": [lost]}), 0))
    done = place.setup("--project", PROJECT, "--yes")
    assert done.returncode == 64 and lost["address"] in done.stderr
    assert not [command for command in place.calls() if "apply" in command]
    assert place.setup("--project", PROJECT, "--yes", "--allow-destroy").returncode == 0


def test_destroying_leaves_the_buckets(place):
    kept = ["data.google_project.this", "google_storage_bucket.runs"]
    state = "\n".join([*kept, 'google_project_iam_member.job["roles/x"]', "google_compute_network.this"])
    place.answer(("state list", state, 0))
    done = place.setup("--project", PROJECT, "--destroy", "--yes")
    assert done.returncode == 0, done.stderr
    [plan] = [command for command in place.calls() if "plan" in command]
    named = [word for word in plan if word.startswith("-target=")]
    assert named == ['-target=google_project_iam_member.job["roles/x"]', "-target=google_compute_network.this"]
    assert "-destroy" in plan
    assert f"gcloud storage rm --recursive {BUCKET} {DATA} gs://{PROJECT}-ddpm-terraform" in done.stdout
    place.answer(("buckets describe", "", 1))
    done = place.setup("--project", PROJECT, "--destroy", "--yes")
    assert done.returncode == 0 and "nothing is there" in done.stdout
    assert place.calls() == []


def test_targets_have_the_tag_at_first(place):
    place.answer(("images describe", "", 1))
    assert place.setup(*EVERYTHING, "--infra-only").returncode == 0
    assert f"image: {IMAGE}\n" in (place.checkout / "targets.yaml").read_text()


def test_edited_targets_file_stays(place):
    target = place.checkout / "targets.yaml"
    assert place.setup(*EVERYTHING).returncode == 0
    # What an earlier set-up wrote is replaced.
    place.answer(("output -raw targets", TARGETS + "\n  max_hours: 3", 0))
    done = place.setup(*EVERYTHING)
    assert "replacing the one that an earlier set-up wrote" in done.stdout and done.stderr == ""
    assert "max_hours: 3" in target.read_text()
    edited = target.read_text().replace("max_hours: 3", "max_hours: 5")
    target.write_text(edited)
    done = place.setup(*EVERYTHING)
    assert done.returncode == 0 and "was edited and stays as it is" in done.stderr
    assert target.read_text() == edited
    assert "max_hours: 3" in target.with_name("targets.yaml.new").read_text()

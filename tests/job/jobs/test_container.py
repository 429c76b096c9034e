"""The words that start a container, and what an engine says of one. Containers that run are in `tests/containers`."""

from __future__ import annotations

import json
import math
import os

import pytest

from job.exits import Exit, State
from job.jobs.backends.container import ContainerTarget
from job.jobs.spec import JobSpec
from job.store import kind_of
from tests.job.command_line import raised
from tests.job.jobs import submitting
from tests.job.jobs.submitting import assert_kept, built

TARGET = ContainerTarget(name="container")


def container(gpus=0, **changes) -> ContainerTarget:
    """The backend of a user on a machine with so many GPUs, and of a target in which `changes` replace fields."""
    made = TARGET.model_copy(update={"engine": "podman", **changes})
    made._user, made._gpus = (1000, 100), gpus
    return made


def command_of(job: JobSpec, gpus=0, **changes) -> list[str]:
    return container(gpus, **changes).render(job)[0]["command"]


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user with no credentials, and no variables about buckets."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_", "CLOUDSDK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def spec(bucket="gs://photos", **changes) -> JobSpec:
    given = {"argv": ("train", "--bucket", bucket, "--dataset", "celeba"), "image": TARGET.image, "bucket": bucket}
    return submitting.spec(**{**given, "gpus": 0, "spot": False, "max_hours": math.inf, **changes})


def values(command: list[str], option: str) -> list[str]:
    return [value for word in command for name, equals, value in [word.partition("=")] if name == option]


def test_bucket_jobs_run_as_image_user():
    command = command_of(spec(env={"DDPM_CACHE": "/elsewhere"}), memory="16g", network="host")
    assert_kept("container.txt", "\n".join(command) + "\n")
    added = {"--memory=16g", "--network=host", "--env=DDPM_CACHE=/elsewhere"}
    assert {*command_of(spec())} == {*command} - added | {"--env=DDPM_CACHE=/scratch/ddpm"}


def test_local_files_are_mounted(tmp_path, targets_folder, monkeypatch):
    (tmp_path / "adc.json").write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "mine")
    monkeypatch.setenv("AWS_PROFILE", "work")
    command = command_of(spec())
    inside = "/credentials/google_application_credentials"
    assert f"type=bind,source={tmp_path}/adc.json,destination={inside},readonly" in values(command, "--mount")
    assert {f"GOOGLE_APPLICATION_CREDENTIALS={inside}", "GOOGLE_CLOUD_PROJECT=mine"} <= {*values(command, "--env")}
    # The file is the caller's, and so is the container.
    assert {"--user=1000:100", "--userns=keep-id", "--security-opt=label=disable"} <= {*command}
    assert not any("AWS" in word for word in command)
    # A folder is mounted where it is, and what is packed so that nobody can write to it.
    for engine, userns in (("podman", ["keep-id"]), ("docker", [])):
        command = command_of(spec(str(tmp_path)), engine=engine)
        assert f"type=bind,source={tmp_path},destination={tmp_path}" in values(command, "--mount")
        assert values(command, "--userns") == userns
        assert "ddpm-scratch-1000" in " ".join(values(command, "--mount"))
    for source, words in (("photos.zip", "photos.zip"), ("-p.zip", "--no-classes -- -p.zip"), ("", "landscape-sample")):
        words = ["--size", "8", "--bucket", str(tmp_path / "bucket"), *words.split(), "celeba"]
        mounts = values(command_of(built("pack", words, "container")), "--mount")
        path = targets_folder / source
        assert (f"type=bind,source={path},destination={path},readonly" in mounts) == bool(source), words
        assert len(mounts) == (3 if source else 2)
    # A parent in the bucket itself needs no second mount, which engines refuse.
    for folder, count in ((tmp_path, 2), (tmp_path / "other", 3)):
        words = ["--dataset", "celeba", "--run", "two", "--from", f"{folder}/runs/one", "--bucket", str(tmp_path)]
        assert len(values(command_of(built("train", words, "container")), "--mount")) == count


def test_gpus_if_there_are_any():
    for engine, asked, there, words in (
        ("podman", 4, 4, ["--device=nvidia.com/gpu=all"]),
        ("podman", 2, 4, ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=1"]),
        ("docker", 4, 4, ["--gpus=all"]),
        ("docker", 1, 4, ["--gpus=1"]),
        ("docker", 1, 0, []),
        ("podman", 0, 4, []),
    ):
        command = command_of(spec(gpus=asked), there, engine=engine)
        assert [word for word in command if word.startswith(("--device=", "--gpus="))] == words
    raised(64, "--gpus 3: this machine has 2", command_of, spec(gpus=3), 2)


def test_secrets_are_not_passed_on(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    raised(77, "not passed to a container", engine("").submit, spec("s3://photos"))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_secret_access_key = hush\n")
    assert kind_of("s3://photos").credential_files() == {"AWS_SHARED_CREDENTIALS_FILE": tmp_path / ".aws/credentials"}
    assert "hush" not in " ".join(command_of(spec("s3://photos")))
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=hush")
    (tmp_path / ".config/fsspec").mkdir(parents=True)
    (tmp_path / ".config/fsspec/conf.json").write_text('{"az": {"connection_string": "AccountKey=hush"}}')
    command = command_of(spec("az://photos"))
    assert "hush" not in " ".join(command)
    mounted = f"type=bind,source={tmp_path}/.config/fsspec,destination=/credentials/fsspec_config_dir,readonly"
    assert mounted in values(command, "--mount")
    assert "FSSPEC_CONFIG_DIR=/credentials/fsspec_config_dir" in values(command, "--env")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A stand-in for an engine that answers what docker or podman were seen to answer, on stdout or with an error.

    With `has_list` it knows no container, and only answers everything else so.
    """

    def engine(answer: str, code: int = 0, has_list: bool = False) -> ContainerTarget:
        (tmp_path / "answer").write_text(answer)
        program = tmp_path / "podman"
        listed = '[ "$1" = ps ] && exit 0\n' if has_list else ""
        program.write_text(f'#!/bin/sh\n{listed}/bin/cat "{tmp_path}/answer" {">&2" if code else ""}\nexit {code}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return container()

    return engine


def test_cancelling_says_what_it_did(engine):
    at = "2026-11-25T10:00:00Z"
    for said, done in (("running", "is stopping: it saves"), ("exited", "was finished already")):
        own = {"State": {"StartedAt": at, "Status": said, "ExitCode": 0}}
        backend = engine(json.dumps([{"Name": "/train-celeba", "Created": at, "Config": {"Labels": {}}} | own]))
        assert backend.cancel("train-celeba").startswith(done)


def test_engines_refuse_or_know_no_container(engine, tmp_path, monkeypatch):
    daemon = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
    raised(64, "podman: Cannot connect", engine(daemon, 125).alive, "train-celeba")
    backend = engine("Error: no such container train-x", 1, has_list=True)
    assert backend.alive("train-x").state is State.GONE
    raised(66, "no job 'train-x'", backend.cancel, "train-x")
    backend = engine("Error: image not known", 1, has_list=True)
    said = "could not be pulled: check its name, and log in with `podman login`"
    raised(66, said, backend.submit, spec(image="registry.example.com/ddpm:1"))
    # For the doctor, too.
    assert {check.name: check for check in engine("5.4.2\n").checks("")}["engine"].passed
    (check,) = engine(daemon, 1).checks("")
    assert (check.name, check.passed, check.exit_code) == ("engine", False, Exit.BAD_REQUEST)
    (tmp_path / "podman").unlink()
    raised(66, "podman is not installed: `apt-get install podman`", TARGET.alive, "train-a")
    # A dry run needs none.
    assert TARGET.render(spec())[0]["command"][0] == "podman"

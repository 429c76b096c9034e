"""The words that start a container, and what an engine says of one. Containers that run are in `tests/containers`."""

from __future__ import annotations

import itertools
import json
import os
import stat
from pathlib import Path

import pytest

from job.exits import BadRequestError, Exit, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import State
from job.jobs.backends.container import ContainerBackend
from job.jobs.backends.container_command import run_command
from job.jobs.backends.container_host import Credentials, Host, check_credentials, check_engine
from job.jobs.spec import JobSpec
from job.jobs.targets import ContainerTarget

TARGET = ContainerTarget(name="container")
HOST = Host("podman", uid=1000, gid=100)
ADC = Credentials(
    {"/credentials/google.json": Path("/home/u/adc.json")},
    {"GOOGLE_APPLICATION_CREDENTIALS": "/credentials/google.json"},
)
"""Application default credentials, as gcloud leaves them."""


def spec(bucket="gs://photos", verb="train", argv=("train", "--dataset", "celeba"), **changes) -> JobSpec:
    words = (*argv[:1], "--bucket", bucket, *argv[1:]) if verb == "train" else argv
    given = {"name": f"{verb}-celeba", "verb": verb, "argv": words, "image": TARGET.image, "bucket": bucket}
    return JobSpec(**{**given, "run": "celeba", "gpus": 0, "spot": False, **changes})


def values(command: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(command) if word == option]


def test_a_job_on_a_bucket_runs_as_the_images_own_user():
    command = run_command(spec(), TARGET, HOST)
    assert command == [
        *("podman", "run", "--name", "train-celeba"),
        *("--label", "app=ddpm", "--label", "ddpm-job=train-celeba", "--label", "ddpm-verb=train"),
        *("--label", "ddpm-run=celeba", "--label", "ddpm-bucket=gs://photos"),
        *("--pull", "never", "--user", "10001:10001", "--read-only"),
        *("--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777"),
        *("--mount", "type=volume,source=ddpm-scratch-10001,destination=/scratch"),
        *("--shm-size", "2g", "--stop-timeout", "120", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--env", "DDPM_CACHE=/scratch/ddpm", "--env", "DDPM_GRACE_SECONDS=120", "--env", "TMPDIR=/scratch"),
        *("localhost/ddpm:latest", "train", "--bucket", "gs://photos", "--dataset", "celeba"),
    ]
    assert run_command(spec(), TARGET, HOST) == command


def test_credentials_are_files_that_are_mounted_read_only():
    host = Host("podman", 1000, 100, google=ADC, aws=Credentials({"/credentials/aws": Path("/home/u/.aws/config")}))
    command = run_command(spec(), TARGET, host)
    assert "type=bind,source=/home/u/adc.json,destination=/credentials/google.json,readonly" in values(
        command, "--mount"
    )
    assert "GOOGLE_APPLICATION_CREDENTIALS=/credentials/google.json" in values(command, "--env")
    # The file is the caller's, and so is the container.
    assert values(command, "--user") == ["1000:100"]
    assert values(command, "--userns") == ["keep-id"]
    assert not any("aws" in word for word in command)


def test_a_folder_is_mounted_where_it_is(tmp_path):
    for engine, userns in (("podman", ["keep-id"]), ("docker", [])):
        command = run_command(spec(str(tmp_path)), TARGET, Host(engine, 1000, 100))
        assert f"type=bind,source={tmp_path},destination={tmp_path}" in values(command, "--mount")
        assert values(command, "--user") == ["1000:100"]
        assert values(command, "--userns") == userns
        assert "ddpm-scratch-1000" in " ".join(values(command, "--mount"))


def test_what_is_packed_is_mounted_read_only(tmp_path):
    argv = ("data", "pack", "--classes", "--bucket", str(tmp_path / "bucket"), f"{tmp_path}/photos.zip", "celeba")
    command = run_command(spec(str(tmp_path / "bucket"), "pack", argv, run=""), TARGET, HOST)
    photos = f"{tmp_path}/photos.zip"
    assert f"type=bind,source={photos},destination={photos},readonly" in values(command, "--mount")
    argv = (*argv[:-2], "landscape-sample", "celeba")
    command = run_command(spec(str(tmp_path / "bucket"), "pack", argv, run=""), TARGET, HOST)
    assert len(values(command, "--mount")) == 2


@pytest.mark.parametrize(
    ("engine", "asked", "there", "words"),
    [
        ("podman", 4, 4, ["--device", "nvidia.com/gpu=all"]),
        ("podman", 2, 4, ["--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=1"]),
        ("docker", 4, 4, ["--gpus", "all"]),
        ("docker", 1, 4, ["--gpus", "1"]),
        ("docker", 1, 0, []),
        ("podman", 0, 4, []),
    ],
)
def test_gpus_if_there_are_any(engine, asked, there, words):
    command = run_command(spec(gpus=asked), TARGET, Host(engine, 1000, 100, gpus=there))
    found = [w for pair in itertools.pairwise(command) for w in pair if pair[0] in ("--device", "--gpus")]
    assert found == words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 2}, "--nodes 2 needs several machines"),
        ({"gpus": 3}, "--gpus 3: this machine has 2"),
        ({"bucket": "/usr/share"}, "the container has a folder of that name"),
        ({"bucket": "/tmp"}, "the container has a folder of that name"),
        ({"bucket": "/data/a,b"}, "use a path without commas"),
    ],
)
def test_what_one_container_here_cannot_be(changes, says):
    with pytest.raises(BadRequestError, match=says):
        run_command(spec(**changes), TARGET, Host("podman", 1000, 100, gpus=2))


def test_the_targets_settings_are_passed_on():
    target = TARGET.model_copy(update={"memory": "16g", "network": "host", "env": {"DDPM_AWAY_SECONDS": "60"}})
    command = run_command(spec(env={"DDPM_CACHE": "/elsewhere"}), target, HOST)
    assert (values(command, "--memory"), values(command, "--network")) == (["16g"], ["host"])
    assert {"DDPM_AWAY_SECONDS=60", "DDPM_CACHE=/elsewhere"} <= {*values(command, "--env")}


def test_this_machines_credentials_are_found_and_its_secrets_left_where_they_are(tmp_path, monkeypatch):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_secret_access_key = hush\n")
    (tmp_path / "key.json").write_text("{}")
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    host = Host.look("podman")
    assert host.google.mounts == {"/credentials/google.json": tmp_path / "key.json"}
    assert [*host.aws.mounts.values()] == [tmp_path / ".aws/credentials"]
    assert host.aws.variables["AWS_PROFILE"] == "work"
    assert "hush" not in " ".join(run_command(spec("s3://photos"), TARGET, host))
    check_credentials("s3://photos")
    (tmp_path / ".aws/credentials").unlink()
    with pytest.raises(NoPermissionError, match="not handed to a container"):
        check_credentials("s3://photos")
    check_credentials("gs://photos")


def test_without_an_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingInputError, match="neither podman nor docker is installed: `apt-get install podman`"):
        check_engine("")
    with pytest.raises(MissingInputError, match="docker is not installed"):
        check_engine("docker")
    # A dry run needs none.
    assert ContainerBackend(TARGET).render(spec())[0]["command"][0] == "podman"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A stand-in for an engine that answers what docker or podman were seen to answer, on stdout or with an error."""

    def engine(answer: str, code: int = 0) -> ContainerBackend:
        (tmp_path / "answer").write_text(answer)
        program = tmp_path / "podman"
        program.write_text(f'#!/bin/sh\n/bin/cat "{tmp_path}/answer" {">&2" if code else ""}\nexit {code}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return ContainerBackend(TARGET, HOST)

    return engine


STARTED = "2026-11-25T10:00:00.123456789Z"


@pytest.mark.parametrize(
    ("said", "state", "code", "message"),
    [
        ({"Status": "created", "ExitCode": 0, "StartedAt": "0001-01-01T00:00:00Z"}, State.WAITING, None, ""),
        ({"Status": "running", "ExitCode": 0, "StartedAt": STARTED}, State.RUNNING, None, ""),
        ({"Status": "stopping", "ExitCode": 0, "StartedAt": STARTED}, State.RUNNING, None, ""),
        ({"Status": "exited", "ExitCode": 0, "StartedAt": STARTED}, State.FINISHED, 0, ""),
        ({"Status": "exited", "ExitCode": 75, "StartedAt": STARTED}, State.CANCELLED, 75, "with the state saved"),
        ({"Status": "exited", "ExitCode": 78, "StartedAt": STARTED}, State.FAILED, 78, "configuration is not valid"),
        ({"Status": "exited", "ExitCode": 137, "StartedAt": STARTED, "OOMKilled": True}, State.FAILED, 137, "memory"),
        ({"Status": "exited", "ExitCode": 1, "StartedAt": STARTED}, State.FAILED, 1, "exit code 1"),
        (
            {"Status": "exited", "ExitCode": 127, "StartedAt": "0001-01-01", "Error": "no gpu"},
            State.FAILED,
            None,
            "no gpu",
        ),
    ],
)
def test_the_engines_words_are_translated(engine, said, state, code, message):
    backend = engine(json.dumps([{"Name": "/train-celeba", "Created": STARTED, "State": said}]))
    status = backend.status("train-celeba")
    assert (status.name, status.state, status.exit_code) == ("train-celeba", state, code)
    assert message in status.message
    assert status.created == "2026-11-25T10:00:00Z"


@pytest.mark.parametrize(
    ("said", "done"), [("running", "was told to stop: it saves"), ("exited", "was finished already")]
)
def test_who_cancels_is_told_what_that_did(engine, said, done):
    state = {"Status": said, "ExitCode": 0, "StartedAt": STARTED}
    backend = engine(json.dumps([{"Name": "/train-celeba", "Created": STARTED, "State": state}]))
    assert backend.cancel("train-celeba").startswith(done)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?", 69),
        ("permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock", 77),
        ("Error: statfs /nowhere: no such file or directory", 64),
    ],
)
def test_an_engine_that_refuses(engine, answer, code):
    with pytest.raises(JobError) as caught:
        engine(answer, 125).status("train-celeba")
    assert caught.value.exit_code == code


@pytest.mark.parametrize("answer", ["Error: no such container train-x", "Error response: No such object: train-x"])
def test_a_container_that_is_not_there(engine, answer):
    backend = engine(answer, 1)
    assert backend.status("train-x").state is State.GONE
    for ask in (backend.describe, backend.cancel):
        with pytest.raises(MissingInputError, match="no container 'train-x'"):
            ask("train-x")


def test_a_bucket_that_is_not_there(engine, tmp_path):
    with pytest.raises(MissingInputError, match="is not there"):
        engine("").submit(spec(str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


def test_an_image_that_is_not_there_is_a_failed_check(engine):
    found = {check.name: check for check in engine("5.4.2\n").checks()}
    assert found["engine"].passed
    (check,) = engine("Cannot connect to the Docker daemon", 1).checks()
    assert (check.name, check.passed, check.exit_code) == ("engine", False, Exit.BUCKET_AWAY)

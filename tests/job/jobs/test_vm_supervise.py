"""The script of a VM, run for real: bash, curl and signals are real, docker is one whose exit codes are given."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.exits import Exit, retried
from job.jobs.backends.vm_cloud_init import FAILURES, SCRIPT
from job.jobs.backends.vm_manifests import instances
from tests.job.jobs.google_jobs import VM, ZONES, files_of, spec
from tests.job.jobs.google_services import Refusal

TOOLS = ("docker", "docker-credential-gcr", "cos-extensions", "mount", "systemctl", "chown")
FAKE_TOOLS = Path(__file__).with_name("fake_tools.py")
DELETION = "DELETE /compute/v1/projects/my-project/zones/us-central1-a/instances/celeba"


class Machine:
    """A VM as far as the script can see: files, tools, metadata."""

    def __init__(self, cloud, folder: Path, one) -> None:
        self.cloud, self.folder = cloud, folder
        (instance,) = instances(one, VM, ZONES[0])
        cloud.compute.instances[ZONES[0], "celeba"] = {**instance, "status": "RUNNING"}
        cloud.compute.guest_attributes["celeba"] = cloud.metadata.guest_attributes
        files = files_of(instance)
        for path, text in files.items():
            (folder / Path(path).name).write_text(text)
        self.tools = folder / "tools"
        self.tools.mkdir()
        for tool in TOOLS:
            # The interpreter is this one, wherever env would find another.
            script = self.tools / tool
            script.write_text(f"#!{sys.executable}\n" + FAKE_TOOLS.read_text())
            script.chmod(0o755)
        settings = dict(re.findall(r'(\w+)="(.*)"', files["/etc/ddpm/settings"]))
        self.environment = {
            **settings,
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE_TOOLS": str(folder),
            "DDPM_FILES": str(folder),
            "DDPM_SCRATCH": str(folder / "scratch"),
            "DDPM_COMPUTE": cloud.url,
            "DDPM_LOGGING": cloud.url,
            "GCE_METADATA_HOST": cloud.url.removeprefix("http://"),
            # bash knows no fractions: nobody waits.
            "DDPM_PAUSE_SECONDS": "0",
            "DDPM_TICK_SECONDS": "0.05",
        }

    def script(self, *codes, **files) -> subprocess.Popen:
        """The script, begun; `codes` are what containers end with."""
        (self.folder / "codes").write_text(" ".join(map(str, codes)))
        for name, words in files.items():
            (self.folder / name.replace("_", "-")).write_text(words)
        return subprocess.Popen(
            ["/bin/bash", str(self.folder / "supervise.sh")],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *codes, **files) -> str:
        """The script, until it ends: what it said."""
        process = self.script(*codes, **files)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output

    def calls(self, *beginning) -> list[list[str]]:
        path = self.folder / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if call[: len(beginning)] == [*beginning]]

    def said(self) -> dict[str, str]:
        return {key.removeprefix("ddpm/"): value for key, value in self.cloud.metadata.guest_attributes.items()}

    def events(self) -> list[tuple[str, int]]:
        return [(one["event"], int(one["code"])) for one in self.cloud.logging.told("celeba")]

    def until(self, holds) -> None:
        end = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def machine(cloud, tmp_path):
    return Machine(cloud, tmp_path, spec())


def test_a_job_that_finishes_says_so_and_deletes_its_machine_once(machine):
    machine.run(0)
    assert machine.said() == {"phase": "over", "attempts": "1", "exit-code": "0"}
    assert machine.events() == [("started", 0), ("over", 0)]
    assert machine.cloud.made("DELETE") == [DELETION]
    assert not machine.calls("systemctl")


def test_docker_is_given_the_words_as_they_are(cloud, tmp_path):
    words = ("train", "--set", "a=$(touch x); `y` \"z\" 'w' * #", "--dataset", " a  b ", "")
    machine = Machine(cloud, tmp_path, spec(argv=words, env={"A": " $(x) 'y'"}))
    machine.run(0)
    (call,) = machine.calls("docker", "run")
    assert tuple(call[-len(words) :]) == words
    assert "--user=10001:10001" in call and "--read-only" in call and "--ipc=host" in call
    assert call[2:7] == ["--name", "ddpm-job", "--rm", "--log-driver=gcplogs", "--log-opt=labels=ddpm-job,ddpm-slice"]
    assert "A= $(x) 'y'\n" in (tmp_path / "environment").read_text()
    assert not list(tmp_path.glob("x"))


def test_the_driver_comes_before_the_image_and_that_before_the_container(machine):
    machine.run(0)
    order = [call[0] if call[0] != "docker" else call[1] for call in machine.calls()]
    assert [word for word in order if word not in ("chown", "rm")] == [
        *("cos-extensions", "mount", "mount", "docker-credential-gcr", "pull", "run"),
    ]
    assert machine.calls("docker-credential-gcr") == [
        ["docker-credential-gcr", "configure-docker", "--registries=us-central1-docker.pkg.dev"]
    ]


@pytest.mark.parametrize("code", [2, 70, 76, 78])
def test_a_fatal_code_ends_the_job_at_once(machine, code):
    machine.run(code)
    assert len(machine.calls("docker", "run")) == 1
    assert machine.events() == [("started", 0), ("over", code)]
    assert machine.said()["exit-code"] == str(code)


@pytest.mark.parametrize("code", [1, 69, 137, 143])
def test_other_codes_are_retried_in_place_and_counted(machine, code):
    machine.run(*[code] * (FAILURES + 3))
    assert len(machine.calls("docker", "run")) == FAILURES
    assert machine.events() == [("started", 0), *[("again", code)] * (FAILURES - 1), ("over", code)]
    assert len(machine.cloud.made("DELETE")) == 1


def test_a_stopped_attempt_is_retried_and_not_counted(machine):
    many = [75] * (FAILURES + 3)
    machine.run(*many, 1, *many, 0)
    assert len(machine.calls("docker", "run")) == 2 * len(many) + 2
    assert machine.events()[-1] == ("over", 0)
    assert machine.said()["attempts"] == str(2 * len(many) + 2)


def test_the_script_judges_every_code_as_the_table_does(machine):
    # One bash that asks the script's own function about each code, with the lists that the unit gives.
    function = re.search(r"^in_list\(\).*$", SCRIPT.read_text(), re.MULTILINE)
    asked = f"{function[0]}\nfor code in {{0..255}}; do\n"
    asked += 'if in_list $code "$DDPM_NEVER"; then echo never\nelif in_list $code "$DDPM_ALWAYS"; then echo always\n'
    asked += "else echo bounded; fi; done"
    done = subprocess.run(
        ["/bin/bash", "-c", asked], env=machine.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1:] == [retried(code) for code in range(1, 256)]


@pytest.mark.parametrize("word", ["hold:75", "hold:1", "late:hold:75"])
def test_power_off_reaches_the_container_and_nothing_is_started_or_deleted_after_it(machine, word):
    process = machine.script(word)
    machine.until(lambda: machine.calls("docker", "run"))
    if not word.startswith("late"):
        machine.until(lambda: (machine.folder / "container-ddpm-job").exists())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert (machine.folder / "stopped").read_text() == word.removeprefix("late:")
    assert len(machine.calls("docker", "run")) == 1
    assert machine.events() == [("started", 0), ("stopped", int(word.rpartition(":")[2]))]
    assert not machine.cloud.made("DELETE")
    assert machine.calls("docker", "stop")[0][2:] == ["-t", "25", "ddpm-job"]


@pytest.mark.parametrize("code", [0, Exit.NOT_A_NUMBER])
def test_a_job_that_ends_while_the_machine_goes_is_over(machine, code):
    process = machine.script(f"hold:{int(code)}")
    machine.until(lambda: (machine.folder / "container-ddpm-job").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert machine.events() == [("started", 0), ("over", code)]


def test_power_off_between_attempts_starts_nothing(machine):
    machine.environment["DDPM_PAUSE_SECONDS"] = "30"
    process = machine.script(1, 0)
    machine.until(lambda: ("again", 1) in machine.events())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert len(machine.calls("docker", "run")) == 1
    assert machine.events()[-1] == ("stopped", 1)


def test_who_was_told_of_the_end_waits_for_it_instead_of_starting_again(machine):
    machine.cloud.metadata.values["instance/preempted"] = "TRUE"
    process = machine.script(75, 0)
    machine.until(lambda: machine.calls("docker", "run"))
    time.sleep(1)
    assert len(machine.calls("docker", "run")) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert machine.events() == [("started", 0), ("stopped", 75)]


def test_an_image_that_cannot_be_pulled_ends_the_job_and_says_what_to_do(machine):
    output = machine.run(0, docker_pull="1 1 1 1 1")
    assert "roles/artifactregistry.reader" in output
    assert machine.events()[-1] == ("over", Exit.MISSING_INPUT)
    assert "could not be pulled" in machine.cloud.logging.told("celeba")[-1]["message"]
    assert not machine.calls("docker", "run") and len(machine.calls("docker", "pull")) == 5


def test_a_registry_that_stumbles_is_asked_again(machine):
    machine.run(0, docker_pull="1 1 0")
    assert machine.events()[-1] == ("over", 0)


def test_a_driver_that_cannot_be_installed_ends_the_job(machine):
    machine.run(0, cos_extensions="1 1 1")
    assert machine.events()[-1] == ("over", Exit.BUCKET_AWAY)
    assert not machine.calls("docker", "run")


def test_a_cpu_job_installs_no_driver(cloud, tmp_path):
    machine = Machine(cloud, tmp_path, spec(gpus=0))
    machine.run(0)
    assert not machine.calls("cos-extensions")


def test_a_machine_that_may_not_delete_itself_is_switched_off(machine):
    machine.cloud.denied["^DELETE"] = Refusal(403, "Required 'compute.instances.delete' permission", "forbidden")
    output = machine.run(0)
    assert machine.calls("systemctl") == [["systemctl", "poweroff"]]
    assert "compute.instances.delete" in output
    assert machine.events()[-1] == ("over", 0)


def test_without_the_right_to_write_logs_the_job_runs_all_the_same(machine):
    machine.cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    output = machine.run(0)
    assert "roles/logging.logWriter" in output
    assert "--log-driver=local" in machine.calls("docker", "run")[0]
    assert machine.said()["exit-code"] == "0" and len(machine.cloud.made("DELETE")) == 1


def test_a_metadata_server_that_is_late_is_waited_for(machine):
    machine.cloud.metadata.is_silent = True
    process = machine.script(0)
    time.sleep(0.5)
    machine.cloud.metadata.is_silent = False
    output, _ = process.communicate(timeout=30)
    assert "waiting for the metadata server" in output
    assert machine.events()[-1] == ("over", 0)


def test_the_token_is_in_no_argument(machine):
    # What curl is called with can be seen by everybody on the machine.
    curl = machine.tools / "curl"
    curl.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{machine.folder}/arguments\nexec /usr/bin/curl "$@"\n')
    curl.chmod(0o755)
    machine.run(0)
    arguments = (machine.folder / "arguments").read_text()
    assert "entries:write" in arguments and "token-of-the-machine" not in arguments

"""The script of a VM, run for real: bash, curl and signals are real, docker is one whose exit codes are given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from job.exits import Exit, State
from job.jobs.backends import Cause
from job.jobs.backends import vm as module
from tests.job.jobs.api import Refusal
from tests.job.jobs.submitting import spec, target
from tests.job.launching import eventually

NAME = "train-celeba"
TOOLS = ("docker", "docker-credential-gcr", "cos-extensions", "mount", "systemctl", "systemd-run", "chown", "sleep")
DELETION = "DELETE /compute/v1/projects/my-project/zones/us-central1-a/instances/train-celeba"
CURL = r"""#!/bin/bash
for word; do
  [[ $word =~ ^https?://[a-z.]+/(.*)$ ]] && word=$GOOGLE/${BASH_REMATCH[1]}
  words+=("$word")
done
printf '%s\n' "$@" >>"$FAKE_TOOLS/arguments"
exec /usr/bin/curl "${words[@]}"
"""
"""It finds Google's hosts on this machine."""
TIMEOUT = """#!/bin/bash
[[ $1 == --kill-after=* ]] && kill=--kill-after=.2 && shift
exec /usr/bin/timeout $kill .3 "${@:2}"
"""
"""It is in a hurry."""


class Machine:
    """A VM as far as the script can see: metadata, tools, two folders."""

    def __init__(self, cloud, folder: Path, **changes) -> None:
        self.cloud, self.folder, self.backend = cloud, folder, target("vm")
        (made,) = self.backend.render(spec(**changes))
        self.known = {item["key"]: item["value"] for item in made["metadata"]["items"]}
        self.backend.submit(spec(**changes))
        cloud.compute.set_status(NAME, "RUNNING")
        cloud.metadata |= {f"instance/attributes/{key}": value for key, value in self.known.items()}
        tools = folder / "tools"
        tools.mkdir()
        for tool in (*TOOLS, "curl"):
            # The interpreter is this one, wherever env would find another.
            fake = f"#!{sys.executable} -IS\n" + Path(__file__).with_name("fake_tools.py").read_text()
            (tools / tool).write_text(CURL if tool == "curl" else fake)
            (tools / tool).chmod(0o755)
        folders = dict.fromkeys(("FAKE_TOOLS", "RUNTIME_DIRECTORY", "STATE_DIRECTORY"), str(folder))
        self.environment = {"PATH": f"{tools}:{os.environ['PATH']}", "GOOGLE": cloud.url, **folders}

    def begun(self, **tools: str) -> subprocess.Popen:
        """The script, begun; what tools do is given by name."""
        for name, words in tools.items():
            (self.folder / name.replace("_", "-")).write_text(words)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        script = ["/bin/bash", "-c", module.start_script()]
        return subprocess.Popen(script, env=self.environment, start_new_session=True, **streams)

    def run(self, **tools: str) -> str:
        """The script, until it ends: what it said."""
        return self.ended(self.begun(**tools))

    def ended(self, process: subprocess.Popen) -> str:
        code = process.wait(timeout=60)
        # What systemd does in the end with all that is left of a unit.
        for left in psutil.pids():
            with suppress(ProcessLookupError):
                if os.getsid(left) == process.pid:
                    os.kill(left, signal.SIGKILL)
        output = process.communicate()[0]
        assert code == 0, output
        return output

    def calls(self, *beginning: str) -> list[list[str]]:
        found = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in found if call[: len(beginning)] == [*beginning]]

    def state(self):
        """What is known of the job when the machine is no more."""
        self.cloud.compute.vanish()
        status = self.backend.alive(NAME)
        return status.state, status.cause or status.exit_code


@pytest.fixture
def machine(cloud, tmp_path):
    return Machine(cloud, tmp_path)


def test_script_continues_in_a_unit(machine):
    del machine.environment["RUNTIME_DIRECTORY"]
    machine.run()
    (call,) = machine.calls("systemd-run")
    assert Path(call[-1]).read_text() == module.start_script() and call[-2] == "/bin/bash"
    Path(call[-1]).unlink()
    keys = dict(word.removeprefix("--property=").split("=", 1) for word in call if word.startswith("--property="))
    # After them means that they go later.
    assert keys["KillMode"] == "mixed" and {"network-online.target", "docker.service"} <= set(keys["After"].split())
    assert int(keys["TimeoutStopSec"]) > 25


def test_finished_jobs_delete_their_machine(machine, tmp_path):
    # The registry stumbles.
    machine.run(docker_pull="1 1 0")
    order = [call[1] if call[0] == "docker" else call[0] for call in machine.calls() if call[0] != "sleep"]
    assert order == ["chown", "cos-extensions", "mount", "mount", "docker-credential-gcr", *["pull"] * 3, "run"]
    (run,) = machine.calls("docker", "run")
    assert run[2:6] == ["--name", "ddpm-job", "--log-driver=gcplogs", "--log-opt=labels=ddpm-job,ddpm-slice"]
    assert run[6:] == machine.known["ddpm-words"].splitlines()
    assert (tmp_path / "environment").read_text() == machine.known["ddpm-environment"]
    (login,) = machine.calls("docker-credential-gcr")
    assert login[1:] == ["configure-docker", "--registries=us-central1-docker.pkg.dev"]
    assert machine.cloud.made("DELETE") == [DELETION]
    # What curl is called with can be seen by everybody on the machine.
    assert "token-of-the-machine" not in (tmp_path / "arguments").read_text()
    assert machine.state() == (State.FINISHED, 0)


def test_other_codes_are_logged_once(machine):
    machine.run(docker_run=str(int(Exit.STOPPED)))
    assert len(machine.calls("docker", "run")) == len(machine.cloud.made("DELETE")) == 1
    assert machine.state() == (State.STOPPED, Exit.STOPPED)


# The last is before the job began.
@pytest.mark.parametrize(
    ("tool", "word", "state"),
    [
        ("docker_run", "hold:137", (State.GONE, Cause.TAKEN_AWAY)),
        ("docker_run", "hold:70", (State.FAILED, Exit.NOT_A_NUMBER)),
        ("docker_run", "hold:0", (State.FINISHED, 0)),
        ("docker_pull", "hold:0", (State.GONE, Cause.TAKEN_AWAY)),
    ],
)
def test_power_off_reaches_the_container(machine, tool, word, state):
    """The machine is switched off, once the container, or what holds in its place, is up."""
    process = machine.begun(**{tool: word})
    eventually((machine.folder / "container").exists)
    process.send_signal(signal.SIGTERM)
    machine.ended(process)
    assert len(machine.calls("docker", "stop", "ddpm-job")) == len(machine.calls("docker", "run"))
    assert not machine.cloud.made("DELETE")
    assert machine.state() == state


@pytest.mark.parametrize(
    ("tools", "code", "tool", "times", "words"),
    [
        ({"docker_pull": "1"}, Exit.MISSING_INPUT, ("docker", "pull"), 5, "roles/artifactregistry.reader"),
        ({"cos_extensions": "1"}, Exit.BUCKET_AWAY, ("cos-extensions",), 3, "the GPU driver could not be installed"),
    ],
)
def test_missing_parts_end_the_job(machine, tools, code, tool, times, words):
    assert words in machine.run(**tools)
    assert len(machine.calls(*tool)) == times and not machine.calls("docker", "run")
    assert len(machine.cloud.made("DELETE")) == 1
    assert any(words in line for line in machine.backend.logs(NAME, False))
    assert machine.state() == (State.FAILED, code)


def test_stumbling_tools_are_tried_again(machine, tmp_path):
    machine.cloud.refuse_next(401, "Request had invalid authentication credentials")
    (tmp_path / "tools/timeout").write_text(TIMEOUT)
    (tmp_path / "tools/timeout").chmod(0o755)
    machine.run(cos_extensions="deaf 0", docker_pull="deaf 0")
    (run,) = machine.calls("docker", "run")
    assert "--log-driver=gcplogs" in run
    assert machine.state() == (State.FINISHED, 0)


def test_cpu_jobs_install_no_driver(cloud, tmp_path):
    machine = Machine(cloud, tmp_path, gpus=0, image="evil-pkg.dev/somebody/ddpm:1")
    machine.run()
    assert not machine.calls("cos-extensions") and not machine.calls("docker-credential-gcr")


def test_machines_without_rights_run_jobs(machine):
    machine.cloud.denied["^DELETE"] = Refusal(403, "Required 'compute.instances.delete' permission", "forbidden")
    assert "compute.instances.delete" in machine.run()
    assert machine.calls("systemctl") == [["systemctl", "poweroff"]]
    machine.cloud.compute.set_status(NAME, "TERMINATED")
    status = machine.backend.alive(NAME)
    assert status.state is State.FINISHED and "its disk costs money" in status.message
    machine.cloud.denied["entries:write"] = Refusal(403, "Permission 'logging.logEntries.create' denied")
    assert "roles/logging.logWriter" in machine.run()
    assert "--log-driver=local" in machine.calls("docker", "run")[1]

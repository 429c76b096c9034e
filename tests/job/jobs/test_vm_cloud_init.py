"""What a VM is told to do at its start: read by those who read it there, and by shellcheck and systemd."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job.exits import TABLE, retried
from job.jobs.backends.vm_cloud_init import SCRIPT, UNIT
from job.jobs.backends.vm_manifests import instances
from tests.job.jobs.google_jobs import IMAGE, JOBS, VM, ZONES, files_of, rendered, spec, user_data

HOSTILE = [
    "$(touch marker)",
    "; touch marker;",
    "`touch marker`",
    "a' || touch marker '",
    '"; touch marker; "',
    "%n %i $A",
]


def unit_of(instance):
    """The unit as systemd's own syntax has it: sections of keys, some of them several times."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
    parser.read_string(files_of(instance)[f"/etc/systemd/system/{UNIT}"])
    return parser


@pytest.mark.parametrize("case", JOBS)
def test_it_is_yaml_of_the_keys_that_cloud_init_knows(case):
    for instance in rendered("vm", case):
        config = user_data(instance)
        assert set(config) == {"write_files", "runcmd"}
        for file in config["write_files"]:
            assert set(file) == {"path", "permissions", "owner", "content"}
            assert file["path"].startswith("/etc/") and file["permissions"] == "0644"
        assert all(isinstance(word, str) for words in config["runcmd"] for word in words)
        # Compute Engine takes 256 KB for one value, and 512 KB for all.
        assert len(yaml.safe_dump(config)) < 100_000


def test_the_script_is_a_constant_and_shellcheck_has_nothing_to_say():
    texts = {files_of(instance)["/etc/ddpm/supervise.sh"] for case in JOBS for instance in rendered("vm", case)}
    assert texts == {SCRIPT.read_text()}
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--shell=bash", "--enable=quote-safe-variables", SCRIPT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_unit_stops_the_script_alone_and_gives_it_time():
    (instance,) = rendered("vm", "one-gpu-spot")
    unit = unit_of(instance)
    assert unit["Service"]["KillMode"] == "mixed"
    settings = dict(line.split("=", 1) for line in files_of(instance)["/etc/ddpm/settings"].splitlines())
    assert int(unit["Service"]["TimeoutStopSec"]) > int(settings["DDPM_GRACE_SECONDS"].strip('"'))
    # After them means that they go later.
    assert {"network-online.target", "docker.service"} <= set(unit["Unit"]["After"].split())
    assert unit["Service"]["ExecStart"] == "/bin/bash /etc/ddpm/supervise.sh"
    assert ["systemctl", "--no-block", "start", UNIT] in user_data(instance)["runcmd"]


def test_systemd_takes_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd on this machine")
    (instance,) = rendered("vm", "one-gpu-spot")
    path = tmp_path / UNIT
    path.write_text(files_of(instance)[f"/etc/systemd/system/{UNIT}"])
    done = subprocess.run([analyze, "verify", "--man=no", path], capture_output=True, text=True)
    own = [line for line in done.stderr.splitlines() if UNIT in line and "not found" not in line.lower()]
    assert own == [], done.stderr
    # And that it would have noticed a mistake.
    path.write_text(path.read_text().replace("KillMode=mixed", "KillMoed=mixed"))
    done = subprocess.run([analyze, "verify", "--man=no", path], capture_output=True, text=True)
    assert "KillMoed" in done.stderr


@pytest.mark.parametrize("value", HOSTILE)
def test_values_of_users_are_in_no_script_and_no_unit(value):
    job = spec(argv=("train", "--set", f"a={value}"), env={"A": value})
    (instance,) = instances(job, VM, ZONES[0])
    files = files_of(instance)
    assert value in files["/etc/ddpm/words"] and f"A={value}\n" in files["/etc/ddpm/environment"]
    for path, text in files.items():
        if path not in ("/etc/ddpm/words", "/etc/ddpm/environment"):
            assert value not in text, path
    assert value not in str([instance["labels"], instance["name"], instance["description"]])


def test_the_settings_are_the_table():
    (instance,) = rendered("vm", "one-gpu-spot")
    settings = dict(line.split("=", 1) for line in files_of(instance)["/etc/ddpm/settings"].splitlines())
    never = [int(code) for code in settings["DDPM_NEVER"].strip('"').split()]
    assert never == [code for code in TABLE if retried(code) == "never" and code]
    assert settings["DDPM_ALWAYS"] == '"75"'


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        (IMAGE, "us-central1-docker.pkg.dev"),
        ("gcr.io/p/ddpm@sha256:" + "0" * 64, "gcr.io"),
        ("ghcr.io/somebody/ddpm:1", ""),
        ("pkg.dev.example.com/x/ddpm:1", ""),
        ("evil-pkg.dev/x/ddpm:1", ""),
    ],
)
def test_credentials_go_to_googles_registries_alone(image, registry):
    (instance,) = instances(spec(image=image), VM, ZONES[0])
    assert f'DDPM_REGISTRY="{registry}"' in files_of(instance)["/etc/ddpm/settings"]


def test_all_gpus_of_the_machine_are_devices_of_the_container():
    (instance,) = rendered("vm", "eight-gpus")
    words = files_of(instance)["/etc/ddpm/words"].splitlines()
    assert [word for word in words if word.startswith("--device=/dev/nvidia") and word[-1].isdigit()] == [
        f"--device=/dev/nvidia{number}" for number in range(8)
    ]
    assert "--volume=/var/lib/nvidia/lib64:/usr/local/nvidia/lib64:ro" in words

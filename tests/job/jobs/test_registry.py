"""Whether an image is where a target says that it is."""

from __future__ import annotations

import socket
import time

import pytest

from job.exits import Exit
from job.jobs.backends import registry
from job.jobs.backends.registry import image_check, parsed
from tests.job.jobs.registry_server import registry as running_registry

DIGEST = "sha256:" + "5f" * 32


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("ddpm", ("registry-1.docker.io", "library/ddpm", "latest")),
        ("team/ddpm:1", ("registry-1.docker.io", "team/ddpm", "1")),
        ("docker.io/team/ddpm:1", ("registry-1.docker.io", "team/ddpm", "1")),
        ("host:5000/a/b/ddpm", ("host:5000", "a/b/ddpm", "latest")),
        (f"europe-docker.pkg.dev/p/r/ddpm:1@{DIGEST}", ("europe-docker.pkg.dev", "p/r/ddpm", DIGEST)),
        ("localhost/ddpm:latest", ("localhost", "ddpm", "latest")),
    ],
)
def test_names_are_taken_apart_as_engines_do(image, parts):
    assert parsed(image) == parts


@pytest.mark.parametrize("policy", ["open", "anonymous"])
def test_an_image_is_there_or_not(policy):
    with running_registry() as there:
        there.policy, there.images = policy, {"team/ddpm:1", f"team/ddpm@{DIGEST}"}
        for reference in (":1", f"@{DIGEST}"):
            check = image_check(f"{there.host}/team/ddpm{reference}")
            assert (check.passed, check.message) == (True, f"{there.host}/team/ddpm{reference} is there")
        check = image_check(f"{there.host}/team/ddpm:2")
        assert (check.passed, check.exit_code) == (False, Exit.MISSING_INPUT)
        assert "make push-image" in check.remedy


def test_what_is_not_shown_to_everybody_is_no_failure():
    with running_registry() as there:
        there.policy, there.images = "private", {"team/ddpm:1"}
        check = image_check(f"{there.host}/team/ddpm:1")
        assert check.passed and "does not show it here (401)" in check.message
        # A registry sends nobody to a file, or to a host where words would go in the clear.
        there.policy, there.realm = "anonymous", "file:///etc/passwd"
        assert "does not show it here (401)" in image_check(f"{there.host}/team/ddpm:1").message


def test_a_registry_that_keeps_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(registry, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        check = image_check(f"127.0.0.1:{silent.getsockname()[1]}/team/ddpm")
        assert time.monotonic() - began < 5
    assert check.passed and "does not answer" in check.message


def test_an_image_of_this_machine_alone_is_told():
    assert not image_check("localhost/ddpm:latest").passed
    assert not image_check("").passed

"""Containers on this machine: podman or docker runs the image that a cluster would run."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from job.exits import TABLE, BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError
from job.jobs.backends.base import (
    FOLLOW_POLL_SECONDS,
    Backend,
    JobStatus,
    Manifest,
    State,
    cancelled,
    runs_already,
    state_of_code,
)
from job.jobs.backends.container_command import BUCKET_LABEL, STOP_SECONDS, Host, confined, run_command
from job.jobs.checks import Check, looked_at
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import ContainerTarget, Target
from job.progress import note

OWN_IMAGE = "localhost/"
"""What begins so lies in no registry: it is built here."""
ANSWER_SECONDS = 60.0
_WAITING = ("created", "initialized", "configured")
_OVER = ("exited", "stopped", "dead", "removing")


class ContainerBackend(Backend):
    """Jobs that are containers of this machine's engine, found again by their labels."""

    # Until somebody removes the container.
    keeps_seconds = math.inf
    target: ContainerTarget

    def __init__(self, target: Target, host: Host | None = None) -> None:
        """`host` is this machine unless a test says otherwise."""
        assert isinstance(target, ContainerTarget)
        super().__init__(target)
        self._host = host or Host.look(target.engine)

    def render(self, spec: JobSpec) -> list[Manifest]:
        """The one command; in the background `--detach` comes before its image."""
        return [{"name": spec.name, "command": run_command(spec, self.target, self._host)}]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the engine's client, which passes signals on and ends with the job's exit code."""
        command = self._prepared(spec)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvp(command[0], command)  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the container in the background."""
        command = self._prepared(spec)
        try:
            self._asked("run", "--detach", *command[2:])
        except JobError:
            # Made but not started, for example since a device is not there.
            self._ask("rm", "--force", spec.name)
            raise

    def status(self, name: str) -> JobStatus:
        """How a container is going, or how it ended."""
        found = self._inspect(name)
        return (
            JobStatus(name, State.GONE, "there is no container of this name")
            if found is None
            else _container_status(found)
        )

    def jobs(self) -> list[JobStatus]:
        """All containers that this program started, newest first."""
        own = ["--filter", f"label=app={LABEL_PREFIX}", "--filter", "label=ddpm-job"]
        ids = self._asked("ps", "--all", "--quiet", "--no-trunc", *own).split()
        # One may be removed meanwhile; the others are told all the same.
        answer = self._ask("container", "inspect", *ids).stdout if ids else ""
        statuses = [_container_status(found) for found in json.loads(answer or "[]")]
        return sorted(statuses, key=lambda status: status.created, reverse=True)

    def bucket_of(self, name: str) -> str:
        """See `Backend.bucket_of`: a label says it."""
        return str(self.describe(name)["Config"]["Labels"].get(BUCKET_LABEL) or super().bucket_of(name))

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: this machine may have two engines."""
        return ("container", self._host.engine, status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """What the container printed; its engine keeps that until the job is submitted anew."""
        told, words = 0, [self._host.engine, "logs", *(["--follow"] if follow else []), name]
        while True:
            # Asked before reading, so that nothing is missed that was printed in between.
            is_over = not follow or _container_status(self.describe(name)).state.is_over
            with subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                try:
                    for number, line in enumerate(process.stdout, 1):
                        if number > told:
                            told = number
                            yield line.removesuffix("\n")
                finally:
                    process.kill()
            if is_over:
                return
            # podman does not follow a container that is about to stop.
            time.sleep(FOLLOW_POLL_SECONDS)

    def cancel(self, name: str) -> str:
        """Has the job save and end; a container that is over already is removed, with what it printed."""
        status = _container_status(self.describe(name))
        if status.state.is_over:
            self._asked("rm", "--force", name)
        else:
            self._asked("stop", "--time", str(STOP_SECONDS), name, seconds=STOP_SECONDS + ANSWER_SECONDS)
        return cancelled(status.state)

    def describe(self, name: str) -> Manifest:
        """What the engine's `inspect` tells."""
        if (found := self._inspect(name)) is None:
            raise MissingInputError(
                f"no container {name!r} is on this machine: `ddpm jobs list --on container` shows all"
            )
        return found

    def checks(self) -> Iterable[Check]:
        """Whether there are an engine and an image, and what the container itself finds on this machine."""
        engine, image = self._host.engine, self.target.image
        version = ("version", "--format", "{{.Client.Version}}")
        there = looked_at("engine", lambda: f"{engine} {self._asked(*version).strip()}")
        yield there
        if there.passed and not self._has_image(image):
            how = f"make image IMAGE={image}" if image.startswith(OWN_IMAGE) else f"{engine} pull {image}"
            yield Check(
                "image", False, f"{image} is not on this machine", f"`{how}` brings it; submitting does so, too"
            )
        elif there.passed:
            yield Check("image", True, image)
            yield from self._checks_inside()

    def _checks_inside(self) -> Iterator[Check]:
        words = ("doctor", "--on", "local", "--json", "--no-bucket")
        gpus = min(self.target.gpus, self._host.gpus)
        look = JobSpec(
            "look", "train", ("train",), self.target.image, self.target.bucket or "gs://no-bucket", gpus=gpus
        )
        asked = self._ask("run", "--rm", *confined(look, self.target, self._host), look.image, *words)
        try:
            found = json.loads(asked.stdout)
        except json.JSONDecodeError:
            said = _last_line(asked)
            yield Check("container", False, f"it does not start: {said}", "see to the engine", Exit.BAD_REQUEST)
            return
        for check in found:
            yield Check(**check | {"name": f"{check['name']} (in it)", "exit_code": Exit(check["exit_code"])})

    def _prepared(self, spec: JobSpec) -> list[str]:
        """The command, when all is there that it needs."""
        command, found = run_command(spec, self.target, self._host), self._inspect(spec.name)
        if spec.bucket.startswith("s3://") and "AWS_SECRET_ACCESS_KEY" in os.environ and not self._host.files["s3"]:
            raise NoPermissionError(
                "the credentials for s3:// are in AWS_SECRET_ACCESS_KEY, which is not handed to a container since "
                "every list of containers would show it: write them into ~/.aws/credentials (`aws configure`)"
            )
        if spec.gpus and not self._host.gpus:
            note("this machine has no NVIDIA GPU: the container computes on the CPU")
        if found is not None and not _container_status(found).state.is_over:
            raise runs_already(spec.name, "in a container")
        if found is not None:
            self._asked("rm", "--force", spec.name)
        if not self._has_image(spec.image):
            self._bring(spec.image)
        if (folder := spec.bucket_folder) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return command

    def _bring(self, image: str) -> None:
        """Builds the image, or pulls it."""
        engine, checkout = self._host.engine, Path(__file__).parents[3]
        if not image.startswith(OWN_IMAGE):
            note(f"pulling {image}")
            if self._run([engine, "pull", image], None).returncode:
                how = f"check its name, and log in with `{engine} login`"
                raise MissingInputError(f"image {image} could not be pulled: {how}")
            return
        if not ((checkout / "docker/Dockerfile").is_file() and (checkout / "Makefile").is_file()):
            raise MissingInputError(
                f"image {image} is not on this machine: build it in a checkout with `make image`, or name one of a "
                "registry as the target's `image:`"
            )
        torch = os.environ.get("TORCH") or ("cuda" if self._host.gpus else "cpu")
        note(f"building {image} from {checkout} with PyTorch for {torch}")
        words = ["make", "--no-print-directory", "--directory", str(checkout), "image"]
        if self._run([*words, f"IMAGE={image}", f"ENGINE={engine}", f"TORCH={torch}"], None).returncode:
            raise MissingInputError(f"image {image} could not be built, as said above: mend that, or build it yourself")

    def _has_image(self, image: str) -> bool:
        return self._ask("image", "inspect", "--format", "{{.Id}}", image).returncode == 0

    def _inspect(self, name: str) -> dict[str, Any] | None:
        answer = self._ask("container", "inspect", name)
        if answer.returncode and not re.search(r"no such (container|object)", answer.stderr, re.IGNORECASE):
            raise self._error(answer)
        return None if answer.returncode else json.loads(answer.stdout)[0]

    def _asked(self, *words: str, seconds: float = ANSWER_SECONDS) -> str:
        answer = self._ask(*words, seconds=seconds)
        if answer.returncode:
            raise self._error(answer)
        return answer.stdout

    def _ask(self, *words: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
        return self._run([self._host.engine, *words], seconds)

    def _run(self, words: list[str], seconds: float | None) -> subprocess.CompletedProcess[str]:
        """Runs a program to its end: quietly, for so many seconds; or, with None, with what it says on stderr."""
        # stdout is for what was asked for.
        streams: dict[str, Any] = {"stdout": sys.stderr} if seconds is None else {"capture_output": True}
        streams |= {"stdin": subprocess.DEVNULL, "text": True, "errors": "replace"}
        try:
            return subprocess.run(words, check=False, timeout=seconds, **streams)
        except FileNotFoundError:
            is_any = words[0] == self._host.engine and not self.target.engine
            missing = "neither podman nor docker is installed" if is_any else f"{words[0]} is not installed"
            how = "`apt-get install podman`, `dnf install podman` or `brew install podman` brings an engine"
            raise MissingInputError(f"{missing}: {how}") from None
        except subprocess.TimeoutExpired:
            said = f"`{' '.join(words[:2])}` did not answer within {seconds:g} s"
            raise BucketAwayError(f"{said}: see to the engine") from None

    def _error(self, asked: subprocess.CompletedProcess[str]) -> JobError:
        said, engine = _last_line(asked), self._host.engine
        if re.search(r"permission denied", said, re.IGNORECASE) and "sock" in said:
            return NoPermissionError(f"{engine}: {said}: add this user to the group that may use it, or use podman")
        if re.search(r"cannot connect|connection refused|is the docker daemon running", said, re.IGNORECASE):
            return BucketAwayError(f"{engine}: {said}: start its service, or use podman, which needs none")
        return BadRequestError(f"{engine}: {said}")


def _container_status(found: dict[str, Any]) -> JobStatus:
    """From an inspection, which podman and docker agree on as far as it is used here."""
    state, name, created = found["State"], found["Name"].removeprefix("/"), str(found.get("Created", ""))
    said, code = str(state["Status"]).lower(), int(state["ExitCode"])
    started = str(state.get("StartedAt", "")).startswith("2")
    with suppress(ValueError):
        # Nanoseconds are more than datetime reads.
        made = datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", created)).astimezone(UTC)
        created = made.strftime("%Y-%m-%dT%H:%M:%SZ")
    status = JobStatus(name, State.RUNNING, attempts=int(started), created=created)
    if said not in _OVER:
        return replace(status, state=State.WAITING) if said in _WAITING else status
    if not started:
        return replace(status, state=State.FAILED, message=state.get("Error") or "it did not start")
    message = TABLE[Exit(code)].text if code in TABLE else state.get("Error") or f"exit code {code}"
    if state.get("OOMKilled"):
        message = "killed by the kernel: memory ran out; `memory:` of the target is the limit"
    how = state_of_code(code)
    return replace(status, state=how, message="" if how is State.FINISHED else message, exit_code=code)


def _last_line(asked: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in asked.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"it ended with {asked.returncode}"

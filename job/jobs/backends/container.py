"""Containers on this machine: podman or docker runs the image that a cluster would run."""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from job.exits import (
    TABLE,
    BadRequestError,
    BucketAwayError,
    Exit,
    JobError,
    MissingInputError,
    NoPermissionError,
)
from job.jobs.backends.base import Backend, JobStatus, Manifest, State, cancelled
from job.jobs.backends.container_command import STOP_SECONDS, bucket_folder, look_command, run_command
from job.jobs.backends.container_host import Host, check_credentials, check_engine
from job.jobs.checks import Check
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import ContainerTarget, Target
from job.progress import note

OWN_IMAGE = "localhost/"
"""What begins so lies in no registry: it is built here."""
ANSWER_SECONDS = 60.0
LOOK_SECONDS = 0.2
_LOOK_NAME = "ddpm-look"
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
        """The one command; in the background `--detach` comes before its image.

        Raises:
            BadRequestError: one container on this machine cannot be the job.
        """
        return [{"name": spec.name, "command": run_command(spec, self.target, self._host)}]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the engine's client, which passes signals on and ends with the job's exit code.

        Raises:
            BadRequestError: a container of this name runs, or the engine refuses.
            MissingInputError: there is no engine, no image or no bucket.
        """
        command = self._prepared(spec)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvp(command[0], command)  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the container in the background.

        Raises:
            BadRequestError: a container of this name runs, or the engine refuses.
            MissingInputError: there is no engine, no image or no bucket.
        """
        command = self._prepared(spec)
        try:
            self._asked(*command[1:2], "--detach", *command[2:])
        except JobError:
            # Made but not started, for example since a device is not there.
            self._ask("rm", "--force", spec.name)
            raise

    def describe_start(self, name: str) -> str:
        """Which container does it, and how to look at it."""
        about = f"{name} --on {self.target.name}"
        return f"container {name} does it: `ddpm jobs logs {about} -f` follows it, `ddpm jobs cancel {about}` stops it"

    def status(self, name: str) -> JobStatus:
        """How a container is going, or how it ended."""
        found = self._inspect(name)
        return JobStatus(name, State.GONE, "there is no container of this name") if found is None else _status(found)

    def jobs(self) -> list[JobStatus]:
        """All containers that this program started, newest first."""
        own = ["--filter", f"label=app={LABEL_PREFIX}", "--filter", "label=ddpm-job"]
        if not (ids := self._asked("ps", "--all", "--quiet", "--no-trunc", *own).split()):
            return []
        # One may be removed meanwhile; the others are told all the same.
        asked = self._ask("container", "inspect", *ids)
        statuses = [_status(found) for found in json.loads(asked.stdout or "[]")]
        return sorted(statuses, key=lambda status: status.created, reverse=True)

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: this machine may have two engines."""
        return ("container", self._host.engine, status.name)

    def logs(self, name: str, follow: bool, should_stop: Callable[[], bool]) -> Iterator[str]:
        """What the container printed; its engine keeps that until the job is submitted anew.

        Raises:
            MissingInputError: there is no such container.
        """
        told = 0
        while True:
            # Asked before reading, so that nothing is missed that was printed in between.
            is_over = not follow or _status(self._existing(name)).state.is_over
            number = 0
            for number, line in enumerate(self._printed(name, not is_over, should_stop), 1):
                if number > told:
                    yield line
            told = max(told, number)
            if is_over or should_stop():
                return
            # podman does not follow a container that is about to stop.
            time.sleep(LOOK_SECONDS)

    def _printed(self, name: str, follow: bool, should_stop: Callable[[], bool]) -> Iterator[str]:
        words = [self._engine(), "logs", *(["--follow"] if follow else []), name]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            try:
                yield from _lines(process.stdout.fileno(), should_stop)
            finally:
                process.kill()

    def cancel(self, name: str) -> str:
        """Has the job save and end; a container that is over already is removed, with what it printed.

        Raises:
            MissingInputError: there is no such container.
        """
        status = _status(self._existing(name))
        if status.state.is_over:
            self._asked("rm", "--force", name)
        else:
            self._asked("stop", "--time", str(STOP_SECONDS), name, seconds=STOP_SECONDS + ANSWER_SECONDS)
        return cancelled(status.state)

    def describe(self, name: str) -> Manifest:
        """What the engine's `inspect` tells.

        Raises:
            MissingInputError: there is no such container.
        """
        return self._existing(name)

    def checks(self) -> Iterable[Check]:
        """Whether there are an engine and an image, and what the container itself finds on this machine."""
        try:
            version = self._asked("version", "--format", "{{.Client.Version}}").strip()
        except JobError as error:
            yield Check.of_error("engine", error)
            return
        yield Check("engine", True, f"{self._host.engine} {version}")
        image = self.target.image
        if not self._has_image(image):
            how = (
                f"`make image IMAGE={image}`" if image.startswith(OWN_IMAGE) else f"`{self._host.engine} pull {image}`"
            )
            yield Check("image", False, f"{image} is not on this machine", f"{how} brings it; submitting does so, too")
            return
        yield Check("image", True, image)
        yield from self._checks_inside()

    def _checks_inside(self) -> Iterator[Check]:
        look = JobSpec(_LOOK_NAME, "train", ("train",), self.target.image, self.target.bucket or "gs://no-bucket")
        look = replace(look, gpus=min(self.target.gpus, self._host.gpus))
        words = ("doctor", "--on", "local", "--json", "--no-bucket")
        asked = self._run([*look_command(words, look, self.target, self._host)], ANSWER_SECONDS)
        try:
            found = json.loads(asked.stdout)
        except json.JSONDecodeError:
            said = _last_line(asked.stderr) or f"it ended with {asked.returncode}"
            yield Check("container", False, f"it does not start: {said}", "see to the engine", Exit.BAD_REQUEST)
            return
        for check in found:
            check["exit_code"] = Exit(check["exit_code"])
            yield Check(**{**check, "name": f"{check['name']} (in it)"})

    def _prepared(self, spec: JobSpec) -> list[str]:
        """The command, when all is there that it needs."""
        command = run_command(spec, self.target, self._host)
        self._engine()
        check_credentials(spec.bucket)
        if spec.gpus and not self._host.gpus:
            note("this machine has no NVIDIA GPU: the container computes on the CPU")
        folder = bucket_folder(spec)
        if folder is not None and not folder.is_dir():
            if spec.verb != "pack":
                raise MissingInputError(f"bucket {folder} is not there: check the path, or pack a dataset first")
            folder.mkdir(parents=True, exist_ok=True)
        if (found := self._inspect(spec.name)) is not None:
            if not _status(found).state.is_over:
                raise BadRequestError(
                    f"{spec.name} runs in a container already: `ddpm jobs status {spec.name}` tells how it is going, "
                    f"`ddpm jobs cancel {spec.name}` stops it"
                )
            self._asked("rm", "--force", spec.name)
        self._provide(spec.image)
        return command

    def _provide(self, image: str) -> None:
        """Builds the image, or pulls it, if it is not there.

        Raises:
            MissingInputError: it is to be had neither way.
        """
        if self._has_image(image):
            return
        if not image.startswith(OWN_IMAGE):
            note(f"pulling {image}")
            if self._run([self._engine(), "pull", image], None, is_shown=True).returncode:
                raise MissingInputError(
                    f"image {image} could not be pulled: check its name, and log in with `{self._host.engine} login`"
                )
            return
        checkout = _checkout()
        if checkout is None:
            raise MissingInputError(
                f"image {image} is not on this machine: build it in a checkout with `make image`, or name one of a "
                "registry as the target's `image:`"
            )
        torch = os.environ.get("TORCH") or ("cuda" if self._host.gpus else "cpu")
        note(f"building {image} from {checkout} with PyTorch for {torch}")
        words = ["make", "--no-print-directory", "--directory", str(checkout), "image", f"IMAGE={image}"]
        built = self._run([*words, f"ENGINE={self._host.engine}", f"TORCH={torch}"], None, is_shown=True)
        if built.returncode:
            raise MissingInputError(f"image {image} could not be built, as said above: mend that, or build it yourself")

    def _has_image(self, image: str) -> bool:
        return self._ask("image", "inspect", "--format", "{{.Id}}", image).returncode == 0

    def _inspect(self, name: str) -> dict[str, Any] | None:
        asked = self._ask("container", "inspect", name)
        if asked.returncode == 0:
            found: dict[str, Any] = json.loads(asked.stdout)[0]
            return found
        if re.search(r"no such (container|object)", asked.stderr, re.IGNORECASE):
            return None
        raise self._error(asked)

    def _existing(self, name: str) -> dict[str, Any]:
        if (found := self._inspect(name)) is None:
            raise MissingInputError(
                f"no container {name!r} is on this machine: `ddpm jobs list --on container` shows all"
            )
        return found

    def _engine(self) -> str:
        return check_engine(self.target.engine and self._host.engine)

    def _asked(self, *words: str, seconds: float = ANSWER_SECONDS) -> str:
        asked = self._ask(*words, seconds=seconds)
        if asked.returncode:
            raise self._error(asked)
        return str(asked.stdout)

    def _ask(self, *words: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
        return self._run([self._engine(), *words], seconds)

    def _run(
        self, words: list[str], seconds: float | None, *, is_shown: bool = False
    ) -> subprocess.CompletedProcess[str]:
        # What is shown goes to stderr: stdout is for what was asked for.
        streams: dict[str, Any] = {"stdout": sys.stderr} if is_shown else {"capture_output": True}
        try:
            return subprocess.run(
                words, stdin=subprocess.DEVNULL, text=True, errors="replace", check=False, timeout=seconds, **streams
            )
        except FileNotFoundError:
            raise MissingInputError(f"{words[0]} is not installed: install it") from None
        except subprocess.TimeoutExpired:
            raise BucketAwayError(
                f"`{' '.join(words[:2])}` did not answer within {seconds:g} s: see to the engine"
            ) from None

    def _error(self, asked: subprocess.CompletedProcess[str]) -> JobError:
        said, engine = _last_line(asked.stderr) or f"it ended with {asked.returncode}", self._host.engine
        if re.search(r"permission denied", said, re.IGNORECASE) and "sock" in said:
            return NoPermissionError(f"{engine}: {said}: add this user to the group that may use it, or use podman")
        if re.search(r"cannot connect|connection refused|is the docker daemon running", said, re.IGNORECASE):
            return BucketAwayError(f"{engine}: {said}: start its service, or use podman, which needs none")
        return BadRequestError(f"{engine}: {said}")


def _status(found: dict[str, Any]) -> JobStatus:
    """From an inspection, which podman and docker agree on as far as it is used here."""
    state, name = found["State"], found["Name"].removeprefix("/")
    said, code = str(state["Status"]).lower(), int(state["ExitCode"])
    started = str(state.get("StartedAt", "")).startswith("2")
    made = JobStatus(name, State.RUNNING, attempts=int(started), created=_utc(found.get("Created", "")))
    if said not in _OVER:
        return replace(made, state=State.WAITING) if said in _WAITING else made
    if not started:
        return replace(made, state=State.FAILED, message=state.get("Error") or "it did not start")
    meaning = TABLE[Exit(code)].text if code in TABLE else state.get("Error") or f"exit code {code}"
    if state.get("OOMKilled"):
        meaning = "killed by the kernel: memory ran out; `memory:` of the target is the limit"
    # Nobody but a person, or the job's own deadline, stops a container of this machine.
    how = {int(Exit.FINISHED): State.FINISHED, int(Exit.STOPPED): State.CANCELLED}.get(code, State.FAILED)
    return replace(made, state=how, message="" if how is State.FINISHED else meaning, exit_code=code)


def _utc(created: str) -> str:
    from datetime import UTC, datetime

    # Nanoseconds are more than datetime reads.
    text = re.sub(r"(\.\d{1,6})\d*", r"\1", created)
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return created


def _lines(descriptor: int, should_stop: Callable[[], bool]) -> Iterator[str]:
    part = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not should_stop():
            if not selector.select(LOOK_SECONDS):
                continue
            if not (block := os.read(descriptor, 65536)):
                break
            *whole, part = (part + block).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if part:
        yield part.decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""


def _checkout() -> Path | None:
    """The sources that this program runs from, if the image can be built from them."""
    folder = Path(__file__).parents[3]
    return folder if (folder / "docker/Dockerfile").is_file() and (folder / "Makefile").is_file() else None

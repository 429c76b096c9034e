"""Containers on this machine: podman or docker runs the image that a cluster would run.

A container may write only /tmp, /scratch and a bucket that is a folder of this machine. It runs as the user who submits
if it needs files of theirs, and as the image's own otherwise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import PrivateAttr

from job.coordination.sealed import utc_text
from job.exits import (
    BadRequestError,
    BucketAwayError,
    JobError,
    MissingInputError,
    NoPermissionError,
    State,
    state_after,
)
from job.jobs.backends import FOLLOW_SECONDS, Check, Image, JobStatus, JsonObject, Target, Word, last_line, output_of
from job.jobs.spec import IMAGE_USER, LABEL_PREFIX, SCRATCH, JobSpec, docker_options, scratch_variables
from job.processes.group import local_gpus
from job.progress import note
from job.store import kind_of

OWN_IMAGE = "localhost/"
"""The prefix of an image that is built here and lies in no registry."""
ANSWER_SECONDS = 60.0
STOP_SECONDS = 120
"""From SIGTERM to SIGKILL: this machine is not taken away."""
BUCKET_LABEL = "ddpm-bucket"
CREDENTIALS_FOLDER = "/credentials"
"""The container's folder into which files with credentials are mounted."""
_OVER = ("exited", "stopped", "dead", "removing")


def _mount(path: str, inside: str, *options: str) -> str:
    """Returns the option of a mount; in a path a comma would begin an option, and podman before 4.1 knows no quotes."""
    if re.search(r'[,"\r\n]', f"{path}{inside}"):
        raise BadRequestError(f"{path!r} has a comma, quote or line break: no container can mount it; rename it")
    return ",".join(("--mount=type=bind", f"source={path}", f"destination={inside}", *options))


class ContainerTarget(Target):
    """Jobs that are containers of this machine, by podman or docker, whichever is installed, found by their labels."""

    is_remote = False
    # Until a person removes the container.
    keeps_ended = True
    backend: Literal["container"] = "container"
    image: Image = "localhost/ddpm:latest"
    engine: Literal["", "podman", "docker"] = ""
    spot: bool = False
    memory: Word = ""
    """The limit, such as `16g`; empty for no limit."""
    network: Word = ""
    """`host` for a bucket server on this machine's loopback; empty is the engine's default."""
    _user: tuple[int, int] = PrivateAttr(default_factory=lambda: (os.geteuid(), os.getegid()))
    _gpus: int = PrivateAttr(default_factory=local_gpus)

    @property
    def _program(self) -> str:
        """The named engine, else the installed one, else podman, for a dry run."""
        return self.engine or next(filter(shutil.which, ("podman", "docker")), "podman")

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """Returns the one command: `podman run …` or `docker run …`."""
        if 0 < self._gpus < spec.gpus:
            raise BadRequestError(f"--gpus {spec.gpus}: this machine has {self._gpus}: use fewer")
        labels = {**spec.all_labels, BUCKET_LABEL: spec.bucket}
        named = (f"--label={name}={value}" for name, value in labels.items())
        options = [f"--name={spec.name}", *named, *self._confined(spec)]
        return [{"name": spec.name, "command": [self._program, "run", *options, spec.image, *spec.argv_that_ends]}]

    def _confined(self, spec: JobSpec) -> list[str]:
        """Returns the options that decide what the container may write, use and see."""
        kind, folder = kind_of(spec.bucket), str(spec.bucket_folder or "")
        files = kind.credential_files() if kind else {}
        inside = {variable: f"{CREDENTIALS_FOLDER}/{variable.lower()}" for variable in files}
        # Engines refuse a second mount of one folder.
        read = [(path, path) for path in spec.reads if path not in ("", folder)]
        read += [(str(file), inside[variable]) for variable, file in files.items()]
        mounts = [*([_mount(folder, folder)] if folder else ()), *(_mount(*pair, "readonly") for pair in read)]
        uid, gid = self._user if mounts else (IMAGE_USER, IMAGE_USER)
        gpus, is_podman = min(spec.gpus, self._gpus), self._program == "podman"
        chosen: list[object] = ["all"] if gpus == self._gpus else [*range(gpus)] if is_podman else [gpus]
        # Names of the Container Device Interface, which `nvidia-ctk cdi generate` writes.
        devices = [f"--device=nvidia.com/gpu={one}" if is_podman else f"--gpus={one}" for one in chosen if gpus]
        settings = {name: os.environ[name] for name in (kind.variables if kind else ()) if os.environ.get(name)}
        variables = {**scratch_variables(STOP_SECONDS), **settings, **inside, **spec.env}
        return [
            "--pull=never",
            *docker_options(uid, gid, STOP_SECONDS),
            "--shm-size=2g",
            # One volume for each user, who may not write the files of another.
            f"--mount=type=volume,source=ddpm-scratch-{uid},destination={SCRATCH}",
            # Otherwise SELinux would require new labels on the user's folders.
            *["--security-opt=label=disable"] * bool(mounts),
            # Without root a user of the container is another one outside.
            *["--userns=keep-id"] * (bool(mounts) and is_podman and uid > 0),
            *devices,
            *[f"--memory={self.memory}"] * bool(self.memory),
            *[f"--network={self.network}"] * bool(self.network),
            *(f"--env={name}={value}" for name, value in sorted(variables.items())),
            *mounts,
        ]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the engine's client, which passes signals on and ends with the job's exit code."""
        command = self._prepared(spec)
        sys.stdout.flush()
        os.execvp(command[0], command)  # noqa: S606

    def submit(self, spec: JobSpec) -> None:
        """Starts the container in the background."""
        command = self._prepared(spec)
        try:
            self._ask("run", "--detach", *command[2:])
        except JobError:
            # Made but not started, for example because a device is missing.
            self._try("rm", "--force", spec.name)
            raise

    def find(self, name: str) -> JobStatus | None:
        """Returns the status of a container; None if the engine does not know it."""
        return next(iter(self._matching(f"name=^{name}$")), None)

    def alive(self, name: str) -> JobStatus:
        """See `Target.alive`."""
        return self.find(name) or JobStatus(name, State.GONE, f"the engine has no container {name!r}")

    def jobs(self) -> list[JobStatus]:
        """Returns all containers that this program started, newest first."""
        return self._matching(f"label=app={LABEL_PREFIX}", "label=ddpm-job")

    def _matching(self, *filters: str) -> list[JobStatus]:
        ids = self._ask("ps", "--all", "--quiet", "--no-trunc", *(f"--filter={each}" for each in filters)).split()
        # One may be removed meanwhile; the answer has the others all the same.
        answer = self._try("container", "inspect", *ids).stdout if ids else ""
        return [_container_status(found) for found in json.loads(answer or "[]")]

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """See `Target.logs`; the engine keeps the output until the job is submitted again."""
        shown, words = 0, [self._program, "logs", *(["--follow"] if follow else []), name]
        while True:
            # Determined before the read, so that it has all output until the end.
            is_over = not follow or self.known(name).state.is_over
            for line in islice(output_of(words, FOLLOW_SECONDS, lambda: False, subprocess.STDOUT), shown, None):
                shown += 1
                yield line
            if is_over:
                return
            # podman does not follow a container that is about to stop.
            time.sleep(FOLLOW_SECONDS)

    def cancel(self, name: str) -> str:
        """Makes the job save and end; removes a container that is over, with its output."""
        state: State = self.known(name).state
        if state.is_over:
            self._ask("rm", "--force", name)
        else:
            self._ask("stop", "--time", str(STOP_SECONDS), name, seconds=STOP_SECONDS + ANSWER_SECONDS)
        return self.effect_of_cancelling(state)

    def checks(self, bucket: str) -> Iterator[Check]:
        """See `Target.checks`: the engine, the image, and what the container itself finds on this machine."""
        for name, look in (("engine", self._look_for_engine), ("image", self._look_for_image)):
            yield (check := Check.of(name, look))
            if not check.passed:
                return
        gpus = min(self.gpus, self._gpus)
        job = JobSpec("look", "train", (), self.image, self.bucket or "gs://none", gpus=gpus, env=self.env)
        words = ("doctor", "--on", "local", "--json", "--no-bucket")
        answer = self._try("run", "--rm", *self._confined(job), job.image, *words)
        broken = Check("container", False, f"it does not start: {last_line(answer)}", "repair the engine")
        yield from Check.inside(answer.stdout, "in it") or [broken]

    def _look_for_engine(self) -> str:
        return f"{self._program} {self._ask('version', '--format', '{{.Client.Version}}').strip()}"

    def _look_for_image(self) -> str:
        if not self._has_image(self.image):
            raise MissingInputError(f"{self.image} is not on this machine: submitting a job builds or pulls it")
        return self.image

    def _prepared(self, spec: JobSpec) -> list[str]:
        """Returns the command, once all that it needs is there."""
        command: list[str] = self.render(spec)[0]["command"]
        before, kind = self.find(spec.name), kind_of(spec.bucket)
        if kind and kind.secret in os.environ and not kind.credential_files():
            where = [*kind.files.values()][-1]
            raise NoPermissionError(f"{kind.secret} is not passed to a container: write the credentials into {where}")
        if spec.gpus and not self._gpus:
            note("this machine has no NVIDIA GPU: the container computes on the CPU")
        if before and not before.state.is_over:
            raise self.runs_already(spec.name, "in a container")
        if before:
            self._ask("rm", "--force", spec.name)
        if not self._has_image(spec.image):
            self._bring(spec.image)
        if (folder := spec.bucket_folder) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return command

    def _bring(self, image: str) -> None:
        """Builds the image, or pulls it."""
        engine, checkout = self._program, Path(__file__).parents[3]
        if not image.startswith(OWN_IMAGE):
            note(f"pulling {image}")
            words, failed = [engine, "pull", image], f"pulled: check its name, and log in with `{engine} login`"
        elif (checkout / "docker/Dockerfile").is_file():
            torch = os.environ.get("TORCH") or ("cuda" if self._gpus else "cpu")
            note(f"building {image} from {checkout} with PyTorch for {torch}")
            words = ["make", "--no-print-directory", "--directory", str(checkout), "image"]
            words += [f"IMAGE={image}", f"ENGINE={engine}", f"TORCH={torch}"]
            failed = "built: correct the error above, or build it yourself"
        else:
            raise MissingInputError(f"image {image} is not on this machine: `make image` builds it in a checkout")
        # stdout is for the job's output.
        if self._run(words, stdout=sys.stderr).returncode:
            raise MissingInputError(f"image {image} could not be {failed}")

    def _has_image(self, image: str) -> bool:
        return self._try("image", "inspect", "--format", "{{.Id}}", image).returncode == 0

    def _ask(self, *words: str, seconds: float = ANSWER_SECONDS) -> str:
        """Returns the output of the engine's client, which must succeed."""
        answer = self._run([self._program, *words], timeout=seconds, capture_output=True)
        if answer.returncode:
            raise BadRequestError(f"{self._program}: {last_line(answer)}")
        return answer.stdout

    def _try(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run([self._program, *words], timeout=ANSWER_SECONDS, capture_output=True)

    def _run(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(words, check=False, stdin=subprocess.DEVNULL, text=True, errors="replace", **options)
        except FileNotFoundError:
            raise MissingInputError(f"{words[0]} is not installed: `apt-get install podman` brings an engine") from None
        except subprocess.TimeoutExpired as error:
            raise BucketAwayError(f"{words[0]} did not answer within {error.timeout:g} s: restart it") from None


def _container_status(found: dict[str, Any]) -> JobStatus:
    """Returns the status from an inspection, of which podman and docker share the keys that are read here."""
    state, labels = found["State"], found["Config"]["Labels"] or {}
    error, has_started = state.get("Error") or "", str(state.get("StartedAt", "")).startswith("2")
    # A container that cannot be started keeps the status of one that was made.
    is_over = str(state["Status"]).lower() in _OVER or (bool(error) and not has_started)
    code = int(state["ExitCode"]) if is_over and has_started else None
    if state.get("OOMKilled"):
        error = "killed by the kernel: memory ran out; `memory:` of the target is the limit"
    return JobStatus(
        name=found["Name"].removeprefix("/"),
        state=state_after(code) if code is not None or not is_over else State.FAILED,
        message=error or "it did not start" * (is_over and not has_started),
        exit_code=code,
        # datetime reads no nanoseconds.
        created=utc_text(re.sub(r"\.\d+", "", found["Created"])),
        bucket=labels.get(BUCKET_LABEL, ""),
    )

"""Containers on this machine: podman or docker runs the image that a cluster would run.

A container may write, use and see little: nothing is writable in it but /tmp, /scratch and a bucket that is a folder of
this machine. It runs as the user who submits if it needs files of theirs, and as the image's own otherwise.
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError, meaning
from job.jobs.backends.base import FOLLOW_POLL_SECONDS, Backend, Check, JobStatus, JsonObject, State
from job.jobs.backends.confinement import IMAGE_USER, SCRATCH, docker_options, scratch_variables
from job.jobs.spec import LABEL_PREFIX, JobSpec
from job.jobs.targets import ContainerTarget, Target
from job.processes.group import local_gpus
from job.progress import note
from job.sealed import utc_text

OWN_IMAGE = "localhost/"
"""What begins so lies in no registry: it is built here."""
ENGINE_ANSWER_SECONDS = 60.0
STOP_SECONDS = 120
"""From SIGTERM to SIGKILL; nobody takes this machine away."""
BUCKET_LABEL = "ddpm-bucket"
CREDENTIALS_FOLDER = "/credentials"
"""Of the container, where files with credentials are mounted."""
_CREDENTIAL_FILES = {
    "gs": {"GOOGLE_APPLICATION_CREDENTIALS": "~/.config/gcloud/application_default_credentials.json"},
    "s3": {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"},
    "az": {},
}
"""For each kind of bucket the variables that say where a file with credentials lies, and where it lies else."""
_FSSPEC = {"FSSPEC_CONFIG_DIR": "~/.config/fsspec"}
"""A folder, which may hold credentials for all of them."""
_HARMLESS = {
    "gs": ("GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST"),
    "s3": ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME",),
}
"""Variables that are handed on: they hold nothing secret."""
_OVER = ("exited", "stopped", "dead", "removing")


def credential_files(scheme: str) -> dict[str, Path]:
    """The files for a kind of bucket that are there, by the variable that says where one lies."""
    found = {}
    usually = _CREDENTIAL_FILES[scheme] | _FSSPEC if scheme in _CREDENTIAL_FILES else {}
    for variable, usual in usually.items():
        # As google.auth looks for it.
        usual = usual.replace("~/.config/gcloud", os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud")
        path = os.path.expanduser(os.environ.get(variable) or usual)  # noqa: PTH111 -- a user may have no home
        if os.path.exists(path):  # noqa: PTH110 -- nor rights to look
            found[variable] = Path(path).absolute()
    return found


def _mount(path: Path, inside: str, *options: str) -> str:
    """A value of `--mount`; a path with a comma would be further options, and podman before 4.1 knows no quotes."""
    if re.search(r'[,"\r\n]', f"{path}{inside}"):
        raise BadRequestError(f"{str(path)!r} has a comma, quote or line break: no container can mount it; rename it")
    return ",".join(("type=bind", f"source={path}", f"destination={inside}", *options))


def _mounted_folders(spec: JobSpec) -> list[str]:
    """Returns the mounts of the folders that a job reads or writes: a local bucket, and what it is made of."""
    mounts = []
    if (folder := spec.bucket_folder) is not None:
        mounts.append(_mount(folder, str(folder)))
    return mounts + [_mount(Path(path), path, "readonly") for path in filter(None, spec.reads)]


def _gpu_options(engine: str, count: int, there: int) -> list[str]:
    """Returns the options that give a container `count` of the GPUs `there`."""
    if not count:
        return []
    if engine == "docker":
        return ["--gpus", "all" if count == there else str(count)]
    # Names of the Container Device Interface, which `nvidia-ctk cdi generate` writes.
    names = ["all"] if count == there else range(count)
    return [word for name in names for word in ("--device", f"nvidia.com/gpu={name}")]


class ContainerBackend(Backend):
    """Jobs that are containers of this machine's engine, found again by their labels."""

    # Until somebody removes the container.
    keeps_ended = True
    target: ContainerTarget

    def __init__(self, target: Target) -> None:
        """With no engine on this machine it is the one that is named, or podman, for a command to look at."""
        super().__init__(target)
        self.engine = self.target.engine or next(filter(shutil.which, ("podman", "docker")), "podman")
        self.user, self.gpus = (os.geteuid(), os.getegid()), local_gpus()

    def render(self, spec: JobSpec) -> list[JsonObject]:
        """The one command: `podman run …` or `docker run …`; in the background `--detach` comes after that."""
        if 0 < self.gpus < spec.gpus:
            raise BadRequestError(f"--gpus {spec.gpus}: this machine has {self.gpus}: ask for at most so many")
        labels = {**spec.all_labels, BUCKET_LABEL: spec.bucket}
        named = [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]
        words = [self.engine, "run", "--name", spec.name, *named, *self._confined(spec), spec.image, *spec.argv]
        return [{"name": spec.name, "command": words}]

    def _confined(self, spec: JobSpec) -> list[str]:
        """Options: what the container may write, use and see."""
        scheme, target = spec.bucket.partition("://")[0].lower(), self.target
        files = credential_files(scheme)
        inside = {variable: f"{CREDENTIALS_FOLDER}/{variable.lower()}" for variable in files}
        mounts = _mounted_folders(spec)
        mounts += [_mount(path, inside[variable], "readonly") for variable, path in files.items()]
        uid, gid = self.user if mounts else (IMAGE_USER, IMAGE_USER)
        words = [
            *("--pull", "never"),
            *docker_options(uid, gid, STOP_SECONDS),
            *("--shm-size", "2g"),
            # Users would stumble over each other's files.
            *("--mount", f"type=volume,source=ddpm-scratch-{uid},destination={SCRATCH}"),
        ]
        if mounts:
            # Else SELinux would want the user's folders labelled anew.
            words += ["--security-opt", "label=disable"]
            if self.engine == "podman" and uid:
                # Without root a user of the container is another one outside.
                words += ["--userns", "keep-id"]
        words += _gpu_options(self.engine, min(spec.gpus, self.gpus), self.gpus)
        words += ["--memory", target.memory] if target.memory else []
        words += ["--network", target.network] if target.network else []
        harmless = {name: os.environ[name] for name in _HARMLESS.get(scheme, ()) if os.environ.get(name)}
        variables = {**scratch_variables(STOP_SECONDS), **harmless, **inside, **spec.env}
        for name, value in sorted(variables.items()):
            words += ["--env", f"{name}={value}"]
        return words + [word for mount in mounts for word in ("--mount", mount)]

    def become(self, spec: JobSpec) -> NoReturn:
        """Turns this process into the engine's client, which passes signals on and ends with the job's exit code."""
        command = self._prepared(spec)
        sys.stdout.flush()
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
        return _container_status(found) if found else JobStatus(name, State.GONE, "there is no container of this name")

    def jobs(self) -> list[JobStatus]:
        """All containers that this program started, newest first."""
        own = ["--filter", f"label=app={LABEL_PREFIX}", "--filter", "label=ddpm-job"]
        ids = self._asked("ps", "--all", "--quiet", "--no-trunc", *own).split()
        # One may be removed meanwhile; the others are told all the same.
        answer = self._ask("container", "inspect", *ids).stdout if ids else ""
        return [_container_status(found) for found in json.loads(answer or "[]")]

    def identity(self, status: JobStatus) -> tuple[str, ...]:
        """See `Backend.identity`: this machine may have two engines."""
        return ("container", self.engine, status.name)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """What the container printed; its engine keeps that until the job is submitted anew."""
        told, words = 0, [self.engine, "logs", *(["--follow"] if follow else []), name]
        while True:
            # Asked before reading, so that nothing is missed that was printed in between.
            is_over = not follow or self._known(name).state.is_over
            with subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                try:
                    for line in islice(process.stdout, told, None):
                        told += 1
                        yield line.removesuffix("\n")
                finally:
                    process.kill()
            if is_over:
                return
            # podman does not follow a container that is about to stop.
            time.sleep(FOLLOW_POLL_SECONDS)

    def cancel(self, name: str) -> str:
        """Has the job save and end; a container that is over already is removed, with what it printed."""
        status = self._known(name)
        if status.state.is_over:
            self._asked("rm", "--force", name)
        else:
            self._asked("stop", "--time", str(STOP_SECONDS), name, seconds=STOP_SECONDS + ENGINE_ANSWER_SECONDS)
        return status.state.when_cancelled

    def checks(self) -> Iterator[Check]:
        """Whether there are an engine and an image, and what the container itself finds on this machine."""
        version = ("version", "--format", "{{.Client.Version}}")
        yield (engine := Check.of("engine", lambda: f"{self.engine} {self._asked(*version).strip()}"))
        if not engine.passed:
            return
        yield (image := Check.of("image", self._look_for_image))
        if not image.passed:
            return
        target, gpus = self.target, min(self.target.gpus, self.gpus)
        job = JobSpec("look", "train", (), target.image, target.bucket or "gs://none", gpus=gpus, env=target.env)
        words = ("doctor", "--on", "local", "--json", "--no-bucket")
        asked = self._ask("run", "--rm", *self._confined(job), job.image, *words)
        try:
            found = json.loads(asked.stdout)
        except ValueError:
            yield Check("container", False, f"it does not start: {_last_line(asked)}", "see to the engine")
            return
        for inside in found:
            yield Check(**inside | {"name": f"{inside['name']} (in it)", "exit_code": Exit(inside["exit_code"])})

    def _look_for_image(self) -> str:
        image = self.target.image
        if not self._has_image(image):
            raise MissingInputError(f"{image} is not on this machine: submitting a job builds or pulls it")
        return image

    def _prepared(self, spec: JobSpec) -> list[str]:
        """The command, when all is there that it needs."""
        command, found = self.render(spec)[0]["command"], self._inspect(spec.name)
        if spec.bucket.startswith("s3://") and "AWS_SECRET_ACCESS_KEY" in os.environ and not credential_files("s3"):
            why = "AWS_SECRET_ACCESS_KEY is not handed to a container, whose variables everybody can list"
            raise NoPermissionError(f"{why}: write the credentials into ~/.aws/credentials (`aws configure`)")
        if spec.gpus and not self.gpus:
            note("this machine has no NVIDIA GPU: the container computes on the CPU")
        if found and not _container_status(found).state.is_over:
            raise self.runs_already(spec.name, "in a container")
        if found:
            self._asked("rm", "--force", spec.name)
        if not self._has_image(spec.image):
            self._bring(spec.image)
        if (folder := spec.bucket_folder) is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return command

    def _bring(self, image: str) -> None:
        """Builds the image, or pulls it."""
        engine, checkout = self.engine, Path(__file__).parents[3]
        if not image.startswith(OWN_IMAGE):
            note(f"pulling {image}")
            words, failed = [engine, "pull", image], f"pulled: check its name, and log in with `{engine} login`"
        elif (checkout / "docker/Dockerfile").is_file():
            torch = os.environ.get("TORCH") or ("cuda" if self.gpus else "cpu")
            note(f"building {image} from {checkout} with PyTorch for {torch}")
            words = ["make", "--no-print-directory", "--directory", str(checkout), "image"]
            words += [f"IMAGE={image}", f"ENGINE={engine}", f"TORCH={torch}"]
            failed = "built, as said above: mend that, or build it yourself"
        else:
            raise MissingInputError(f"image {image} is not on this machine: `make image` builds it in a checkout")
        # stdout is for what was asked for.
        if self._run(words, stdout=sys.stderr).returncode:
            raise MissingInputError(f"image {image} could not be {failed}")

    def _has_image(self, image: str) -> bool:
        return self._ask("image", "inspect", "--format", "{{.Id}}", image).returncode == 0

    def _known(self, name: str) -> JobStatus:
        if found := self._inspect(name):
            return _container_status(found)
        raise self.unknown(name)

    def _inspect(self, name: str) -> dict[str, Any] | None:
        answer = self._ask("container", "inspect", name)
        if not answer.returncode:
            return json.loads(answer.stdout)[0]
        if re.search(r"no such (container|object)", answer.stderr, re.IGNORECASE):
            return None
        raise self._refusal(answer)

    def _asked(self, *words: str, seconds: float = ENGINE_ANSWER_SECONDS) -> str:
        answer = self._ask(*words, seconds=seconds)
        if answer.returncode:
            raise self._refusal(answer)
        return answer.stdout

    def _ask(self, *words: str, seconds: float = ENGINE_ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
        return self._run([self.engine, *words], timeout=seconds, capture_output=True)

    def _refusal(self, answer: subprocess.CompletedProcess[str]) -> BadRequestError:
        return BadRequestError(f"{self.engine}: {_last_line(answer)}")

    def _run(self, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(words, check=False, stdin=subprocess.DEVNULL, text=True, errors="replace", **options)
        except FileNotFoundError:
            raise MissingInputError(f"{words[0]} is not installed: `apt-get install podman` brings an engine") from None
        except subprocess.TimeoutExpired as error:
            raise BucketAwayError(f"{words[0]} did not answer within {error.timeout:g} s: see to it") from None


def _container_status(found: dict[str, Any]) -> JobStatus:
    """From an inspection, which podman and docker agree on as far as it is used here."""
    state, labels = found["State"], found["Config"]["Labels"] or {}
    said, code = str(state["Status"]).lower(), int(state["ExitCode"])
    started = str(state.get("StartedAt", "")).startswith("2")
    # Nanoseconds are more than datetime reads.
    name, created = found["Name"].removeprefix("/"), utc_text(re.sub(r"\.\d+", "", found["Created"]))
    bucket = labels.get(BUCKET_LABEL, "")
    status = JobStatus(name, State.RUNNING, attempts=int(started), created=created, bucket=bucket)
    # One that cannot be started stays as it was made.
    if said not in _OVER and (started or not state.get("Error")):
        return status
    if not started:
        return replace(status, state=State.FAILED, message=state.get("Error") or "it did not start")
    message, how = state.get("Error") or meaning(code), State.of_code(code)
    if state.get("OOMKilled"):
        message = "killed by the kernel: memory ran out; `memory:` of the target is the limit"
    return replace(status, state=how, message="" if how is State.FINISHED else message, exit_code=code)


def _last_line(asked: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in asked.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else f"it ended with {asked.returncode}"

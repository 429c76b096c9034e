"""`--on container`: the words of a person, podman and the real image, from the first image to the last checkpoint."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from job.coordination.outcome import read_outcome
from job.exits import State
from job.jobs.backends.container import ContainerTarget
from job.jobs.targets import load_targets
from job.store import open_store
from tests.containers.conftest import BASE_IMAGE, IMAGE, inspected, podman, torch_wheels
from tests.containers.runs import IMAGES, assert_equal, images_saved, training
from tests.job.command_line import DDPM, ddpm, environment, refused, succeeded
from tests.job.jobs.submitting import told
from tests.job.launching import ended, eventually

pytestmark = pytest.mark.containers
HERE = ("--on", "container")
PIPES = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def backend() -> ContainerTarget:
    target = load_targets()["container"]
    assert isinstance(target, ContainerTarget)
    return target


def submit(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return ddpm("submit", *words, *HERE, **variables)


def test_containers_pack_and_train(place):
    bucket = place.parent / "new-bucket"
    out = succeeded(submit("pack", "landscape-sample", "tiles", "--size", 16, "--bucket", bucket))
    assert "299 colour, 16×16 pixels" in out
    # A folder of this machine is seen in the container, too.
    photos = place.parent / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(photos / f"{number}.png")
    assert "3 colour, 8×8 pixels" in succeeded(submit("pack", photos, "mine", "--size", 8, "--bucket", bucket))
    out = succeeded(submit(*training("first", bucket, epochs=1)))
    assert "Run 'first' is finished: 1 epoch, 312 images seen." in out
    # Where the container says that page and samples lie, they lie for whoever submitted it, too.
    outputs = [Path(line.split()[-1]) for line in out.splitlines() if line.startswith(("page ", "samples "))]
    assert len(outputs) == 2
    assert all(output.stat().st_uid == bucket.stat().st_uid for output in outputs)
    assert told(backend(), "train-first").state is State.FINISHED
    # It says so itself, in the bucket.
    outcome = read_outcome("train-first", str(bucket))
    assert outcome is not None
    assert (outcome.state, outcome.exit_code) == ("finished", 0)
    assert "is finished already" in succeeded(submit(*training("first", bucket, epochs=1)))
    # A dataset that the bucket does not have is found by the program in the container.
    assert "nowhere" in refused(submit("train", "--dataset", "nowhere", "--bucket", bucket), 66)
    assert inspected("train-nowhere")["State"]["ExitCode"] == 66
    assert told(backend(), "train-nowhere").state is State.FAILED


def test_stopped_runs_have_undisturbed_weights(place):
    run, other = (open_store(str(place)).sub(f"runs/{name}") for name in ("stopped", "undisturbed"))
    words = [DDPM, "submit", *training("stopped", place), *HERE]
    seen = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        child = subprocess.Popen(words, env=environment(), **PIPES)
        eventually(lambda: child.poll() is not None or images_saved(run) > seen, 400)  # noqa: B023
        child.send_signal(number)
        code, _, err = ended(child, 400)
        assert code == 75, err
        assert "everything is saved, and the same command goes on from there" in err
        assert told(backend(), "train-stopped").state is State.STOPPED
        earlier, seen = seen, images_saved(run)
        assert seen > earlier and seen % IMAGES, "stopped between two ends of epochs"
    for name in ("stopped", "undisturbed"):
        succeeded(submit(*training(name, place)))
    assert_equal(run, other)


def test_background_containers_are_confined_listed_and_cancelled(place):
    words = (*training("behind", place, 10_000), "--detach")
    assert "ddpm jobs logs train-behind --on container -f" in succeeded(submit(*words))
    assert "train-behind runs in a container already" in refused(submit(*words), 64)
    eventually(lambda: images_saved(open_store(str(place)).sub("runs/behind")), 400)
    status = told(backend(), "train-behind")
    assert (status.state, status.attempts) == (State.RUNNING, 1)
    assert "train-behind" in succeeded(ddpm("jobs", "list", *HERE))

    found = inspected("train-behind")
    assert found["HostConfig"]["ReadonlyRootfs"] and found["HostConfig"]["ShmSize"] == 2 << 30
    assert not found["EffectiveCaps"]
    assert {mount["Destination"] for mount in found["Mounts"]} == {str(place), "/scratch"}
    script = "touch /x; touch /opt/ddpm/x; touch /tmp/x /scratch/x && echo wrote"
    done = podman("exec", "train-behind", "sh", "-c", script, check=False)
    assert done.stdout == "wrote\n"
    assert done.stderr.count("Read-only file system") == 2

    with subprocess.Popen([DDPM, "jobs", "logs", "train-behind", *HERE, "-f"], env=environment(), **PIPES) as follower:
        succeeded(ddpm("jobs", "cancel", "train-behind", *HERE))
        code, out, err = ended(follower, 400)
    assert (code, err) == (0, "")
    assert "everything is saved" in out
    status = told(backend(), "train-behind")
    assert (status.state, status.exit_code, status.bucket) == (State.STOPPED, 75, str(place))
    backend().cancel("train-behind")
    assert told(backend(), "train-behind").state is State.GONE
    assert "66" not in str(refused(ddpm("jobs", "logs", "train-behind", *HERE), 66))


def test_missing_images_are_built(place):
    own = "localhost/ddpm-test-built:latest"
    Path("targets.yaml").write_text(f"container: {{image: '{own}'}}\n")
    check = next(check for check in backend().checks("") if not check.passed)
    assert (check.name, check.remedy) == ("image", "submitting a job builds or pulls it")
    done = submit(*training("built", place, epochs=1), BASE_IMAGE=BASE_IMAGE, **torch_wheels())
    podman("image", "rm", "--force", own)
    assert "Run 'built' is finished" in succeeded(done)
    assert f"building {own} from " in done.stderr


def test_the_doctor_looks_into_the_container(place):
    out = succeeded(ddpm("doctor", *HERE, "--bucket", place))
    assert not [line for line in out.splitlines() if not line.startswith("ok ")]
    assert f"image                     {IMAGE}" in out
    assert "2,048 MiB in /dev/shm" in out
    assert "2 processes by gloo" in out
    assert not (place / "doctor").exists()

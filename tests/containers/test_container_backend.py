"""`--on container`: the words of a person, podman and the real image, from the first image to the last checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from PIL import Image

from job.coordination.outcome import read_outcome
from job.exits import State
from job.jobs.backends.container import ContainerTarget
from job.jobs.targets import load_targets
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.store import open_store
from tests.containers.podman import BASE_IMAGE, IMAGE, inspected, podman, torch_wheels
from tests.containers.runs import IMAGES, assert_equal, training
from tests.job.command_line import DDPM, ddpm, environment, refused, succeeded
from tests.job.jobs.submitting import told
from tests.job.launching import ended, eventually

HERE = ("--on", "container")


def backend() -> ContainerTarget:
    target = load_targets()["container"]
    assert isinstance(target, ContainerTarget)
    return target


def test_containers_pack_and_train(place):
    bucket = place.parent / "new-bucket"
    out = succeeded(ddpm("submit", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", bucket, *HERE))
    assert "299 colour, 16×16 pixels" in out
    # A folder of this machine is seen in the container, too.
    photos = place.parent / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(photos / f"{number}.png")
    out = succeeded(ddpm("submit", "pack", photos, "mine", "--size", 8, "--bucket", bucket, *HERE))
    assert "3 colour, 8×8 pixels" in out
    out = succeeded(ddpm("submit", *training("first", bucket, epochs=1), *HERE))
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
    assert "is finished already" in succeeded(ddpm("submit", *training("first", bucket, epochs=1), *HERE))


def test_stopped_runs_have_undisturbed_weights(place):
    run, other = (open_store(str(place)).sub(f"runs/{name}") for name in ("stopped", "undisturbed"))
    words = [DDPM, "submit", *training("stopped", place), *HERE]
    seen = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        child = subprocess.Popen(words, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: child.poll() is not None or _images_seen(run) > seen, 120)  # noqa: B023
        child.send_signal(number)
        code, _, err = ended(child, 60)
        assert code == 75, err
        assert "everything is saved, and the same command goes on from there" in err
        assert told(backend(), "train-stopped").state is State.STOPPED
        earlier, seen = seen, load_manifest(run, max(list_checkpoints(run))).images_seen
        assert seen > earlier and seen % IMAGES, "stopped between two ends of epochs"
    succeeded(ddpm("submit", *training("stopped", place), *HERE))
    succeeded(ddpm("submit", *training("undisturbed", place), *HERE))
    assert_equal(run, other)


def _images_seen(run):
    refs = list_checkpoints(run) if run.exists("config.yaml") else []
    return max(refs).images_seen if refs else 0


def test_background_containers_are_listed_and_cancelled(place):
    run = open_store(str(place)).sub("runs/behind")
    out = succeeded(ddpm("submit", *training("behind", place, 10_000), *HERE, "--detach"))
    assert "ddpm jobs logs train-behind --on container -f" in out
    said = refused(ddpm("submit", *training("behind", place, 10_000), *HERE, "--detach"), 64)
    assert "train-behind runs in a container already" in said
    eventually(lambda: _images_seen(run), 120)
    status = told(backend(), "train-behind")
    assert (status.state, status.attempts) == (State.RUNNING, 1)
    assert "train-behind" in succeeded(ddpm("jobs", "list", *HERE))
    words = [DDPM, "jobs", "logs", "train-behind", *HERE, "-f"]
    with subprocess.Popen(
        words, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as follower:
        succeeded(ddpm("jobs", "cancel", "train-behind", *HERE))
        code, out, err = ended(follower, 60)
    assert (code, err) == (0, "")
    assert "everything is saved" in out
    status = told(backend(), "train-behind")
    assert (status.state, status.exit_code) == (State.STOPPED, 75)
    assert told(backend(), "train-behind").bucket == str(place)
    backend().cancel("train-behind")
    assert told(backend(), "train-behind").state is State.GONE
    assert "66" not in str(refused(ddpm("jobs", "logs", "train-behind", *HERE), 66))


def test_the_container_is_confined(place):
    succeeded(ddpm("submit", *training("confined", place, 10_000), *HERE, "--detach"))
    (found,) = json.loads(podman("container", "inspect", "train-confined").stdout)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["ShmSize"] == 2 << 30
    assert not found["EffectiveCaps"]
    mounts = {mount["Destination"]: mount for mount in found["Mounts"]}
    assert mounts.keys() == {str(place), "/scratch"}
    script = "touch /x; touch /opt/ddpm/x; touch /tmp/x /scratch/x && echo wrote"
    done = podman("exec", "train-confined", "sh", "-c", script, check=False)
    assert done.stdout == "wrote\n"
    assert done.stderr.count("Read-only file system") == 2
    podman("rm", "--force", "--time", "0", "train-confined")


def test_errors_inside_have_their_code(place):
    """A dataset that the bucket does not have is found by the program in the container."""
    done = ddpm("submit", "train", "--dataset", "nowhere", "--bucket", place, *HERE)
    assert "nowhere" in refused(done, 66)
    assert inspected("train-nowhere")["ExitCode"] == 66
    assert told(backend(), "train-nowhere").state is State.FAILED


def test_missing_images_are_built(place):
    own = "localhost/ddpm-test-built:latest"
    Path("targets.yaml").write_text(f"container: {{image: '{own}'}}\n")
    check = next(check for check in backend().checks("") if not check.passed)
    assert (check.name, check.remedy) == ("image", "submitting a job builds or pulls it")
    wheels = {"TORCH_WHEELS": torch_wheels()} if torch_wheels() else {}
    done = ddpm("submit", *training("built", place, epochs=1), *HERE, BASE_IMAGE=BASE_IMAGE, **wheels)
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

"""What the image is: the program as PID 1, for any user, on a root that cannot be written, and nothing secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from job.runs.checkpoints import list_checkpoints
from job.store import open_store
from tests.containers.podman import CHECKOUT, IMAGE, inspected, podman
from tests.containers.runs import training
from tests.job.launching import eventually

CONFINED = ("--read-only", "--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "ALL", "--network", "none")


@pytest.mark.parametrize("user", ["10001:10001", "4321:0"])
def test_program_works_for_any_user(user, tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    bucket.chmod(0o777)
    mount = f"type=bind,source={bucket},destination=/bucket"
    words = ("data", "pack", "landscape-sample", "tiles", "--size", "16", "--bucket", "/bucket")
    done = podman("run", "--rm", *CONFINED, "--user", user, "--mount", mount, IMAGE, *words)
    assert "299 colour, 16×16 pixels" in done.stdout
    assert (bucket / "datasets/tiles-16/index.json").stat().st_uid == int(user.partition(":")[0])


def test_own_user_can_write_nothing():
    script = """
        id -u
        for f in / /opt/ddpm /etc /usr/local /home /root; do touch $f/x 2>/dev/null && echo wrote $f; done
        echo $TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR $HOME
        include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
        printf '#include <Python.h>\\nint f(void) {return 7;}' | gcc -shared -fPIC -x c - -o /tmp/x.so -I $include
        python -c 'import ctypes; print(ctypes.CDLL("/tmp/x.so").f())'
    """
    done = podman("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", script)
    assert done.stdout.splitlines() == ["10001", "/tmp/torchinductor /tmp/triton /tmp", "7"]


def test_image_is_labelled():
    (found,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    config = found["Config"]
    assert (config["Entrypoint"], config["User"]) == (["/opt/ddpm/bin/ddpm"], "10001:10001")
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert len(labels["org.opencontainers.image.revision"]) >= 7
    assert {"NVIDIA_DRIVER_CAPABILITIES=compute,utility", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false"} <= {*config["Env"]}
    assert any(word.startswith("LD_LIBRARY_PATH=/usr/local/nvidia/lib64") for word in config["Env"])


def test_image_has_the_program_alone():
    places = "/opt /run /srv /tmp /scratch /home /var/cache/apt /var/lib/apt/lists"
    script = f"find {places} -xdev -type f -size +0 ! -path '/opt/ddpm/*' ! -name lock; find /root -name .cache"
    done = podman("run", "--rm", "--user", "0", "--entrypoint", "sh", IMAGE, "-c", script)
    assert done.stdout.split() == []
    # The build's context: what is not named there stays outside.
    assert (CHECKOUT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_image_is_as_large_as_its_page_says():
    """By layer, so that what grew has a name; the base is that of the tests."""
    page = (CHECKOUT / "docs/container.md").read_text()
    (told_gigabytes,) = re.findall(r"The CPU image is ([0-9.]+) GB", page)
    told = {layer: float(megabytes) for layer, megabytes in re.findall(r"^\| (.+) \| (\d+) \|$", page, re.MULTILINE)}
    history = json.loads(podman("history", "--format", "json", IMAGE).stdout)
    sizes = [layer["size"] / 1e6 for layer in reversed(history) if layer["size"]]
    # The program comes as a wheel, which the next layer removes.
    found = dict(zip(told, [*sizes[:4], sum(sizes[4:])], strict=True))
    grown = {
        layer: f"{found[layer]:.0f} MB" for layer in told if abs(found[layer] - told[layer]) > 3 + 0.03 * told[layer]
    }
    assert not grown, f"docs/container.md tells another size of these layers: {grown}"
    (image,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    assert abs(image["Size"] / 1e9 - float(told_gigabytes)) < 0.02, f"the image has {image['Size'] / 1e9:.2f} GB"


def test_image_has_this_checkouts_program():
    script = "cd /opt/ddpm/lib/python3*/site-packages && find ddpm job -type f ! -name '*.pyc' -exec sha256sum {} +"
    found = podman("run", "--rm", "--entrypoint", "sh", IMAGE, "-c", script).stdout.splitlines()
    named = subprocess.run(["git", "ls-files", "ddpm", "job"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    files = named.stdout.split()
    assert sorted(found) == sorted(f"{sha256((CHECKOUT / name).read_bytes()).hexdigest()}  {name}" for name in files)


def test_launcher_is_pid_1(packed):
    mount = f"type=bind,source={packed},destination=/bucket"
    run = open_store(str(packed)).sub("runs/signalled")
    name, user = "pid-1", f"{os.getuid()}:{os.getgid()}"
    words = training("signalled", "/bucket", 10_000)
    podman("run", "--detach", "--name", name, *CONFINED, "--user", user, "--mount", mount, IMAGE, *words)
    pid = inspected(name)["Pid"]
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:3] == [b"/opt/ddpm/bin/ddpm", b"train"]
    ranks = Path(f"/proc/{pid}/task/{pid}/children")
    eventually(lambda: ranks.read_text().split() and run.exists("config.yaml") and list_checkpoints(run), 120)
    # A child whose parent ends at once becomes PID 1's, and is gone when it ends.
    before = set(ranks.read_text().split())
    podman("exec", name, "sh", "-c", "sleep 1 & exit 0")
    assert set(ranks.read_text().split()) > before
    eventually(lambda: set(ranks.read_text().split()) == before)
    podman("stop", "--time", "60", name)
    state = inspected(name)
    assert (state["ExitCode"], state["OOMKilled"]) == (75, False)
    assert "everything is saved" in podman("logs", name).stderr
    podman("rm", name)

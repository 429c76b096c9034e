"""What the image is: the program as PID 1, for any user, on a root that cannot be written, and nothing secret."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path

import pytest

from job.store import open_store
from tests.containers.conftest import CHECKOUT, IMAGE, in_image, inspected, podman
from tests.containers.runs import images_saved, training
from tests.infra.recorded import git
from tests.job.launching import eventually

pytestmark = pytest.mark.containers
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
    assert in_image(script).splitlines() == ["10001", "/tmp/torchinductor /tmp/triton /tmp", "7"]


def test_image_is_labelled_and_as_large_as_its_page_says():
    """By layer, so that what grew has a name; the base is that of the tests."""
    image = inspected(IMAGE, "image")
    config, labels = image["Config"], image["Config"]["Labels"]
    assert (config["Entrypoint"], config["User"]) == (["/opt/ddpm/bin/ddpm"], "10001:10001")
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert len(labels["org.opencontainers.image.revision"]) >= 7
    assert {"NVIDIA_DRIVER_CAPABILITIES=compute,utility", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false"} <= {*config["Env"]}
    assert any(word.startswith("LD_LIBRARY_PATH=/usr/local/nvidia/lib64") for word in config["Env"])
    page = (CHECKOUT / "docs/container.md").read_text()
    (told_gigabytes,) = re.findall(r"The CPU image is ([0-9.]+) GB", page)
    told = {layer: float(megabytes) for layer, megabytes in re.findall(r"^\| (.+) \| (\d+) \|$", page, re.MULTILINE)}
    history = json.loads(podman("history", "--format", "json", IMAGE).stdout)
    sizes = [layer["size"] / 1e6 for layer in reversed(history) if layer["size"]]
    # The program comes as a wheel, which the next layer removes.
    found = dict(zip(told, [*sizes[:4], sum(sizes[4:])], strict=True))
    grown = {
        layer: f"{size:.0f} MB" for layer, size in found.items() if abs(size - told[layer]) > 3 + 0.03 * told[layer]
    }
    assert not grown, f"docs/container.md tells another size of these layers: {grown}"
    assert abs(image["Size"] / 1e9 - float(told_gigabytes)) < 0.02, f"the image has {image['Size'] / 1e9:.2f} GB"


def test_image_has_this_checkouts_program_alone():
    places = "/opt /run /srv /tmp /scratch /home /var/cache/apt /var/lib/apt/lists"
    script = f"find {places} -xdev -type f -size +0 ! -path '/opt/ddpm/*' ! -name lock; find /root -name .cache"
    assert in_image(script, "--user", "0").split() == []
    # The build's context: what is not named there stays outside.
    assert (CHECKOUT / ".dockerignore").read_text().splitlines()[1] == "*"
    script = "cd /opt/ddpm/lib/python3*/site-packages && find ddpm job -type f ! -name '*.pyc' -exec sha256sum {} +"
    files = git(CHECKOUT, "ls-files", "ddpm", "job").split()
    hashes = [f"{sha256((CHECKOUT / name).read_bytes()).hexdigest()}  {name}" for name in files]
    assert sorted(in_image(script).splitlines()) == sorted(hashes)


def test_launcher_is_pid_1(packed):
    mount = f"type=bind,source={packed},destination=/bucket"
    run = open_store(str(packed)).sub("runs/signalled")
    name, user = "pid-1", f"{os.getuid()}:{os.getgid()}"
    words = training("signalled", "/bucket", 10_000)
    podman("run", "--detach", "--name", name, *CONFINED, "--user", user, "--mount", mount, IMAGE, *words)
    pid = inspected(name)["State"]["Pid"]
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:3] == [b"/opt/ddpm/bin/ddpm", b"train"]
    ranks = Path(f"/proc/{pid}/task/{pid}/children")
    eventually(lambda: ranks.read_text().split() and images_saved(run), 400)
    # A child whose parent ends at once becomes PID 1's, and is gone when it ends.
    before = set(ranks.read_text().split())
    podman("exec", name, "sh", "-c", "sleep 3 & exit 0")
    assert set(ranks.read_text().split()) > before
    eventually(lambda: set(ranks.read_text().split()) == before)
    podman("stop", "--time", "120", name)
    state = inspected(name)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (75, False)
    assert "everything is saved" in podman("logs", name).stderr
    podman("rm", name)

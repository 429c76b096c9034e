"""A network of the user through the whole pipeline: its code comes from a command alone, never from the bucket."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import ddpm as method
import job
from ddpm.networks.adapter import GIVEN
from ddpm.objective import Condition
from job import own_code
from job.exits import Exit
from tests.job.command_line import ddpm, ddpm_here, ran, refused, refuses, settings, succeeded

CHECKOUT = Path(__file__).parents[2]
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, image_shape, num_classes, width=8, scale=0.5, names=("a", "b")):
        super().__init__()
        self.a = nn.Conv2d(image_shape[0], width, 3, padding=1)
        self.b = nn.Conv2d(width, image_shape[0], 3, padding=1)
        self.classes = nn.Embedding(num_classes, width)

    def forward(self, x, t, labels=None):
        return self.b(torch.relu(self.a(x) + self.classes(labels)[:, :, None, None] + t[:, None, None, None]))
"""


def small(**changes):
    """Settings of the tests' network without its own."""
    words = settings(**changes)
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if not pair[1].startswith("model.") for word in pair]


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(own_code, "_here", {})


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(NET)
    return tmp_path / "mynet.py"


@pytest.fixture
def bucket(tiles, tmp_path):
    return shutil.copytree(tiles, tmp_path / "bucket")


def class_in(file):
    spec = importlib.util.spec_from_file_location("mynet", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net


def test_its_way_from_training_to_an_export(bucket, file, monkeypatch):
    words, named = ("--dataset", "tiles", "--run", "own", "--bucket", bucket), ("--network", "mynet.py:Net")
    width = ("--set", "network.width=12")
    ran("train", *words, *named, *width, "--epochs", 1, *small(checkpoint__every_epochs=1))
    run = bucket / "runs/own"
    assert (run / "network.py").read_bytes() == file.read_bytes()
    assert "\n  flip: false\n" in (run / "config.yaml").read_text()
    # Later commands name the file again, and keep the settings.
    own_code._here.clear()
    again = ("train", *words, "--epochs", 2)
    refuses([(again, Exit.BAD_REQUEST, "no code from a bucket is executed: add --network mynet.py:Net")])
    ran("train", *words, *named, "--epochs", 2)
    other = (*again, *named, "--set", "network.width=8")
    refuses([(other, Exit.BAD_CONFIG, "network.width: the run has 12, asked for 8")])
    ran("sample", "--run", "own", "--bucket", bucket, *named, "--seeds", "0-3")
    ran("replay", "own", "--image", 600, "--verify", "--bucket", bucket, *named)
    ran("train", *words[:3], "child", *words[4:], *named, "--from", "own", "--epochs", 1, *small())
    assert (bucket / "runs/child/network.py").exists()
    page = (run / "report.html").read_text()
    assert ": Net of " in page and "network.width" in page
    assert "all as they were written" in ran("runs", "verify", "own", "--bucket", bucket)
    own_code._here.clear()
    (ours,) = job.load(str(run), network="mynet.py:Net").sample(1, seed=3, steps=4)
    exported = ran("export", "--run", "own", "--bucket", bucket, "--to", file.parent / "out")
    model = method.load(exported.partition("  ")[0], network=class_in(file))
    (theirs,) = model.sample(1, seed=3, steps=4)
    assert np.array_equal(ours, theirs)
    card = (file.parent / "out/README.md").read_text()
    assert "from network import Net" in card and "network=Net).sample(4)" in card
    with pytest.raises(ValueError, match=r"name its class, as in load\(folder, network=Net\)"):
        method.load(file.parent / "out")
    # Another file is not the run's network, and a changed one in the bucket is damage.
    own_code._here.clear()
    file.write_text(NET.replace("torch.relu", "torch.tanh"))
    said, sample = "is not the network that the run began with (-        return self.b(torch.relu(", ("sample", "--run")
    refuses([((*sample, "own", "--bucket", bucket, *named), Exit.BAD_CONFIG, said)])
    (run / "network.py").write_text("raise SystemExit")
    problem = ddpm_here("runs", "verify", "own", "--bucket", bucket)
    assert problem.returncode == Exit.BAD_DATA and "runs/own/network.py is corrupt" in problem.stdout
    refused(ddpm_here("export", "--run", "own", "--bucket", bucket, "--to", file.parent / "again"), Exit.BAD_DATA)


NAMED = "--network mynet.py:Net"
REFUSALS = [
    ((), "--network mynet.py:Nett", 64, "has no class 'Nett'; did you mean 'Net'?"),
    ((), "--network mynet.py", 64, "use mynet.py:MyNet, or package.module:Class"),
    ((), "--network other.py:Net", 66, "--network other.py: No such file"),
    ((), "--network nothing_such:Net", 66, "no such module is installed"),
    ((), f"{NAMED} --set network.widht=3", 78, "no such argument; did you mean 'network.width'?"),
    ((), f"{NAMED} --set network.width=x", 78, "network.width='x': its default is 8"),
    ((), f"{NAMED} --set network.width=true", 78, "network.width=True: its default is 8"),
    ((), f"{NAMED} --set train.freeze=z", 78, "Net has no parameter that begins with 'z'"),
    ((), f"{NAMED} --set diffusion.self_conditioning=true", 78, "takes no x_start: add x_start=None"),
    ((), f"{NAMED} --set condition.derive=grey", 78, "takes no image: add image=None"),
    ((), "--set network.width=3", 78, "name it by --network FILE:CLASS"),
    ((), "--set model.kind=own", 78, "name it by --network FILE.py:CLASS"),
    (("width=8", "width"), NAMED, 64, "width of Net.__init__ is a setting of the run"),
    (("def forward", "def ahead"), NAMED, 64, "needs a method forward of its own"),
    (("class Net(", "class Net(("), NAMED, 64, "SyntaxError"),
    (("super().__init__()", "raise KeyError(3)"), NAMED, 64, "KeyError: 3; see"),
    (("return self.b", "return self.a"), NAMED, 64, "mynet.py, line 13"),
    (("torch.relu(", "torch.relu(torch.rand(1) * "), NAMED, 64, "draws random numbers"),
    (("torch.relu(", "torch.relu(__import__('random').random() * "), NAMED, 64, "draws random numbers"),
    (("super().__init__()", "super().__init__(); self.register_buffer('w', torch.rand(2))"), NAMED, 64,
     "Net draws the buffer w at random, and checkpoints have no buffers"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words", "code", "said"), REFUSALS)
def test_refusals(bucket, file, change, words, code, said):
    file.write_text(NET.replace(*change) if change else NET)
    at = ("--dataset", "tiles", "--run", "own", "--bucket", bucket, "--epochs", 1)
    refuses([(("train", *at, *small(), *words.split()), code, said)])
    assert not (bucket / "runs/own/config.yaml").exists()


def test_the_names_of_inputs_are_those_of_the_method():
    """The command line knows them without PyTorch."""
    assert (GIVEN, Condition._fields) == (own_code._GIVEN, own_code._INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_networks_of_the_page_train(bucket, file, number):
    text = re.findall("```python\n(.*?)```", (CHECKOUT / "docs/own-network.md").read_text(), re.DOTALL)[number]
    file.write_text(text)
    name = re.search(r"class (\w+)", text)[1]
    words = ("--dataset", "tiles", "--run", "own", "--bucket", bucket, "--network", f"mynet.py:{name}", "--epochs", 1)
    ran("train", *words, *small(checkpoint__every_epochs=1))
    assert len(job.load(f"{bucket}/runs/own", network=f"mynet.py:{name}").sample(2, steps=2)) == 2


def test_a_job_executes_the_file_that_its_words_name(bucket, file):
    words = ("train", "--dataset", "tiles", "--run", "own", "--bucket", bucket, "--epochs", 1, *small())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    submitted = ("submit", *words, "--network", "mynet.py:Net")
    assert f"mynet.py:Net@{sha256}" in ran(*submitted, "--dry-run")
    assert not (bucket / "networks").exists()
    succeeded(ddpm(*submitted))
    assert (bucket / f"networks/{sha256}.py").read_bytes() == file.read_bytes()
    # The job takes the file that was submitted, not what lies there now.
    file.write_text("raise SystemExit")
    again = ("train", *words[1 : -len(small())], "--network", f"mynet.py:Net@{sha256}")
    assert "is finished already" in ran(*again)
    own_code._here.clear()
    (bucket / f"networks/{sha256}.py").write_text("raise SystemExit")
    refuses([(again, Exit.BAD_DATA, "has another hash than its name: delete it, and submit the job again")])

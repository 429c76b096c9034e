"""The pipeline as functions: what a script, a notebook and a loop of processes get from it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import job
from job.exits import BadConfigError, BadRequestError, MissingInputError
from tests.job.command_line import NETWORK, environment
from tests.job.launching import eventually
from tests.job.some_images import folder_of, png

SET = {key: value for key, value in NETWORK.items() if key != "sample.every_epochs"}


@pytest.fixture
def bucket(tiles, tmp_path):
    return str(shutil.copytree(tiles, tmp_path / "bucket"))


def test_a_run_from_training_to_images(bucket, tmp_path, capfd):
    run = job.train("tiles", bucket=bucket, run="mine", epochs=1, set=SET)
    assert (run.name, run.uri, run.page) == ("mine", f"{bucket}/runs/mine", f"{bucket}/runs/mine/report.html")
    assert run.checkpoints() == [312] and run.metrics()[-1]["images_seen"] == 288
    assert job.train("tiles", bucket=bucket, run="mine").checkpoints() == [312]
    assert capfd.readouterr().out == ""
    one, two = run.sample(2, seed=7, classes="coast", steps=3)
    assert one.size == (16, 16) and one != two
    (picture,) = job.sample("mine", bucket=bucket, seeds="0-3", steps=3)
    assert picture.startswith(run.uri) and Path(picture).exists()
    assert Path(run.export(tmp_path / "out"), "README.md").exists()
    images = [(f"{number}.png", png(number)) for number in range(4)]
    assert "others-16" in job.pack(folder_of(tmp_path / "source", images), "others", size=16, bucket=bucket)
    assert "mine" in job.submit("sample", run="mine", bucket=bucket, seeds=[0, 1], steps=3, on="local", dry_run=True)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda bucket: job.train("nothing", bucket=bucket), MissingInputError, "dataset 'nothing' is not in"),
        (lambda bucket: job.train("tiles", bucket=bucket, epoch=1), BadRequestError, "did you mean 'epochs'?"),
        (lambda bucket: job.train("tiles", bucket=bucket, set={"train.batch": 1}), BadConfigError, "unknown key"),
        (lambda bucket: job.sample("tiles", bucket=bucket, sampler="dd"), BadRequestError, "--sampler 'dd'"),
        (lambda bucket: job.export("tiles"), BadRequestError, "give either --to FOLDER or --push"),
        (lambda bucket: job.submit("prune"), BadRequestError, "use train, sample"),
        (lambda bucket: job.Run("tiles", network=str), BadRequestError, "network=str: put the class into a file"),
    ],
)  # fmt: skip
def test_errors_are_exceptions_with_the_message_alone(bucket, call, kind, said, capfd):
    with pytest.raises(kind, match=said.replace("?", "[?]")):
        call(bucket)
    assert "ddpm: " not in capfd.readouterr().err


SCRIPT = """
import sys
import job
try:
    job.train("tiles", bucket=sys.argv[1], run="long", epochs=1000, set={set})
except job.exits.StoppedError as stopped:
    print(stopped)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_of_the_program_saves(bucket, tmp_path, number):
    script = tmp_path / "script.py"
    # Without a guard for `__main__`: the work has processes of its own.
    script.write_text(SCRIPT.format(set=SET))
    with subprocess.Popen(
        [sys.executable, script, bucket], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        run = job.Run("long", bucket)
        eventually(lambda: "beginning, image 0" in child.stderr.readline())
        eventually(lambda: Path(run.uri, "status.json").exists())
        child.send_signal(number)
        said = child.stdout.read()
    assert child.returncode == (-number if number == signal.SIGKILL else 3)
    assert number == signal.SIGKILL or f"stopped by {number.name} after" in said
    eventually(run.checkpoints)

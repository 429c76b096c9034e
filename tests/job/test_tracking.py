"""What services are told of a run: TensorBoard, and in their offline modes Weights & Biases and MLflow."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from job.config import draft
from job.exits import BadRequestError, Exit
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.runs.records import run_store
from job.store import open_store
from job.training.tracking import Tracking, check_tracker
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded

WORDS = ("--dataset", "tiles", "--run", "told")


def rows_of(bucket):
    run = run_store(open_store(str(bucket)), "told")
    return read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)


@pytest.fixture
def bucket(tiles, tmp_path):
    return shutil.copytree(tiles, tmp_path / "bucket")


def events_of(folder):
    """The summaries that TensorBoard shows of a folder, by tag: it forgets what lies behind the start of a session."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = {tag: [one for one in shown if one[0] < event.step] for tag, shown in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    return found


def logged(data):
    """The records of a file of Weights & Biases: LevelDB's log format, behind seven bytes of its own."""
    place, record = 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole ones, and the last parts of others.
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_tensorboard_has_grids_and_hyper_parameters(bucket, tmp_path):
    more = ("--epochs", 2, "--bucket", bucket, *settings(sample__every_epochs="1"))
    succeeded(ddpm_here("train", *WORDS, *more))
    events = events_of(bucket / "runs/told/tensorboard")
    assert [step for step, _ in events["loss"]] == [row["images_seen"] for row in rows_of(bucket) if "loss" in row]
    ((_, started),) = events["_hparams_/session_start_info"]
    assert b"train.learning_rate" in started.metadata.plugin_data.content
    grids = events_of(bucket / "runs/told/tensorboard/samples")["samples"]
    assert [step for step, _ in grids] == [312, 600]
    (tmp_path / "grid.png").write_bytes(grids[-1][1].image.encoded_image_string)
    kept = bucket / "runs/told/samples/epoch-0002-ddim-4.png"
    shown, drawn = (np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "grid.png", kept))
    assert np.array_equal(shown, drawn)
    assert "all as they were written" in succeeded(ddpm_here("runs", "verify", "told", "--bucket", bucket))


@pytest.mark.slow
def test_wandb_gets_the_rows_of_attempts(bucket, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    at = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb")}
    (tmp_path / "wandb").mkdir()
    words = ("train", *WORDS, "--bucket", bucket, "--tracker", "wandb", *settings())
    done = ddpm(*words, "--epochs", 1, **at)
    succeeded(done)
    assert "the rows of the metrics also go to wandb, which is outside of the bucket" in done.stderr
    succeeded(ddpm("train", *WORDS, "--bucket", bucket, "--epochs", 2, **at))
    told, ids = [], set()
    for path in sorted((tmp_path / "wandb").glob("wandb/offline-run-*/run-*.wandb")):
        for data in logged(path.read_bytes()):
            record = Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            told += [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}]
    rows = [row for row in told if "loss" in row]
    assert len(ids) == 1
    assert len([*(tmp_path / "wandb").rglob("media/images/samples_*.png")]) == 2
    assert [(row["_step"], row["loss"]) for row in rows] == [
        (row["images_seen"], row["loss"]) for row in rows_of(bucket)
    ]


@pytest.mark.slow
def test_mlflow_gets_the_rows_of_attempts(bucket, tmp_path):
    at = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    words = ("train", *WORDS, "--bucket", bucket, "--tracker", "mlflow", *settings())
    succeeded(ddpm(*words, "--epochs", 1, **at))
    succeeded(ddpm("train", *WORDS, "--bucket", bucket, "--epochs", 2, **at))
    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    told = [line.split() for line in losses.read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in told] == [
        (row["images_seen"], row["loss"]) for row in rows_of(bucket)
    ]
    assert len([*(tmp_path / "mlruns").glob("*/*/artifacts/images/samples*.png")]) == 2
    assert next((tmp_path / "mlruns").glob("*/*/params/train.batch_size")).read_text() == "24"


def test_a_missing_tracker_begins_nothing(bucket, tmp_path, monkeypatch):
    words = ("train", *WORDS, "--bucket", bucket, *settings(), "--epochs", 1, "--tracker")
    assert "log.tracker" in refused(ddpm_here(*words, "comet"), Exit.BAD_CONFIG)
    done = ddpm(*words, "wandb", HOME=str(tmp_path), WANDB_MODE="online", NETRC=str(tmp_path / "none"))
    assert done.returncode == Exit.NO_PERMISSION
    assert "--tracker wandb: sign in with `wandb login`, or set WANDB_MODE=offline" in done.stderr
    assert not (bucket / "runs/told").exists()
    line = refused(ddpm(*words, "mlflow"), Exit.BAD_REQUEST)
    assert "--tracker mlflow: set MLFLOW_TRACKING_URI to the address of your server" in line
    assert not (bucket / "runs/told").exists()
    found, without = importlib.util.find_spec, {"mlflow": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: without[name] if name in without else found(name, *more)
    )
    with pytest.raises(BadRequestError, match=r"--tracker mlflow needs more than is installed: .*\[mlflow\]"):
        check_tracker("mlflow", is_asked_for=True)


def test_a_failing_tracker_stops_no_training(tmp_path, monkeypatch, capsys):
    """MLflow begins on a disk that is gone when the first row comes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = Tracking(draft("landscape-sample", {"log.tracker": "mlflow"}), "told", "gs://b/runs/told")
    tracking._pool.submit(int).result()
    shutil.rmtree(tmp_path / "mlruns")
    (tmp_path / "mlruns").write_text("in the way")
    for images_seen in (1, 2):
        tracking.log({"images_seen": images_seen, "loss": 0.5})
    tracking.close()
    assert capsys.readouterr().err.count("mlflow takes no rows, which stay in the bucket") == 1


@pytest.mark.slow
def test_a_silent_tracker_delays_no_training(bucket):
    """From its first second; a run that was told to use it goes on without, and stops at once."""
    at = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    words = ("train", *WORDS, "--bucket", bucket, *settings())
    began = time.monotonic()
    succeeded(ddpm(*words, "--epochs", 1, "--tracker", "mlflow", **at))
    assert time.monotonic() - began < 40
    # Nobody says where it is now, and then that there is to be none.
    done = ddpm(*words, "--epochs", 2)
    assert "going on without a tracker: --tracker mlflow: set MLFLOW_TRACKING_URI" in done.stderr
    succeeded(done)
    assert "without a tracker" not in ddpm(*words, "--epochs", 3, "--tracker", "none").stderr

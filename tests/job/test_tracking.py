"""What services are told of a run: TensorBoard, and in their offline modes Weights & Biases and MLflow."""

from __future__ import annotations

import importlib.util
import shutil
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.config import draft
from job.exits import BadRequestError, Exit
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.store import open_store
from job.training.tracking import Tracking, check_tracker
from tests.job.command_line import ddpm, ddpm_here, ran, settings, succeeded

Losses = list[tuple[int, float]]


@pytest.fixture
def bucket(tiles, tmp_path):
    return shutil.copytree(tiles, tmp_path / "bucket")


def words_of(bucket: Path, epochs: int, *more: object) -> tuple[object, ...]:
    return ("train", "--dataset", "tiles", "--run", "told", "--bucket", bucket, "--epochs", epochs, *settings(), *more)


def losses_of(bucket: Path) -> Losses:
    """What the bucket knows: the images seen and the loss of each row."""
    run = open_store(str(bucket)).sub("runs/told")
    rows = read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
    return [(row["images_seen"], row["loss"]) for row in rows if "loss" in row]


def events_of(folder: Path) -> dict[str, list]:
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


@pytest.mark.slow
def test_tensorboard_has_grids_and_hyper_parameters(bucket):
    ran(*words_of(bucket, 2, "--set", "sample.every_epochs=1"))
    run = bucket / "runs/told"
    events, grids = events_of(run / "tensorboard"), events_of(run / "tensorboard/samples")["samples"]
    assert [step for step, _ in events["loss"]] == [step for step, _ in losses_of(bucket)]
    ((_, started),) = events["_hparams_/session_start_info"]
    assert b"train.learning_rate" in started.metadata.plugin_data.content
    assert [step for step, _ in grids] == [312, 600]
    files = BytesIO(grids[-1][1].image.encoded_image_string), run / "samples/epoch-0002-ddim-4.png"
    shown, drawn = (np.asarray(Image.open(file).convert("RGB")) for file in files)
    assert np.array_equal(shown, drawn)
    assert "all as they were written" in ran("runs", "verify", "told", "--bucket", bucket)


def told_wandb(folder: Path) -> tuple[int, Losses]:
    """Of Weights & Biases: the grids, and the losses of its one run.

    Its files have LevelDB's log format, behind seven bytes of their own.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        while place < len(data):
            # No head of a part lies across the end of a block.
            place += 32768 - place % 32768 if 32768 - place % 32768 < 7 else 0
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            # Whole ones, and the last parts of others.
            if kind in (1, 4):
                records.append(Record.FromString(whole))
                whole = b""
    assert len({record.run.run_id for record in records} - {""}) == 1
    histories = [{(i.key or i.nested_key[0]): i.value_json for i in record.history.item} for record in records]
    losses = [(int(row["_step"]), float(row["loss"])) for row in histories if "loss" in row]
    return len([*folder.rglob("media/images/samples_*.png")]), losses


def told_mlflow(folder: Path) -> tuple[int, Losses]:
    """Of MLflow: the grids, and the losses of its one run."""
    (run,) = (path.parents[1] for path in folder.glob("*/*/metrics/loss"))
    assert (run / "params/train.batch_size").read_text() == "24"
    rows = [line.split() for line in (run / "metrics/loss").read_text().splitlines()]
    return len([*run.glob("artifacts/images/samples*.png")]), [(int(step), float(loss)) for _, loss, step in rows]


TOLD = {"wandb": told_wandb, "mlflow": told_mlflow}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TOLD)
def test_a_tracker_gets_the_rows_of_attempts(bucket, tmp_path, tracker):
    (folder := tmp_path / "tracker").mkdir()
    at = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    at |= {"MLFLOW_TRACKING_URI": folder.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    for epochs, *asked in ((1, "--tracker", tracker), (2,)):
        done = ddpm(*words_of(bucket, epochs, *asked), **at)
        succeeded(done)
        assert f"the rows of the metrics also go to {tracker}, which is outside of the bucket" in done.stderr
    assert TOLD[tracker](folder) == (2, losses_of(bucket))


def test_a_missing_tracker_begins_nothing(bucket, tmp_path, monkeypatch):
    nowhere = {"HOME": str(tmp_path), "WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}
    for run, tracker, variables, code, said in (
        (ddpm_here, "comet", {}, Exit.BAD_CONFIG, "log.tracker"),
        (ddpm, "wandb", nowhere, 77, "--tracker wandb: sign in with `wandb login`, or set WANDB_MODE=offline"),
        (ddpm, "mlflow", {}, 64, "--tracker mlflow: set MLFLOW_TRACKING_URI to the address of your server"),
    ):
        done = run(*words_of(bucket, 1, "--tracker", tracker), **variables)
        # The library of a service may say more.
        assert done.returncode == code and said in done.stderr, done.stderr
        assert not (bucket / "runs/told").exists()
    monkeypatch.setattr(importlib.util, "find_spec", {"mlflow": None}.get)
    with pytest.raises(BadRequestError, match=r"--tracker mlflow needs more than is installed: .*\[mlflow\]"):
        check_tracker("mlflow", is_asked_for=True)


def test_a_failing_tracker_stops_no_training(tmp_path, monkeypatch, capsys):
    """MLflow begins on a disk that is gone when the first row comes."""
    place = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = Tracking(draft("landscape-sample", {"log.tracker": "mlflow"}), "told", "gs://b/runs/told")
    tracking._pool.submit(int).result()
    shutil.rmtree(place)
    place.write_text("in the way")
    for images_seen in (1, 2):
        tracking.log({"images_seen": images_seen, "loss": 0.5})
    tracking.close()
    assert capsys.readouterr().err.count("mlflow takes no rows, which stay in the bucket") == 1


@pytest.mark.slow
def test_a_silent_tracker_delays_no_training(bucket, tmp_path):
    """From its first second; a run that was told to use it goes on without, and stops at once."""
    began = time.monotonic()
    succeeded(ddpm(*words_of(bucket, 1, "--tracker", "mlflow"), MLFLOW_TRACKING_URI="http://127.0.0.1:9"))
    assert time.monotonic() - began < 40
    # Nobody says where it is now, and then that there is to be none.
    (here := tmp_path / "here").mkdir()
    done = ddpm(*words_of(bucket, 2), cwd=here)
    assert not list(here.iterdir()) and "also go to" not in done.stderr
    assert "going on without a tracker: --tracker mlflow: set MLFLOW_TRACKING_URI" in done.stderr
    succeeded(done)
    assert "without a tracker" not in ddpm(*words_of(bucket, 3, "--tracker", "none")).stderr

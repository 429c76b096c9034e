"""Whole runs of a small network on the embedded images: resuming, splitting, stopping, failing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from itertools import count

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm import randomness
from ddpm.training import prepare_images
from job.data.cache import open_cache
from job.data.order import Order
from job.data.pack import PackRequest, pack
from job.data.shards import load_index
from job.data.stream import stream_batches
from job.exits import BadConfigError, BadRequestError, Exit, NotANumberError, StoppedError
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints, load_manifest, opened
from job.runs.metrics import read_rows
from job.runs.records import read_status
from job.session import settings_of
from job.store import open_store
from job.train import run_training
from tests.job.stops import StopWhen

SMALL = (
    "model.channels=8",
    "model.channel_mults=1,2",
    "model.norm_groups=4",
    "model.attention_sizes=8",
    "train.precision=fp32",
    "train.batch_size=24",
    "train.warmup_images=480",
    "sample.images=4",
    "sample.steps=4",
    "checkpoint.every_minutes=60",
    "checkpoint.keep_last=99",
    "log.every_images=72",
)
GROUPS = ("model", "ema", "optimizer")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bucket with the embedded images at 16 pixels, and a cache folder of its own."""
    folder = tmp_path_factory.mktemp("train")
    source = resources.files("job") / "datasets" / "landscape-sample.zip"
    pack(open_store(str(folder)), PackRequest(str(source), "tiles", size=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture
def train(packed):
    """Trains in this process; `stop_after` steps ask it to stop."""

    def train(run, *sets, epochs=1, stop_after=None, preset="landscape-sample"):
        AcceleratorState._reset_state(reset_partial_state=True)
        steps = count()

        def is_enough() -> bool:
            # Whoever waits asks, too, as often as it happens to wait.
            after_a_step = sys._getframe(2).f_code.co_name == "_after_step"
            return stop_after is not None and after_a_step and next(steps) >= stop_after

        request = TrainRequest("tiles", str(packed), run=run, preset=preset, epochs=epochs, sets=(*SMALL, *sets))
        run_training(request.check(), StopWhen(is_enough))

    return train


def run_of(packed, name):
    return open_store(str(packed)).sub(f"runs/{name}")


def final_state(run):
    """All tensors of the newest checkpoint, and the metric rows without the clock."""
    ref = max(list_checkpoints(run))
    tensors = {}
    with opened(run, ref, GROUPS) as restored:
        from safetensors.torch import load_file

        for group, paths in restored.files.items():
            for path in paths:
                tensors |= {f"{group}.{name}": tensor for name, tensor in load_file(path).items()}
        rows = read_rows(run, restored.manifest.metric_segments)
    for row in rows:
        del row["time"], row["images_per_second"]
    return ref, tensors, rows


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(train, packed, dropout):
    name, extra = f"dropout-{int(dropout * 10)}", f"model.dropout={dropout}"
    train(f"{name}-a", extra, epochs=2)
    for stop_after in (5, 9):
        with pytest.raises(StoppedError) as caught:
            train(f"{name}-b", extra, epochs=2, stop_after=stop_after)
        assert caught.value.exit_code == Exit.STOPPED == 75
    train(f"{name}-b", extra, epochs=2)
    (ref_a, tensors_a, rows_a), (ref_b, tensors_b, rows_b) = (final_state(run_of(packed, f"{name}-{x}")) for x in "ab")
    assert ref_a.images_seen == ref_b.images_seen == 600
    assert (ref_a.fence, ref_b.fence) == (1, 3)
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    assert rows_a == rows_b
    assert [row["images_seen"] for row in rows_a] == list(range(72, 600, 72))
    assert all(np.isfinite(row["loss"]) for row in rows_a)


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_once(train, packed):
    train("long", epochs=2)
    train("grown", epochs=1)
    train("grown", epochs=2)
    (_, long, rows_long), (ref, grown, rows_grown) = (final_state(run_of(packed, n)) for n in ("long", "grown"))
    assert ref.images_seen == 600
    assert all(torch.equal(long[name], grown[name]) for name in long)
    assert rows_long == rows_grown
    attempt = json.loads(run_of(packed, "grown").read("attempts/000002.json").data)
    assert attempt["changes"] == {"train.epochs": 2}


def test_a_finished_run_leaves_everything_a_person_wants(train, packed):
    train("whole", "checkpoint.keep_last=1", "checkpoint.keep_epochs=1", epochs=2)
    run = run_of(packed, "whole")
    assert [load_manifest(run, ref).epoch for ref in list_checkpoints(run)] == [1, 2]
    keys = {entry.key for entry in run.list()}
    assert {
        "config.yaml",
        "status.json",
        "LATEST",
        "attempts/000001.json",
        "samples/epoch-0002-ddim-4.png",
        "samples/denoising-epoch-0002.gif",
        "figures/loss.png",
    } <= keys
    status = read_status(run)
    assert (status.state, status.images_seen, status.target_images) == ("finished", 600, 600)


def test_the_picture_of_an_epoch_at_whose_end_a_run_was_stopped_is_drawn_by_the_next_attempt(train, packed):
    run, every_epoch = (
        open_store(str(packed)).sub("runs/pictured"),
        ("sample.every_epochs=1", "checkpoint.every_epochs=1"),
    )
    with pytest.raises(StoppedError):
        train("pictured", *every_epoch, epochs=2, stop_after=12)
    assert [ref.images_seen for ref in list_checkpoints(run)] == [312]
    assert not run.exists("samples/epoch-0001-ddim-4.png")
    train("pictured", *every_epoch, epochs=2)
    assert run.exists("samples/epoch-0001-ddim-4.png")


def test_micro_batches_change_nothing_but_rounding(train, packed):
    train("one", epochs=1)
    train("five", "train.micro_batch_size=5", epochs=1)
    (_, one, rows_one), (_, five, rows_five) = (final_state(run_of(packed, name)) for name in ("one", "five"))
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(five[name], one[name], rtol=1e-3, atol=1e-5)
    assert [row["loss"] for row in rows_five] == pytest.approx([row["loss"] for row in rows_one], rel=1e-5)


def test_every_split_sees_the_same_images_and_noise_in_each_global_batch(packed):
    bucket = open_store(str(packed))
    index = load_index(bucket, "datasets/tiles-16")
    settings = settings_of(Configuration)

    def hashes(world_size, budget_bytes, micro):
        cache = open_cache(
            bucket,
            "datasets/tiles-16",
            index,
            cache_dir=packed / f"cache-{budget_bytes}",
            budget_bytes=budget_bytes,
        )
        order = Order(tuple(s.images for s in index.shards), 7, 0)
        batches = {}
        for rank in range(world_size):
            stream = stream_batches(
                cache, order, batch_size_images=10, first_image=20, last_image=700, rank=rank, world_size=world_size
            )
            for number, batch in enumerate(stream):
                for start in range(0, len(batch.image_numbers), micro):
                    part = slice(start, start + micro)
                    numbers = torch.from_numpy(batch.image_numbers[part])
                    x = prepare_images(batch.images[part], numbers, settings)
                    noise = randomness.training_noise(7, numbers, (3, 16, 16), "cpu")
                    timesteps = randomness.training_timesteps(7, numbers, 1000)
                    for i, n in enumerate(numbers.tolist()):
                        content = x[i].contiguous().numpy().tobytes() + noise[i].numpy().tobytes()
                        content += bytes(str((n, int(timesteps[i]), int(batch.labels[part][i]))), "ascii")
                        batches.setdefault(number, {})[n] = hashlib.sha256(content).hexdigest()
        return batches

    expected = hashes(1, 10**9, 10)
    assert len(expected) == 68
    assert all(len(batch) == 10 for batch in expected.values())
    assert hashes(2, 10**9, 3) == expected
    assert hashes(3, 10**9, 10) == expected
    assert hashes(3, 150_000, 2) == expected


class Configuration:
    """The few settings that `settings_of` reads, with flips on."""

    class train:
        batch_size, micro_batch_size, learning_rate, warmup_images, clip_norm, seed = 10, None, 1e-3, 0, 1.0, 7

    class ema:
        decay, warmup = 0.99, True

    class data:
        flip = True

    class model:
        dropout = 0.0


def test_a_run_whose_gradient_is_not_finite_stops_and_keeps_its_last_good_checkpoint(train, packed):
    explosive = ("train.learning_rate=1e30", "train.warmup_images=0", "checkpoint.every_minutes=1e-9")
    run = run_of(packed, "explodes")
    for _ in range(2):
        with pytest.raises(NotANumberError, match="not a finite number") as caught:
            train("explodes", *explosive)
        assert caught.value.exit_code == 70
        assert [ref.images_seen for ref in list_checkpoints(run)] == [24]
        assert read_status(run).state == "failed"
    good = list_checkpoints(run)
    with opened(run, good[0], ("model",)) as restored:
        assert restored.manifest.images_seen == 24


def test_a_run_refuses_another_configuration(train, packed):
    train("fixed", epochs=1)
    with pytest.raises(BadConfigError, match=r"train\.seed: the run has 0, asked for 1"):
        train("fixed", "train.seed=1", epochs=2)


def test_a_network_without_classes_learns_from_a_dataset_with_classes(train, packed):
    train("unconditional", "model.num_classes=0")
    ref, tensors, rows = final_state(run_of(packed, "unconditional"))
    assert ref.images_seen == 312
    assert not any("class" in name for name in tensors)
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_the_moments_of_adam_follow_the_configuration(train, packed):
    train("usual")
    train("forgetful", "train.adam_betas=0.5,0.9", "train.adam_eps=1e-4")
    (_, usual, _), (_, forgetful, _) = (final_state(run_of(packed, name)) for name in ("usual", "forgetful"))
    name = "optimizer.exp_avg_sq.conv_in.weight"
    assert not torch.equal(usual[name], forgetful[name])


def test_what_an_attempt_changed_stays_changed(train, packed):
    train("sticky", epochs=1)
    with pytest.raises(StoppedError):
        train("sticky", "log.every_images=48", epochs=3, stop_after=5)
    run_training(TrainRequest("tiles", str(packed), run="sticky").check())
    ref, _, rows = final_state(run_of(packed, "sticky"))
    assert ref.images_seen == 912
    assert [row["images_seen"] for row in rows if row["images_seen"] > 312] == list(range(336, 913, 48))
    attempt = json.loads(run_of(packed, "sticky").read("attempts/000003.json").data)
    assert attempt["changes"] == {"train.epochs": 3, "log.every_images": 48}


def test_a_small_dataset_has_a_row_of_metrics_every_epoch(train, packed):
    train("rare", "log.every_images=1000000", epochs=2)
    _, _, rows = final_state(run_of(packed, "rare"))
    assert [row["images_seen"] for row in rows] == [312, 600]


def test_a_run_is_about_one_dataset(train, packed):
    train("taken", epochs=1)
    with pytest.raises(BadRequestError, match="is about dataset 'tiles'"):
        run_training(TrainRequest("other", str(packed), run="taken").check())


def command(packed, *words):
    environment = {**os.environ, "DDPM_CACHE": str(packed / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "job", *words, "--bucket", str(packed)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_words(run, *sets, epochs=1):
    options = [word for value in (*SMALL, *sets) for word in ("--set", value)]
    return ["train", "--dataset", "tiles", "--run", run, "--epochs", str(epochs), *options]


def test_two_processes_learn_what_one_does(train, packed):
    train("alone", epochs=1)
    child = command(packed, *train_words("pair"), "--processes", "2")
    output, _ = child.communicate(timeout=200)
    assert child.returncode == 0, output
    (_, one, rows_one), (ref, two, rows_two) = (final_state(run_of(packed, name)) for name in ("alone", "pair"))
    assert ref.images_seen == 312
    assert [row["loss"] for row in rows_two] == pytest.approx([row["loss"] for row in rows_one], rel=1e-5)
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
    assert load_manifest(run_of(packed, "pair"), ref).world_size == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_the_same_command_goes_on(packed, processes):
    run, words = run_of(packed, f"signal-{processes}"), train_words(f"signal-{processes}", epochs=40)
    child = command(packed, *words, "--processes", str(processes))
    deadline = time.monotonic() + 120
    while not list_checkpoints(run):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 75, output
    assert time.monotonic() - signalled < 10
    assert "Traceback" not in output
    assert read_status(run).state == "stopped"
    stopped_at = max(list_checkpoints(run)).images_seen
    epochs = stopped_at // 299 + 1
    child = command(packed, *train_words(f"signal-{processes}", epochs=epochs), "--processes", str(processes))
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert max(list_checkpoints(run)).images_seen > stopped_at
    child = command(packed, *train_words(f"signal-{processes}", epochs=epochs))
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "is finished already" in output
    assert f"EPOCHS={2 * epochs}" in output

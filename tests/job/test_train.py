"""Whole runs of a small network on the embedded images: resuming, splitting, stopping, failing."""

import io
import json
import re
import shutil
import sys
import tarfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load, load_file

from ddpm import training
from ddpm.threads import threads_of
from job.exits import Exit, NotANumberError, StoppedError
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints, restore
from job.runs.layout import located
from job.runs.metric_rows import read_rows
from job.runs.records import read_status
from job.store import open_store
from job.store.files import scratch_folder
from job.training import reporting
from job.training.session import run_training
from tests.job.command_line import NETWORK, ddpm_here, refused, succeeded
from tests.job.launching import StopWhen

SMALL = NETWORK | {"train.warmup_images": "480", "checkpoint.every_minutes": "60", "checkpoint.keep_last": "99"}
SMALL |= {"model.layers_per_level": "1"}
EVERYTHING = {"model__dropout": 0.1, "data__augment": 0.5, "data__crop_scale": "0.5,1", "ema__stds": "0.05,0.1"}
EVERYTHING |= {"ema__warmup": "edm", "ema__snapshot_epochs": 1, "train__weight_decay": 0.1}
EVERYTHING |= {"train__learning_rate_decay": "cosine", "train__decay_images": 700, "model__label_dropout": 0.3}
EVERYTHING |= {"diffusion__self_conditioning": True, "diffusion__variance": "learned_range"}
"""What must be a function of images seen, or lie in the checkpoint."""


@pytest.fixture(scope="module")
def packed(tiles, tmp_path_factory) -> Path:
    """A bucket with the embedded images at 16 pixels."""
    return shutil.copytree(tiles, tmp_path_factory.mktemp("train") / "bucket")


@pytest.fixture
def train(packed):
    """Trains in this process; it is asked to stop after so many steps, or so many questions `asked_by` another."""

    def train(run, *, dataset="tiles", epochs=None, stop_after=None, asked_by="after_step", **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        steps = count()

        def is_enough() -> bool:
            # Whoever waits asks, too, as often as it happens to wait.
            is_asked = sys._getframe(2).f_code.co_name == asked_by
            return stop_after is not None and is_asked and next(steps) >= stop_after

        keys = {name.replace("__", "."): value for name, value in changes.items()}
        base = SMALL if epochs else {}
        if "model.kind" in keys:
            base = {key: value for key, value in base.items() if not key.startswith("model.")}
        sets = tuple(f"{key}={value}" for key, value in (base | keys).items())
        request = TrainRequest(dataset, bucket=str(packed), run=run, epochs=epochs, sets=sets)
        run_training(request.check(), StopWhen(is_enough))

    return train


def run_of(packed, name):
    return open_store(str(packed)).sub(f"runs/{name}")


def final_state(run):
    """All tensors of the newest checkpoint, those of the snapshots too, and the metric rows without the clock."""
    ref = max(list_checkpoints(run))
    tensors = {}
    with scratch_folder("restored") as folder:
        restored = restore(run, ref, folder=folder)
        for group, paths in restored.files.items():
            for path in paths:
                tensors |= {f"{group}.{name}": tensor for name, tensor in load_file(path).items()}
        rows = read_rows(run, restored.manifest.metrics, pytest.fail)
        for file in restored.manifest.snapshots:
            images_seen = located(file.key).checkpoint.images_seen
            content = load(file.read(run)).items()
            tensors |= {f"{file.name} at {images_seen}: {name}": tensor for name, tensor in content}
    for row in rows:
        del row["time"]
        row.pop("images_per_second", None)
        row.pop("memory_bytes", None)
    return ref, tensors, rows


def test_a_resumed_run_is_bit_equal(train, packed, capsys):
    train("a", epochs=2, **EVERYTHING)
    for stop_after in (5, 9):
        with pytest.raises(StoppedError):
            train("b", epochs=2, stop_after=stop_after, **EVERYTHING)
    train("b", epochs=2, **EVERYTHING)
    (ref_a, tensors_a, rows_a), (ref_b, tensors_b, rows_b) = (final_state(run_of(packed, name)) for name in "ab")
    assert ref_a.images_seen == ref_b.images_seen == 600
    assert (ref_a.fence, ref_b.fence) == (1, 3)
    said = [line for line in capsys.readouterr().err.splitlines() if "attempt" in line]
    assert said[:2] == ["beginning, image 0, attempt 1"] * 2
    assert said[2:] == [f"resuming at epoch {at}" for at in ("0.5, image 144, attempt 2", "1.3, image 384, attempt 3")]
    assert tensors_a.keys() == tensors_b.keys()
    assert {name.partition(":")[0] for name in tensors_a} > {
        f"ema-{std}-00.safetensors at {images_seen}" for std in (0.05, 0.1) for images_seen in (312, 600)
    }
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    assert rows_a == rows_b
    assert [row["images_seen"] for row in rows_a] == list(range(72, 600, 72))
    assert all(np.isfinite(row["loss"]) for row in rows_a)


@pytest.mark.slow
def test_held_out_images_are_never_learnt(train, packed, capsys):
    words = ("data", "pack", "landscape-sample", "parted", "--size", 16, "--hold-out", "20%", "--bucket", packed)
    succeeded(ddpm_here(*words))
    options = {"dataset": "parted", "sample__batch_size": 16, "train__batch_size": 32}
    train("watched", epochs=2, **options)
    with pytest.raises(StoppedError):
        # At the second batch of the first look.
        train("stopped", epochs=2, stop_after=1, asked_by="check_agreed", **options)
    train("stopped", epochs=2, **options)
    train("unwatched", epochs=2, log__validate_epochs=0, **options)
    (_, watched, rows), (ref, stopped, rows_stopped), (_, unwatched, rows_without) = (
        final_state(run_of(packed, name)) for name in ("watched", "stopped", "unwatched")
    )
    assert ref.fence == 2
    assert all(torch.equal(watched[name], other[name]) for other in (stopped, unwatched) for name in watched)
    assert rows == rows_stopped
    looks = [row for row in rows if "val_loss" in row]
    assert [row for row in rows if row not in looks] == rows_without
    assert [round(row["epoch"], 1) for row in looks] == [1.0, 2.1]
    assert all(0 < row[f"val_loss_q{quarter}"] < 2 for row in looks for quarter in range(4))
    assert all(1 < row["val_bits_per_dim"] < 20 for row in looks)

    # A run whose averages forget at once is another by that alone, which pairs tell with little error.
    train("other", epochs=2, ema__decay=0, ema__warmup="none", **options)
    capsys.readouterr()
    compare = ("runs", "compare", "watched", "--bucket", packed)
    said = succeeded(ddpm_here(*compare, "other"))
    assert "ema.decay: 0.99 and 0.0" in said
    losses = {words[0]: words[1:] for words in map(str.split, said.splitlines()) if len(words) == 5}
    assert losses["loss"][2:] == ["0", "0"]
    assert "val_loss" not in losses, "two looks are too few for an error"
    assert "of at least 3" in refused(ddpm_here(*compare, "other", "--since-epoch", 2), 66)
    train("seeded", epochs=1, train__seed=1, **options)
    assert "train.seed: 0 and 1" in refused(ddpm_here(*compare, "seeded"), 64)
    max((packed / "runs/other/metrics").iterdir()).write_bytes(b"{}")
    assert "'other' cannot be compared" in refused(ddpm_here(*compare, "other"), 65)


EDM2_SIZES = {
    "channels": 8,
    "channel_mults": "1,2",
    "layers_per_level": 1,
    "head_channels": 8,
    "attention_sizes": 8,
    "dropout": 0.1,
    "uncertainty": True,
}
NETWORKS = {
    "unet": {"model__channels": 8, "model__channel_mults": "1,2", "model__norm_groups": 4},
    "edm2": {"diffusion__schedule": "edm", "diffusion__prediction": "edm"}
    | {f"model__{key}": value for key, value in EDM2_SIZES.items()},
    "dit": {"model__width": 16, "model__depth": 2, "model__heads": 2, "model__dropout": 0.1}
    | {"model__qk_norm": True, "model__rms_norm": True, "model__rope": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_resumes_bit_equal(train, packed, kind):
    """EDM2 changes its weights at the beginning of a step, which is then left."""
    network = NETWORKS[kind] | {"model__kind": kind, "train__batch_size": 100, "train__slots": 3}
    train(f"{kind}-whole", epochs=1, **network)
    with pytest.raises(StoppedError, match="after 100 images"):
        # In the midst of the second step, between its second and its third slot.
        train(f"{kind}-left", epochs=1, **network, stop_after=2 * 1 + 1, asked_by="_should_abandon")
    train(f"{kind}-left", model__gradient_checkpointing="on")
    _, whole, rows_whole = final_state(run_of(packed, f"{kind}-whole"))
    ref, left, rows_left = final_state(run_of(packed, f"{kind}-left"))
    assert (ref.fence, ref.images_seen) == (2, 300)
    assert all(torch.equal(whole[name], left[name]) for name in whole)
    assert rows_whole == rows_left
    assert rows_whole[-1]["loss"] < rows_whole[0]["loss"]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    threads_of.cache_clear()
    yield
    torch.set_num_threads(1)
    threads_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_learns_by_several_threads(train, packed, two_threads, kind):
    """Without dropout, with which threads do not share a batch."""
    without = {"model__dropout": 0.0, "model__kind": kind, "train__batch_size": 100, "sample__images": 1}
    train(f"{kind}-threads", epochs=1, **NETWORKS[kind] | without)
    _, _, rows = final_state(run_of(packed, f"{kind}-threads"))
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_more_epochs_go_on_exactly(train, packed):
    train("long", epochs=2)
    train("grown", epochs=1)
    train("grown", epochs=2)
    (_, long, rows_long), (ref, grown, rows_grown) = (final_state(run_of(packed, n)) for n in ("long", "grown"))
    assert ref.images_seen == 600
    assert all(torch.equal(long[name], grown[name]) for name in long)
    assert rows_long == rows_grown
    with pytest.raises(StoppedError):
        train("grown", epochs=3, stop_after=5, log__every_images=48)
    # What an attempt changed stays changed, without being said again.
    train("grown")
    ref, _, rows = final_state(run_of(packed, "grown"))
    assert ref.images_seen == 912
    assert [row["images_seen"] for row in rows if row["images_seen"] > 600] == list(range(624, 913, 48))
    changes = [json.loads(run_of(packed, "grown").read(f"attempts/00000{n}.json").data)["changes"] for n in (2, 4)]
    assert changes == [{"train.epochs": 2}, {"train.epochs": 3, "log.every_images": 48}]


@pytest.mark.slow
def test_a_run_that_saves_often_keeps_its_last_epochs(train, packed):
    train("often", epochs=5, checkpoint__every_epochs=1, checkpoint__every_minutes=1e-9, checkpoint__keep_last=3)
    there = [ref.images_seen for ref in list_checkpoints(run_of(packed, "often"))]
    assert there[-1] == 1512 and {912, 1200} < {*there} and len(there) in (3, 4), there
    words = ("sample", "--run", "often", "--seeds", "0-1", "--no-nearest", "--bucket", packed)
    assert len(succeeded(ddpm_here(*words, "--checkpoints", "3,4,5")).splitlines()) == 4
    assert "(there are: 3, 4, 5)" in refused(ddpm_here(*words, "--checkpoints", "2"), Exit.MISSING_INPUT)
    for verb in ("verify", "prune"):
        succeeded(ddpm_here("runs", verb, "often", "--bucket", packed))
    assert [ref.images_seen for ref in list_checkpoints(run_of(packed, "often"))] == there


@pytest.mark.slow
def test_a_missing_grid_is_drawn_later(train, packed):
    run, every_epoch = run_of(packed, "pictured"), {"sample__every_epochs": 1, "checkpoint__every_epochs": 1}
    with pytest.raises(StoppedError):
        train("pictured", epochs=2, stop_after=12, **every_epoch)
    assert [ref.images_seen for ref in list_checkpoints(run)] == [312]
    assert not run.exists("samples/epoch-0001-ddim-4.png")
    train("pictured", epochs=2, **every_epoch)
    assert run.exists("samples/epoch-0001-ddim-4.png")


def test_grids_come_ever_more_rarely(train, packed):
    train("doubled", epochs=5, sample__every_epochs="null", sample__images=24)
    run = run_of(packed, "doubled")
    grids = [entry.key for entry in run.list("samples") if entry.key.endswith("ddim-4.png")]
    assert grids == [f"samples/epoch-{epoch:04d}-ddim-4.png" for epoch in (1, 2, 4, 5)]
    heights = [Image.open(io.BytesIO(run.read(key).data)).height for key in grids]
    # Before the end a CPU draws twenty images.
    assert heights[0] == heights[1] == heights[2] <= heights[3]


def test_a_short_attempt_shows_a_loss(train, packed):
    with pytest.raises(StoppedError):
        train("soon", epochs=1, stop_after=3, log__every_images=299)
    assert 0 < read_status(run_of(packed, "soon")).loss < 3
    # The last attempt draws the pictures alone.
    with pytest.raises(StoppedError):
        train("soon", epochs=1, stop_after=0, asked_by="check_agreed", log__every_images=299)
    train("soon", epochs=1, log__every_images=299)
    _, _, (row,) = final_state(run_of(packed, "soon"))
    assert read_status(run_of(packed, "soon")).loss == row["loss"]


def test_an_old_page_is_renewed(train, monkeypatch):
    """Between grids, of which the next one may be days away."""
    made, shown = reporting.run_page, list[int]()

    def watched(facts, pictures):
        shown.append(facts.status.images_seen)
        return made(facts, pictures)

    monkeypatch.setattr(reporting, "run_page", watched)
    for page_seconds, expected in [(300, [0, 300]), (0, [0, 100, 200, 300, 300])]:
        shown.clear()
        monkeypatch.setattr(reporting, "PAGE_SECONDS", page_seconds)
        train(f"page-{page_seconds}", epochs=1, train__batch_size=100, log__every_images=100)
        assert shown == expected


def test_a_run_that_ends_before_it_trains_says_so_on_its_page(packed, tmp_path):
    """The page is there from the beginning, and would say for ever that the run goes on."""
    bucket = tmp_path / "bucket"
    shutil.copytree(packed / "datasets", bucket / "datasets")
    (shard,) = bucket.glob("datasets/tiles-*/shard-00000.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    done = ddpm_here("train", "--dataset", "tiles", "--bucket", bucket, DDPM_CACHE=str(tmp_path / "cache"))
    refused(done, Exit.BAD_DATA)
    assert '<span class="state failed">' in (bucket / "runs/tiles/report.html").read_text()


@pytest.mark.slow
def test_micro_batches_change_nothing_but_rounding(train, packed):
    changes = EVERYTHING | {"model__dropout": 0, "diffusion__variance": "fixed", "diffusion__offset_noise": 0.1}
    train("one", epochs=1, **changes)
    train("five", epochs=1, train__micro_batch_size=5, **changes)
    (_, one, rows_one), (_, five, rows_five) = (final_state(run_of(packed, name)) for name in ("one", "five"))
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(five[name], one[name], rtol=1e-3, atol=1e-5)
    assert [row["loss"] for row in rows_five] == pytest.approx([row["loss"] for row in rows_one], rel=1e-5)


def test_a_non_finite_gradient_ends_training(train, packed):
    explosive = {"train__learning_rate": 1e9, "train__warmup_images": 0, "checkpoint__every_minutes": 1e-9}
    run = run_of(packed, "explodes")
    for _ in range(2):
        with pytest.raises(NotANumberError, match="not a finite number") as caught:
            train("explodes", epochs=1, **explosive)
        assert caught.value.exit_code == 70
        assert [ref.images_seen for ref in list_checkpoints(run)] == [24]
        assert read_status(run).state == "failed"


def test_a_foreign_deviation_of_the_pixels_is_reported(train, packed, capsys):
    shards = sorted(packed.glob("datasets/tiles-16/shard-*.tar"))
    pixels = [np.asarray(Image.open(io.BytesIO(png))) for shard in shards for png in images_in(shard)]
    deviation = np.std(np.stack(pixels) / 127.5)
    for name, sigma_data in (("deviation-near", deviation * 1.1), ("deviation-far", 2.0)):
        capsys.readouterr()
        train(name, epochs=1, diffusion__schedule="edm", diffusion__prediction="edm", diffusion__sigma_data=sigma_data)
        said = re.findall(r"have the deviation ([\d.]+), and diffusion.sigma_data is 2.0:", capsys.readouterr().err)
        assert [float(found) for found in said] == ([pytest.approx(deviation, abs=0.03)] if sigma_data == 2 else [])


def images_in(shard):
    with tarfile.open(shard) as archive:
        return [archive.extractfile(m).read() for m in archive if m.name.endswith(".png")]


@pytest.mark.slow
def test_slow_steps_are_reported_once(train, monkeypatch, capsys):
    draw = training.randomness.training_noise

    def training_noise(seed, image_numbers, *how):
        time.sleep(2.0 * (image_numbers[0] in (216, 240)))
        return draw(seed, image_numbers, *how)

    monkeypatch.setattr(training.randomness, "training_noise", training_noise)
    monkeypatch.setattr("job.training.session.SLOW_SECONDS", 1.0)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 1.0, 1.0))
    train("slow", epochs=1)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a step took")]
    pattern = r"a step took 2\.\d s instead of 0\.\d s: 99 threads share the \d+ cores of this machine: .*"
    assert re.fullmatch(pattern, said)


@pytest.mark.slow
def test_settings_reach_the_training(train, packed):
    """No classes are learnt from a dataset that has some; a row a epoch, however rare; other moments of Adam."""
    settings = {"model__num_classes": 0, "log__every_images": 1_000_000}
    train("usual", epochs=1, **settings)
    train("forgetful", epochs=1, train__adam_betas="0.5,0.9", train__adam_eps=1e-4, **settings)
    (_, usual, rows), (ref, forgetful, _) = (final_state(run_of(packed, name)) for name in ("usual", "forgetful"))
    assert ref.images_seen == 312
    assert not any("class" in name for name in usual)
    assert [row["images_seen"] for row in rows] == [312]
    name = "optimizer.exp_avg_sq.conv_in.weight"
    # After thirteen steps from zero these are three quarters of the mean, and the usual ones a hundredth.
    assert forgetful[name].mean() > 10 * usual[name].mean()

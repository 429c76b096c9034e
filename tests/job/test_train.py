"""Whole runs of a small network on the embedded images: resuming, splitting, stopping, failing, and looking back."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import time
from contextlib import nullcontext
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load, load_file

from ddpm import precision, training
from ddpm.threads import threads_of
from job.exits import Exit, NotANumberError, StoppedError
from job.requests import TrainRequest
from job.runs.checkpoints import list_checkpoints, restore
from job.runs.layout import located
from job.runs.metric_rows import read_rows
from job.runs.records import read_status
from job.store import open_store
from job.store.files import scratch_folder
from job.training import reporting, session
from job.training.session import TrainingSession, run_training
from tests.job.command_line import NETWORK, ddpm_here, ran, refused, refuses, succeeded
from tests.job.launching import StopWhen
from tests.job.some_images import files_in

SMALL = NETWORK | {"train.warmup_images": "480", "checkpoint.keep_last": "99", "model.layers_per_level": "1"}
# On a busy machine the usual cadence would save within an epoch, and other attempts would count.
SMALL |= {"checkpoint.every_minutes": "60"}
EVERYTHING = (
    "model.dropout=0.1 data.augment=0.5 data.crop_scale=0.5,1 ema.stds=0.05,0.1 ema.warmup=edm ema.snapshot_epochs=1 "
    "train.weight_decay=0.1 train.learning_rate_decay=cosine train.decay_images=700 model.label_dropout=0.3 "
    "diffusion.self_conditioning=true diffusion.variance=learned_range condition.derive=mask:brush condition.noise=0.5"
)
"""What must be a function of images seen, or lie in the checkpoint."""


@pytest.fixture(scope="module")
def packed(tiles, tmp_path_factory) -> Path:
    """A bucket with the embedded images at 16 pixels."""
    return shutil.copytree(tiles, tmp_path_factory.mktemp("train") / "bucket")


def train(
    bucket, run, sets="", *, dataset="tiles", epochs=None, stop_after=None, asked_by="after_step", of=None, ending=None
):
    """Trains in this process until it ends as it must, and says how.

    It is asked to stop after so many steps, or so many questions `asked_by` another.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    asked = count()

    def is_enough() -> bool:
        # Whoever waits asks, too, as often as it happens to wait.
        return stop_after is not None and sys._getframe(2).f_code.co_name == asked_by and next(asked) >= stop_after

    base = SMALL if epochs else {}
    if of or "model.kind" in sets:
        base = {key: value for key, value in base.items() if not key.startswith("model.")}
    chosen = base | dict(word.split("=") for word in sets.split())
    words = tuple(f"{key}={value}" for key, value in chosen.items())
    request = TrainRequest(dataset, bucket=str(bucket), run=run, epochs=epochs, sets=words, from_=of)
    ending = ending or (StoppedError if stop_after is not None else None)
    with pytest.raises(ending) if ending else nullcontext() as ended:
        run_training(request.check(), StopWhen(is_enough))
    return ended and ended.value


def run_of(bucket, name):
    return open_store(str(bucket)).sub(f"runs/{name}")


def kept(bucket, name):
    """Images seen at the checkpoints of a run."""
    return [ref.images_seen for ref in list_checkpoints(run_of(bucket, name))]


def final_state(bucket, name):
    """All tensors of the newest checkpoint, those of the snapshots too, and the metric rows without the clock."""
    run, tensors = run_of(bucket, name), {}
    ref = max(list_checkpoints(run))
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
    clock = ("time", "images_per_second", "memory_bytes")
    return ref, tensors, [{key: value for key, value in row.items() if key not in clock} for row in rows]


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def bit_equal(bucket, one, other):
    """The final state of two runs, which must have the same tensors and rows; the checkpoint is that of the other."""
    (ref_of_one, some, rows_of_one), (ref, tensors, rows) = (final_state(bucket, name) for name in (one, other))
    assert ref_of_one.images_seen == ref.images_seen and rows_of_one == rows
    assert equal(some, tensors)
    return ref, tensors, rows


def test_a_resumed_run_is_bit_equal(packed, capsys):
    train(packed, "a", EVERYTHING, epochs=2)
    for stop_after in (5, 9, None):
        train(packed, "b", EVERYTHING, epochs=2, stop_after=stop_after)
    ref, tensors, rows = bit_equal(packed, "a", "b")
    assert (ref.fence, ref.images_seen) == (3, 600)
    said = [line for line in capsys.readouterr().err.splitlines() if "attempt" in line]
    assert said[:2] == ["beginning, image 0, attempt 1"] * 2
    assert said[2:] == [f"resuming at epoch {at}" for at in ("0.5, image 144, attempt 2", "1.3, image 384, attempt 3")]
    snapshots = {f"ema-{std}-00.safetensors at {images_seen}" for std in (0.05, 0.1) for images_seen in (312, 600)}
    assert {name.partition(":")[0] for name in tensors} > snapshots
    assert [row["images_seen"] for row in rows] == list(range(72, 600, 72))
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
def test_held_out_images_are_never_learnt(packed, capsys):
    words = ("data", "pack", "landscape-sample", "parted", "--size", 16, "--hold-out", "20%", "--bucket", packed)
    ran(*words)
    options, sizes = {"dataset": "parted", "epochs": 2}, "sample.batch_size=16 train.batch_size=32"
    train(packed, "watched", sizes, **options)
    # At the second batch of the first look.
    train(packed, "stopped", sizes, stop_after=1, asked_by="check_agreed", **options)
    train(packed, "stopped", sizes, **options)
    train(packed, "unwatched", f"{sizes} log.validate_epochs=0", **options)
    ref, watched, rows = bit_equal(packed, "watched", "stopped")
    _, unwatched, rows_without = final_state(packed, "unwatched")
    assert ref.fence == 2
    assert equal(watched, unwatched)
    looks = [row for row in rows if "val_loss" in row]
    assert [row for row in rows if row not in looks] == rows_without
    assert [round(row["epoch"], 1) for row in looks] == [1.0, 2.1]
    assert all(0 < row[f"val_loss_q{quarter}"] < 2 for row in looks for quarter in range(4))
    assert all(1 < row["val_bits_per_dim"] < 20 for row in looks)

    # A child begins with a look at the weights of its parent.
    train(packed, "child", f"{sizes} train.warmup_images=0", dataset="parted", epochs=1, of="watched@2")
    first, last = (row for row in final_state(packed, "child")[2] if "val_loss" in row)
    assert first["images_seen"] == 0 and first["val_loss"] == looks[-1]["val_loss"] > last["val_loss"]

    # A run whose averages forget at once is another by that alone, which pairs tell with little error.
    train(packed, "other", f"{sizes} ema.decay=0 ema.warmup=none", **options)
    capsys.readouterr()
    compare = ("runs", "compare", "watched", "--bucket", packed)
    said = ran(*compare, "other")
    assert "ema.decay: 0.99 and 0.0" in said
    losses = {words[0]: words[1:] for words in map(str.split, said.splitlines()) if len(words) == 5}
    assert losses["loss"][2:] == ["0", "0"]
    assert "val_loss" not in losses, "two looks are too few for an error"
    train(packed, "seeded", f"{sizes} train.seed=1", stop_after=0, **options)
    few, seed = (*compare, "other", "--since-epoch", 2), (*compare, "seeded")
    refuses([(few, 66, "of at least 3"), (seed, 64, "train.seed: 0 and 1")])
    max((packed / "runs/other/metrics").iterdir()).write_bytes(b"{}")
    refuses([((*compare, "other"), 65, "'other' cannot be compared")])


NETWORKS = {
    "unet": "model.channels=8 model.channel_mults=1,2 model.norm_groups=4",
    "edm2": "model.channels=8 model.channel_mults=1,2 model.layers_per_level=1 model.head_channels=8 model.dropout=0.1 "
    "model.attention_sizes=8 model.uncertainty=true diffusion.schedule=edm diffusion.prediction=edm",
    "dit": "model.width=16 model.depth=2 model.heads=2 model.dropout=0.1 model.qk_norm=true model.rms_norm=true "
    "model.rope=true",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_resumes_bit_equal_and_learns(packed, kind):
    """EDM2 changes its weights at the beginning of a step, which is then left."""
    network = f"{NETWORKS[kind]} model.kind={kind} train.batch_size=100"
    whole, left, shared = f"{kind}-whole", f"{kind}-left", f"{kind}-shared"
    train(packed, whole, f"{network} train.slots=3", epochs=1)
    # In the midst of the second step, between its second and its third slot.
    said = train(packed, left, f"{network} train.slots=3", epochs=1, stop_after=2 * 1 + 1, asked_by="_should_abandon")
    assert "after 100 images" in str(said)
    train(packed, left, "model.gradient_checkpointing=on")
    ref, _, rows = bit_equal(packed, whole, left)
    assert (ref.fence, ref.images_seen) == (2, 300)
    assert rows[-1]["loss"] < rows[0]["loss"]
    # Without dropout, with which threads do not share a batch.
    for threads in (2, 1):
        torch.set_num_threads(threads)
        threads_of.cache_clear()
        if threads == 2:
            train(packed, shared, f"{network} model.dropout=0 sample.images=1", epochs=1)
    _, _, rows = final_state(packed, shared)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_more_epochs_go_on_exactly(packed):
    train(packed, "long", epochs=2)
    train(packed, "grown", epochs=1)
    train(packed, "grown", epochs=2)
    assert bit_equal(packed, "long", "grown")[0].images_seen == 600
    train(packed, "grown", "log.every_images=48", epochs=3, stop_after=5)
    # What an attempt changed stays changed, without being said again.
    train(packed, "grown")
    ref, _, rows = final_state(packed, "grown")
    assert ref.images_seen == 912
    assert [row["images_seen"] for row in rows if row["images_seen"] > 600] == list(range(624, 913, 48))
    attempts = [json.loads(run_of(packed, "grown").read(f"attempts/00000{n}.json").data) for n in (2, 4)]
    changes = [{"train.epochs": 2}, {"train.epochs": 3, "log.every_images": 48}]
    assert [attempt["changes"] for attempt in attempts] == changes


@pytest.mark.slow
def test_a_run_that_saves_often_keeps_its_last_epochs(packed):
    often = "checkpoint.every_epochs=1 checkpoint.every_minutes=1e-9 checkpoint.keep_last=3"
    train(packed, "often", often, epochs=5)
    there = kept(packed, "often")
    assert there[-1] == 1512 and {912, 1200} < {*there} and len(there) in (3, 4), there
    words = ("sample", "--run", "often", "--seeds", "0-1", "--no-nearest", "--bucket", packed, "--checkpoints")
    assert len(ran(*words, "3,4,5").splitlines()) == 4
    assert "(there are: 3, 4, 5)" in refused(ddpm_here(*words, "2"), Exit.MISSING_INPUT)
    for verb in ("verify", "prune"):
        ran("runs", verb, "often", "--bucket", packed)
    assert kept(packed, "often") == there


@pytest.mark.slow
def test_grids_come_ever_more_rarely(packed, monkeypatch):
    """An attempt that ended between the checkpoint and its grid leaves the grid to the next one."""
    monkeypatch.setattr(session, "GRIDS_SHARE", float("inf"))
    sets = "sample.every_epochs=null sample.images=24 checkpoint.every_epochs=1"
    folder = packed / "runs/doubled/samples"
    train(packed, "doubled", sets, epochs=5, stop_after=12)
    assert kept(packed, "doubled") == [312]
    assert not [*folder.glob("*ddim-4.png")]
    train(packed, "doubled", sets, epochs=5)
    grids = sorted(folder.glob("*ddim-4.png"))
    assert [grid.name for grid in grids] == [f"epoch-{epoch:04d}-ddim-4.png" for epoch in (1, 2, 4, 5)]
    heights = [Image.open(grid).height for grid in grids]
    # Before the end a CPU draws twenty images.
    assert heights[0] == heights[1] == heights[2] <= heights[3]
    # If grids may take no time, the last one alone is there.
    monkeypatch.setattr(session, "GRIDS_SHARE", 0.0)
    train(packed, "rare", sets, epochs=2)
    assert [grid.name for grid in (packed / "runs/rare/samples").glob("*ddim-4.png")] == ["epoch-0002-ddim-4.png"]


def test_a_short_attempt_shows_a_loss(packed):
    """And each epoch has a row, however rare they are."""
    rarely = "log.every_images=1000000"
    train(packed, "soon", rarely, epochs=1, stop_after=3)
    assert 0 < read_status(run_of(packed, "soon")).loss < 3
    # The last attempt draws the pictures alone.
    train(packed, "soon", rarely, epochs=1, stop_after=0, asked_by="check_agreed")
    train(packed, "soon", rarely, epochs=1)
    _, _, (row,) = final_state(packed, "soon")
    assert read_status(run_of(packed, "soon")).loss == row["loss"]


def test_an_old_page_is_renewed(packed, monkeypatch):
    """Between grids, of which the next one may be days away."""
    made, shown = reporting.run_page, []
    monkeypatch.setattr(
        reporting, "run_page", lambda facts, pictures: shown.append(facts.status.images_seen) or made(facts, pictures)
    )
    for page_seconds, expected in [(300, [0, 300]), (0, [0, 100, 200, 300, 300])]:
        shown.clear()
        monkeypatch.setattr(reporting, "PAGE_SECONDS", page_seconds)
        train(packed, f"page-{page_seconds}", "train.batch_size=100 log.every_images=100", epochs=1)
        assert shown == expected


def test_a_run_that_ends_before_it_trains_says_so_on_its_page(tiles, tmp_path):
    """The page is there from the beginning, and would say for ever that the run goes on."""
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    (shard,) = bucket.glob("datasets/tiles-*/shard-00000.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    done = ddpm_here("train", "--dataset", "tiles", "--bucket", bucket, DDPM_CACHE=str(tmp_path / "cache"))
    refused(done, Exit.BAD_DATA)
    assert '<span class="state failed">' in (bucket / "runs/tiles/report.html").read_text()


@pytest.mark.parametrize(("precision_", "said"), [("fp32", "images; what"), ("fp16", "even at a loss scale of 1")])
def test_a_non_finite_gradient_ends_training(packed, monkeypatch, precision_, said):
    monkeypatch.setattr(precision, "INITIAL_SCALE", 1.0)
    explosive = "train.optimizer=adam train.learning_rate=1e9 train.warmup_images=0 checkpoint.every_minutes=1e-9"
    name = f"explodes-{precision_}"
    for _ in range(2):
        sets = f"{explosive} train.precision={precision_}"
        error = train(packed, name, sets, epochs=1, ending=NotANumberError)
        assert error.exit_code == 70 and "not a finite number" in str(error) and said in str(error)
        assert kept(packed, name) == [24]
        assert read_status(run_of(packed, name)).state == "failed"


def test_a_resumed_run_in_fp16_leaves_the_same_steps_out(packed, monkeypatch):
    """It stops between two that overflow; what Adam and the averages know depends on those that were left out."""
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0**30)
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    sets = "train.precision=fp16 log.every_images=24 ema.stds=0.1"
    train(packed, "fp16", sets, epochs=2)
    for stop_after in (3, 12, None):
        train(packed, "fp16-resumed", sets, epochs=2, stop_after=stop_after)
    ref, tensors, rows = bit_equal(packed, "fp16", "fp16-resumed")
    assert ref.fence == 3
    factors = [row["loss_scale"] for row in rows]
    assert factors[0] == 2.0**29 and any(a < b for a, b in pairwise(factors))
    (left_out,) = tensors["optimizer.loss_scale"][2:].tolist()
    assert left_out == sum(b < a for a, b in pairwise([2.0**30, *factors]))
    assert [row["images_seen"] for row in rows if "loss" not in row][:3] == [24, 48, 72]


def images_in(dataset: Path) -> list[bytes]:
    """The files of images in the only shard of a dataset."""
    with tarfile.open(dataset / "shard-00000.tar") as shard:
        return [shard.extractfile(member).read() for member in shard if member.name.endswith(".png")]


def test_a_foreign_deviation_of_the_pixels_is_reported(packed, capsys):
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images_in(packed / "datasets/tiles-16")]
    deviation = np.std(np.stack(pixels) / 127.5)
    for sigma_data, expected in ((deviation * 1.1, []), (2.0, [pytest.approx(deviation, abs=0.03)])):
        capsys.readouterr()
        edm = f"diffusion.schedule=edm diffusion.prediction=edm diffusion.sigma_data={sigma_data}"
        train(packed, f"deviation-{len(expected)}", edm, epochs=1)
        said = re.findall(r"have the deviation ([\d.]+), and diffusion.sigma_data is 2.0:", capsys.readouterr().err)
        assert [float(found) for found in said] == expected


@pytest.mark.slow
def test_slow_steps_are_reported_once(packed, monkeypatch, capsys):
    draw = training.randomness.training_noise

    def training_noise(seed, image_numbers, *how):
        time.sleep(2.0 * (image_numbers[0] in (216, 240)))
        return draw(seed, image_numbers, *how)

    monkeypatch.setattr(training.randomness, "training_noise", training_noise)
    monkeypatch.setattr("job.training.session.SLOW_SECONDS", 1.0)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 1.0, 1.0))
    train(packed, "slow", epochs=1)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a step took")]
    pattern = r"a step took 2\.\d s instead of 0\.\d s: 99 threads share the \d+ cores of this machine: .*"
    assert re.fullmatch(pattern, said)


MOVED = "model.dropout=0.1 ema.stds=0.1 data.augment=0.5 checkpoint.keep_last=2 checkpoint.keep_epochs=1,2"
ATTEMPTS = [
    (9, StoppedError, "train.slots=4"),
    (16, ArithmeticError, "train.slots=4 train.micro_batch_size=3"),
    (22, ArithmeticError, "train.slots=6"),
    (30, StoppedError, "train.slots=3 checkpoint.every_epochs=2"),
    (0, None, "train.slots=4 train.micro_batch_size=5"),
]
"""The step at which each attempt ends, how, and what it changes: with dropout, each of these changes every bit."""


@pytest.fixture(scope="module")
def moved(packed) -> dict[int, dict[str, torch.Tensor]]:
    """All states by images seen of a run `moved` that crashed, was stopped and was changed."""
    states, after_step = {}, TrainingSession.after_step
    for last_step, ending, changes in ATTEMPTS:

        def watched(session, state, last_step=last_step, ending=ending):
            # A state that was lost in a crash is overwritten by that of the attempt that learnt it again.
            groups = state.tensors().items()
            states[state.images_seen] = {
                f"{key}.{name}": group[name].clone() for key, group in groups for name in group
            }
            is_last = state.images_seen == last_step * 24
            if is_last and ending is ArithmeticError:
                raise ArithmeticError
            return after_step(session, state) or is_last

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingSession, "after_step", watched)
            train(packed, "moved", f"{MOVED} train.exact=true {changes}", epochs=3, ending=ending)
    return states


@pytest.mark.slow
def test_any_state_is_replayed_to_the_bit(packed, moved, tmp_path):
    saved = kept(packed, "moved")
    assert len(saved) < len(moved) / 5
    for number, image in enumerate(random.Random(0).sample(sorted(moved), 12)):
        folder, found = tmp_path / str(number), {}
        done = ddpm_here("replay", "moved", "--image", image, "--to", folder, "--bucket", packed)
        printed = succeeded(done)
        assert "DIFFER" not in done.stderr
        for path in folder.rglob("*.safetensors"):
            group = "ema" if path.parent.name == "unet" else path.stem.removesuffix("-00")
            found |= {f"{group}.{name}": tensor for name, tensor in load_file(path).items()}
            assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" in printed
        assert equal(found, moved[image]), image
        nearest = max((at for at in saved if at <= image), default=None)
        begun = json.loads((folder / "replay.json").read_text())["from"]
        assert begun.endswith(f"-{nearest:012d}" if nearest else "first weights")


@pytest.mark.slow
def test_a_replay_is_compared_stopped_and_refused(packed, moved, tmp_path, monkeypatch):
    run, state = packed / "runs/moved", tmp_path / "state"
    before = files_in(packed)
    words = ("replay", "moved", "--bucket", packed, "--image")
    assert ran(*words, 312, "--verify").endswith("-000000000312, file by file\n")
    with monkeypatch.context() as patch:
        patch.setattr("job.replay.code_version", lambda: "0+other")
        done = ddpm_here(*words, 336, "--to", state)
    succeeded(done)
    (line,) = [line for line in done.stderr.splitlines() if "DIFFER" in line]
    assert "this replay runs 0+other" in line
    assert json.loads((state / "replay.json").read_text())["differences"] == [line.partition(": ")[2]]
    # Another computation than that of the run.
    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate_at", lambda train, images_seen: train.learning_rate)
        line = refused(ddpm_here(*words, 312, "--verify"), Exit.BAD_DATA)
    assert "differs from the replay in" in line and "model-00.safetensors" in line
    usual, steps = training.learning_rate_at, []

    def stopped(*settings):
        steps.append(os.kill(os.getpid(), signal.SIGTERM))
        return usual(*settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate_at", stopped)
        line = refused(ddpm_here(*words, 192, "--to", tmp_path / "to"), Exit.STOPPED)
    assert "stopped by SIGTERM after" in line and len(steps) == 1 and not (tmp_path / "to").exists()
    # There `ddpm runs verify` would find files that are no part of the run, and `ddpm runs list` another run.
    places = (run, run / "replayed", run / "checkpoints/replayed", packed / "runs/other", packed / "runs")
    taken = f"would be taken for a run or a part of one: name a folder outside of {packed}/runs"
    for asked, code, said in (
        *(((312, "--to", place), Exit.BAD_REQUEST, f"--to {place} {taken}") for place in places),
        ((320,), Exit.BAD_REQUEST, "every 24 images to 912: 312 or 336\n"),
        ((936,), Exit.BAD_REQUEST, "to 912: 912\n"),
        ((336, "--verify"), Exit.MISSING_INPUT, "no checkpoint at image 336"),
        ((336, "--to", state), Exit.BAD_REQUEST, "is there already"),
    ):
        assert said in refused(ddpm_here(*words, *asked), code) + "\n"
    assert before == files_in(packed)
    ran("import", state, "--run", "fork", "--bucket", packed)
    (fork,) = (packed / "runs/fork/checkpoints").iterdir()
    # An export's weights to sample with are the run's.
    weights = load_file(fork / "model-00.safetensors")
    assert equal(weights, {name: moved[336][f"ema.{name}"] for name in weights})

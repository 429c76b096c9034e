"""Runs that begin with the weights of another: what they take over, what they refuse, and that they need it no longer.

The files are read by safetensors alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import resources
from itertools import combinations, count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.numpy import load, load_file

from ddpm import catalogue
from job.config import draft
from job.config.method import build_network
from job.exits import Exit, StoppedError
from job.requests import TrainRequest
from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.store import open_store
from job.training.session import run_training
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.runs.leased import copy_objects
from tests.job.some_images import folder_of, png
from tests.job.stops import StopWhen
from tests.job.test_train import final_state

FILES = {
    "model": "model-00",
    "ema": "unet/diffusion_pytorch_model",
    "ema-0.1": "ema-0.1-00",
    "optimizer": "optimizer-00",
}
OF_CLASSES = "class_embedding.weight"


def weights(bucket: Path, run: str, images_seen: int, group: str) -> dict[str, np.ndarray]:
    (folder,) = (bucket / "runs" / run / "checkpoints").glob(f"*-{images_seen:012d}")
    return load_file(folder / f"{FILES[group]}.safetensors")


def unequal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    """The names of the tensors that differ in a bit, or are in one of them alone."""
    equal = {name for name in one.keys() & other.keys() if np.array_equal(one[name], other[name])}
    return (one.keys() | other.keys()) - equal


def child(bucket: Path, *words: object, of: str = "walk@1", run: str = "child", dataset: str = "tiles"):
    sets = ("--set", "train.batch_size=24", "--set", "checkpoint.keep_last=9", "--set", "sample.images=4")
    sets += ("--set", "train.precision=fp32")
    begun = ("--from", of) if of else ()
    return ddpm_here("train", "--dataset", dataset, "--run", run, "--bucket", bucket, *begun, *sets, *words)


def config_of(bucket: Path, run: str = "child") -> dict:
    return yaml.safe_load((bucket / "runs" / run / "config.yaml").read_text())


@pytest.fixture
def few(bucket, tmp_path) -> Path:
    """The bucket with datasets of 30 images: `few` of two classes at three sizes, `plain` of none."""
    images = folder_of(tmp_path / "images", [(f"{kind}/{n}.png", png(n, 32, 32)) for kind in "ab" for n in range(15)])
    packed = [
        ("few", "--size", 16),
        ("few", "--size", 32),
        ("few", "--size", "48x32"),
        ("plain", "--size", 16, "--no-classes"),
    ]
    for name, *words in packed:
        succeeded(ddpm_here("data", "pack", images, name, *words, "--bucket", bucket))
    return bucket


@pytest.mark.slow
def test_the_parent_gives_the_first_weights_and_is_not_needed_again(bucket):
    said = child(bucket, "--epochs", 1)
    succeeded(said)
    assert "the first weights are those of walk@1 (ema)" in said.stderr
    given = weights(bucket, "walk", 312, "ema")
    for group in ("model", "ema", "ema-0.1"):
        assert unequal(given, weights(bucket, "child", 0, group)) == set()
        assert OF_CLASSES in unequal(given, weights(bucket, "child", 312, group))
    assert not any(moment.any() for moment in weights(bucket, "child", 0, "optimizer").values())
    # Its network, its process and, without a preset for these images, its optimiser.
    ours, theirs = config_of(bucket), config_of(bucket, "walk")
    assert all(ours[section] == theirs[section] for section in ("model", "diffusion", "ema"))
    assert ours["train"] == theirs["train"] | {"epochs": 1}
    for run, group in (("raw", "model"), ("wide", "ema-0.1")):
        succeeded(child(bucket, "--epochs", 1, "--weights", group, run=run, of="walk@latest"))
        assert unequal(weights(bucket, "walk", 912, group), weights(bucket, run, 0, "ema")) == set()

    succeeded(ddpm_here("runs", "delete", "walk", "--yes", "--bucket", bucket))
    succeeded(child(bucket, "--epochs", 2))
    show = ("runs", "show", "child", "--bucket", bucket)
    (line,) = [line for line in succeeded(ddpm_here(*show)).splitlines() if line.startswith("from ")]
    told = json.loads(succeeded(ddpm_here(*show, "--json")))["from"]
    assert line.split(maxsplit=1)[1] == f"walk@1 (ema), sha256 {told['sha256'][:16]}…"
    assert told["epoch"] == 1 and told == ours["parent"]
    succeeded(ddpm_here("runs", "verify", "child", "--bucket", bucket))
    succeeded(child(bucket, "--epochs", 1, of=str(bucket / "runs/child"), run="grandchild"))
    origin = f"{bucket}/runs/child@2 (ema)"
    assert origin in (bucket / "runs/grandchild/report.html").read_text()
    succeeded(ddpm_here("export", "--run", "grandchild", "--to", bucket / "out", "--bucket", bucket))
    assert f"It began with the weights of {origin}." in (bucket / "out/README.md").read_text()


@pytest.mark.slow
def test_a_parent_may_lie_in_a_bucket_of_another_cloud(bucket, gcs_bucket):
    copy_objects(open_store(str(bucket)), open_store(gcs_bucket), "datasets/tiles-16", "runs/walk")
    shutil.rmtree(bucket / "runs/walk")
    uri = f"{gcs_bucket}/runs/walk"
    assert "there are: 1, 3" in refused(child(bucket, of=f"{uri}@2"), Exit.MISSING_INPUT)
    succeeded(child(bucket, "--epochs", 1, of=f"{uri}/@3"))
    parent = config_of(bucket)["parent"]
    assert (parent["run"], parent["epoch"], parent["weights"]) == (uri, 3, "ema")
    key = f"runs/walk/checkpoints/{parent['checkpoint']}/{FILES['ema']}.safetensors"
    assert unequal(load(open_store(gcs_bucket).read(key).data), weights(bucket, "child", 0, "model")) == set()
    # A mark of its reader does not stay.
    assert list(open_store(gcs_bucket).list("runs/walk/reading")) == []


@pytest.mark.slow
def test_other_classes_begin_anew_and_the_rest_does_not(few):
    given = weights(few, "walk", 312, "ema")
    rows = {
        "two": ("few", ("--set", "data.size=16")),
        "none": ("plain", ()),
        "left": ("few", ("--set", "data.size=16", "--set", "model.num_classes=0")),
        "null": ("tiles", ("--set", "model.label_dropout=0.1")),
    }
    for run, (dataset, words) in rows.items():
        done = child(few, "--epochs", 1, *words, run=run, dataset=dataset)
        succeeded(done)
        assert f"those of walk@1 (ema), but for {OF_CLASSES}: the number of classes differs" in done.stderr
        assert unequal(given, weights(few, run, 0, "ema")) == {OF_CLASSES}
    assert weights(few, "two", 0, "ema")[OF_CLASSES].shape == (2, 32)
    assert OF_CLASSES not in weights(few, "none", 0, "ema")
    # They have the initial values of the new run, by its own seed.
    other = ("--set", "data.size=16", "--set", "train.seed=1")
    succeeded(child(few, "--epochs", 1, *other, run="seeded", dataset="few"))
    assert unequal(weights(few, "two", 0, "ema"), weights(few, "seeded", 0, "ema")) == {OF_CLASSES}
    # And by the parent, which began by an equal seed: no class begins as one of the parent's.
    for run in ("two", "null"):
        assert most_alike(given[OF_CLASSES], weights(few, run, 0, "ema")[OF_CLASSES]) < 0.9


@pytest.mark.parametrize(
    ("preset", "small"),
    [("landscape-sample", {}), ("dit", {"model.depth": 1}), ("dome", {})],
)
def test_classes_begin_independently_of_the_parent_and_its_other_children(preset, small):
    """The draw is a function of the configuration alone."""

    def rows(classes: int, **changes: object) -> np.ndarray:
        config = draft(preset, small | {"data.size": 32, "data.channels": 3, "model.num_classes": classes})
        config = config.updated({name.replace("__", "."): value for name, value in changes.items()})
        named = build_network(config, torch.device("cpu")).named_parameters()
        (embedding,) = (value for name, value in named if name.startswith(catalogue.OF_CLASSES))
        return embedding.detach().numpy()

    of_child = {"parent__sha256": "a" * 64, "data__dataset_id": "mine"}
    drawn = [
        rows(5),
        rows(5, train__seed=1),
        rows(3, **of_child),
        rows(8, **of_child | {"parent__sha256": "b" * 64}),
        rows(6, **of_child | {"data__dataset_id": "other"}),
        rows(6, **of_child | {"train__seed": 1}),
    ]
    assert max(most_alike(one, other) for one, other in combinations(drawn, 2)) < 0.9
    assert np.array_equal(drawn[2], rows(3, **of_child))


def most_alike(some: np.ndarray, others: np.ndarray) -> float:
    """The largest cosine of a row of each."""
    unit, unit_too = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (some, others))
    return float((unit @ unit_too.T).max())


@pytest.mark.slow
def test_attention_stays_at_its_levels_for_another_size(few):
    succeeded(child(few, "--epochs", 1, "--set", "data.size=32", run="large", dataset="few"))
    assert config_of(few, "large")["model"]["attention_sizes"] == [16]
    succeeded(child(few, "--epochs", 1, "--set", "data.size=48x32", run="wide", dataset="few"))
    assert config_of(few, "wide")["model"]["attention_sizes"] == [16]
    assert "data.size" in refused(child(few, "--set", "data.size=48x", dataset="few"), 78)
    assert unequal(weights(few, "walk", 312, "ema"), weights(few, "large", 0, "ema")) == {OF_CLASSES}
    line = refused(child(few, "--set", "data.size=32", "--set", "model.attention_sizes=8", dataset="few"), 78)
    assert "(model.attention_sizes: [16] → [8])" in line
    # The same settings fit, in whatever order they name the levels.
    same = settings(model__attention_sizes="8,16")
    for begun in ("", "first"):
        succeeded(child(few, "--epochs", 1, *same, of=begun, run=f"{begun}first", dataset="plain"))


def test_a_preset_gives_what_is_not_of_the_network(bucket):
    succeeded(child(bucket, "--epochs", 1, "--preset", "fashion-mnist"))
    ours, theirs = config_of(bucket), config_of(bucket, "walk")
    assert (ours["model"], ours["diffusion"]) == (theirs["model"], theirs["diffusion"])
    assert (ours["preset"], ours["train"]["learning_rate"], ours["data"]["flip"]) == ("fashion-mnist", 5e-4, False)
    # Guidance only if the network can give it.
    succeeded(child(bucket, "--epochs", 1, "--preset", "dit", run="unguided"))
    assert config_of(bucket, "unguided")["sample"]["guidance"] == 1
    dropout = ("--set", "model.label_dropout=0.1")
    succeeded(child(bucket, "--epochs", 1, "--preset", "dit", *dropout, run="guided"))
    assert config_of(bucket, "guided")["sample"]["guidance"] == 1.5


UNFIT = [
    ("--from walk@2", 66, ["no checkpoint of epoch 2", "there are: 1, 3"]),
    ("--from nobody", 66, ["no run 'nobody'"]),
    ("--from {bucket}/runs/nobody", 66, ["no run 'nobody' in {bucket}"]),
    ("--from {bucket}/walk", 64, ["is not the folder of a run"]),
    ("--from walk --weights ema-0.05", 66, ["no weights ema-0.05 (it has ema, ema-0.1)", "ddpm ema --run walk"]),
    ("--from walk --weights mean", 64, ["--weights 'mean'"]),
    ("--from walk@first", 64, ["use RUN[@EPOCH], such as celeba@490"]),
    ("--from=", 64, ["use RUN[@EPOCH], such as celeba@490"]),
    ("--from gs://me:secret@b/runs/walk@1", 64, ["use RUN[@EPOCH]"]),
    ("--from gs://b/runs/walk?sig=secret", 64, ["use RUN[@EPOCH]"]),
    ("--weights model", 64, ["--weights chooses among the weights of a parent"]),
    ("--run walk --from walk@1", 64, ["run 'walk' would be its own parent: name the new one with --run"]),
    ("--init-from walk", 2, ["(Possible options: --from)"]),
    (
        "--from walk --set model.channels=16 --set model.norm_groups=2 --set diffusion.prediction=x0",
        78,
        ["(model.channels: 8 → 16; model.norm_groups: 4 → 2; diffusion.prediction: v → x0)"],
    ),
    (
        "--from walk --set model.kind=dit",
        78,
        ["fit another network (model.kind: unet → dit): leave out these settings, or --from"],
    ),
    ("--from walk --set data.augment=0.1", 78, ["(data.augment: 0.0 → 0.1)"]),
    ("--from walk --set diffusion.variance=learned_range", 78, ["(diffusion.variance: fixed → learned_range)"]),
    ("--from walk --set train.freeze=down,encoder", 78, ["has no part 'encoder', but conv_in, time_embedding, c"]),
    ("--set train.freeze=conv,time,class,down,mid,up", 78, ["freezes the whole network"]),
]


@pytest.mark.slow
def test_what_does_not_fit_is_one_line_and_begins_nothing(bucket):
    for words, code, parts in UNFIT:
        line = refused(child(bucket, *words.format(bucket=bucket).split(), of=""), code)
        assert all(part.format(bucket=bucket) in line for part in parts) and "secret" not in line, (words, line)
        assert sorted(path.name for path in (bucket / "runs").iterdir()) == ["walk"], words
    images, grey = bucket.parent / "grey", ("grey", "--size", 16, "--channels", 1, "--bucket", bucket)
    succeeded(ddpm_here("data", "pack", folder_of(images, [("1.png", png(1, 16, 16))]), *grey))
    told = refused(child(bucket, dataset="grey"), 78)
    assert "(data.channels: 3 → 1): leave out these settings, or --from, or pack the images with --channels 3" in told
    succeeded(child(bucket, "--epochs", 1))
    for words, part in (
        ({"of": "walk@3"}, "parent.epoch: the run has 1, asked for 3"),
        ({"of": "other@1"}, "parent.run: the run has walk, asked for other"),
    ):
        assert part in refused(child(bucket, "--epochs", 2, **words), Exit.BAD_CONFIG)
    succeeded(child(bucket, "--epochs", 1, of="", run="anew"))
    line = refused(child(bucket, "--epochs", 2, run="anew"), Exit.BAD_CONFIG)
    assert "parent.run: the run has None, asked for walk" in line
    line = refused(child(bucket, "--epochs", 2, "--weights", "model"), Exit.BAD_CONFIG)
    assert "parent.weights: the run has ema, asked for model" in line


@pytest.mark.slow
def test_the_parent_is_the_pinned_one_or_none(bucket):
    """Before the run has a checkpoint of its own, each attempt begins with the same weights, or does not begin."""
    succeeded(child(bucket, "--epochs", 1))
    before = weights(bucket, "child", 312, "model")

    def lost() -> None:
        shutil.rmtree(bucket / "runs/child/checkpoints")
        (bucket / "runs/child/LATEST").unlink()

    lost()
    succeeded(child(bucket, "--epochs", 1, of=""))
    assert unequal(before, weights(bucket, "child", 312, "model")) == set()
    lost()
    run = open_store(str(bucket)).sub("runs/walk")
    (key,) = [entry.key for entry in run.list("checkpoints") if entry.key.endswith("312/MANIFEST.json")]
    manifest = Manifest.load(run, key)
    run.put(key, manifest.model_copy(update={"loss_sums": [[7.0]]}).to_json())
    line = refused(child(bucket, "--epochs", 1), Exit.BAD_DATA)
    assert f"{bucket}/runs/walk/checkpoints/000001-000000000312 has changed since it was pinned: restore it" in line
    run.delete(key)
    assert "312 is gone (no object at" in refused(child(bucket, "--epochs", 1), Exit.MISSING_INPUT)
    run.put(key, manifest.to_json())
    file = next((bucket / "runs/walk/checkpoints").glob("*312/unet/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert f"{file} is corrupt" in refused(child(bucket, "--epochs", 1), Exit.BAD_DATA)


@pytest.mark.slow
def test_an_imported_network_is_a_parent_and_a_child_is_imported(bucket, tmp_path):
    """Of a child that is imported elsewhere the name of its parent would mean another run."""
    for name in ("walk", "child"):
        succeeded(ddpm_here("export", "--run", name, "--to", tmp_path / name, "--bucket", bucket))
        for _ in range(2):
            succeeded(ddpm_here("import", tmp_path / name, "--run", f"{name}-in", "--bucket", bucket))
        assert set(config_of(bucket, f"{name}-in")["parent"].values()) == {None}
        succeeded(child(bucket, "--epochs", 1, of="walk-in"))
    (first,) = (bucket / "runs/walk-in/checkpoints").glob("000002-*")
    assert unequal(load_file(first / "model-00.safetensors"), weights(bucket, "child", 0, "model")) == set()


@pytest.mark.slow
def test_a_resumed_child_is_bit_equal(bucket):
    """With frozen parts, too, which keep every bit."""

    def train(run: str, steps: int | None = None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        asked = count()

        def is_enough() -> bool:
            return steps is not None and sys._getframe(2).f_code.co_name == "after_step" and next(asked) >= steps

        sets = ("train.freeze=down,mid", "train.weight_decay=0.1", "checkpoint.every_minutes=60", "sample.images=4")
        request = TrainRequest("tiles", bucket=str(bucket), run=run, epochs=1, sets=sets, from_="walk@1")
        run_training(request.check(), StopWhen(is_enough))

    train("whole")
    for steps in (0, 5):
        with pytest.raises(StoppedError):
            train("parted", steps)
    train("parted")
    (_, whole, rows), (ref, parted, rows_of_parted) = (
        final_state(open_store(str(bucket)).sub(f"runs/{name}")) for name in ("whole", "parted")
    )
    assert ref.fence == 3 and rows == rows_of_parted and whole.keys() == parted.keys()
    assert all((whole[name] == parted[name]).all() for name in whole)
    given = weights(bucket, "walk", 312, "ema")
    frozen = {name for name in given if name.startswith(("down", "mid"))}
    for group in ("model", "ema", "ema-0.1"):
        assert unequal(given, weights(bucket, "whole", 312, group)) == given.keys() - frozen
    assert not any(name.endswith(tuple(frozen)) for name in weights(bucket, "whole", 312, "optimizer"))


@pytest.mark.slow
def test_fine_tuning_on_one_class_needs_a_tenth_of_the_images(tmp_path):
    """Of a tenth of the images it learns more than another run of all of them, on images that no run has seen."""
    bucket, images = tmp_path / "bucket", tmp_path / "images"
    with zipfile.ZipFile(resources.files("job") / "datasets" / "landscape-sample.zip") as archive:
        archive.extractall(images)
    shutil.copytree(images / "coast", tmp_path / "one" / "coast")
    for source, name in ((images, "all"), (tmp_path / "one", "coast")):
        words = (source, name, "--size", 16, "--hold-out", "20%", "--bucket", bucket)
        succeeded(ddpm_here("data", "pack", *words))
    unseen = set(pixels(bucket / "datasets/coast-held-out-16"))
    assert len(unseen) > 10 and not unseen & set(pixels(bucket / "datasets/all-16"))

    def validated(run: str, dataset: str, epochs: int, *words: object, **changes: str) -> dict[int, float]:
        usual = {"model__channels": "16", "model__layers_per_level": "1", "ema__decay": "0.95"}
        usual |= {"train__batch_size": "16", "train__learning_rate": "4e-3", "train__warmup_images": "320"}
        about = ("--dataset", dataset, "--run", run, "--epochs", epochs, "--bucket", bucket)
        succeeded(ddpm_here("train", *about, *words, *settings(**usual | changes)))
        store = open_store(str(bucket)).sub(f"runs/{run}")
        rows = read_rows(store, load_manifest(store, max(list_checkpoints(store))).metrics, pytest.fail)
        return {row["images_seen"]: row["val_loss"] for row in rows if "val_loss" in row}

    validated("all", "all", 20, log__validate_epochs="0")
    tuned = validated("tuned", "coast", 4, "--from", "all", train__warmup_images="0", train__learning_rate="1e-3")
    anew = validated("anew", "coast", 40)
    assert max(anew) > 9 * max(tuned)
    assert min(tuned) == 0 and tuned[max(tuned)] < tuned[0]
    assert tuned[max(tuned)] < 0.95 * min(anew.values())


def pixels(dataset: Path) -> Iterator[bytes]:
    """The images of a packed dataset, as they lie in its shards."""
    for path in dataset.glob("*.tar"):
        with tarfile.open(path) as shard:
            yield from (shard.extractfile(member).read() for member in shard if not member.name.endswith(".cls"))

"""Runs that begin with the weights of another: what they take over, what they refuse, and that they need it no longer.

The files are read by safetensors alone.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load, load_file

from ddpm import catalogue
from job.config import draft
from job.config.method import build_network
from job.exits import Exit
from job.runs.checkpoints import Manifest, list_checkpoints, load_manifest
from job.runs.metric_rows import read_rows
from job.store import open_store
from tests.job.command_line import ddpm_here, ran, refused, settings, succeeded
from tests.job.runs.leased import copy_objects
from tests.job.some_images import folder_of, png
from tests.job.test_train import bit_equal, train

EMA = "unet/diffusion_pytorch_model.safetensors"
OF_CLASSES = "class_embedding.weight"


def weights(bucket: Path, run: str, images_seen: int, group: str) -> dict[str, np.ndarray]:
    (folder,) = (bucket / "runs" / run / "checkpoints").glob(f"*-{images_seen:012d}")
    return load_file(folder / (EMA if group == "ema" else f"{group}-00.safetensors"))


def unequal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    """The names of the tensors that differ in a bit, or are in one of them alone."""
    equal = {name for name in one.keys() & other.keys() if np.array_equal(one[name], other[name])}
    return (one.keys() | other.keys()) - equal


def child(bucket, *words, sets="", of="walk@1", run="child", dataset="tiles", epochs=1):
    sets = f"train.batch_size=24 checkpoint.keep_last=9 sample.images=4 train.precision=fp32 {sets}"
    words += ("--from", of) if of else ()
    words += tuple(part for word in sets.split() for part in ("--set", word))
    return ddpm_here("train", "--dataset", dataset, "--run", run, "--bucket", bucket, "--epochs", epochs, *words)


def config_of(bucket: Path, run: str = "child") -> dict:
    return yaml.safe_load((bucket / "runs" / run / "config.yaml").read_text())


@pytest.mark.slow
def test_the_parent_gives_the_first_weights_and_is_not_needed_again(bucket):
    said = child(bucket)
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
        succeeded(child(bucket, "--weights", group, run=run, of="walk@latest"))
        assert unequal(weights(bucket, "walk", 912, group), weights(bucket, run, 0, "ema")) == set()

    at = ("--bucket", bucket)
    ran("runs", "delete", "walk", "--yes", *at)
    succeeded(child(bucket, epochs=2))
    lines = ran("runs", "show", "child", *at).splitlines()
    (line,) = [line for line in lines if line.startswith("from ")]
    told = json.loads(ran("runs", "show", "child", *at, "--json"))["from"]
    assert line.split(maxsplit=1)[1] == f"walk@1 (ema), sha256 {told['sha256'][:16]}…"
    assert told["epoch"] == 1 and told == ours["parent"]
    ran("runs", "verify", "child", *at)
    succeeded(child(bucket, of=str(bucket / "runs/child"), run="grandchild"))
    origin = f"{bucket}/runs/child@2 (ema)"
    assert origin in (bucket / "runs/grandchild/report.html").read_text()
    ran("export", "--run", "grandchild", "--to", bucket / "out", *at)
    assert f"It began with the weights of {origin}." in (bucket / "out/README.md").read_text()


@pytest.mark.slow
def test_a_parent_may_lie_in_a_bucket_of_another_cloud(bucket, gcs_bucket):
    there, uri = open_store(gcs_bucket), f"{gcs_bucket}/runs/walk"
    copy_objects(open_store(str(bucket)), there, "datasets/tiles-16", "runs/walk")
    shutil.rmtree(bucket / "runs/walk")
    assert "there are: 1, 3" in refused(child(bucket, of=f"{uri}@2"), Exit.MISSING_INPUT)
    succeeded(child(bucket, of=f"{uri}/@3"))
    parent = config_of(bucket)["parent"]
    assert (parent["run"], parent["epoch"], parent["weights"]) == (uri, 3, "ema")
    given = load(there.read(f"runs/walk/checkpoints/{parent['checkpoint']}/{EMA}").data)
    assert unequal(given, weights(bucket, "child", 0, "model")) == set()
    # A mark of its reader does not stay.
    assert list(there.list("runs/walk/reading")) == []


@pytest.mark.slow
def test_other_classes_begin_anew_and_the_rest_does_not(bucket, tmp_path):
    """Attention stays at its levels for images of another size."""
    images = folder_of(tmp_path / "images", [(f"{kind}/{n}.png", png(n, 32, 32)) for kind in "ab" for n in range(15)])
    for name, *words in (("few", 16), ("few", 32), ("few", "48x32"), ("plain", 16, "--no-classes")):
        ran("data", "pack", images, name, "--size", *words, "--bucket", bucket)
    given = weights(bucket, "walk", 312, "ema")
    for run, dataset, sets, attention_sizes in (
        ("two", "few", "data.size=16", [8]),
        ("none", "plain", "", [8]),
        ("left", "few", "data.size=16 model.num_classes=0", [8]),
        ("null", "tiles", "model.label_dropout=0.1", [8]),
        ("seeded", "few", "data.size=16 train.seed=1", [8]),
        ("large", "few", "data.size=32", [16]),
        ("wide", "few", "data.size=48x32", [16]),
    ):
        done = child(bucket, sets=sets, run=run, dataset=dataset)
        succeeded(done)
        assert f"those of walk@1 (ema), but for {OF_CLASSES}: the number of classes differs" in done.stderr
        assert unequal(given, weights(bucket, run, 0, "ema")) == {OF_CLASSES}
        assert config_of(bucket, run)["model"]["attention_sizes"] == attention_sizes
    assert not any(OF_CLASSES in weights(bucket, run, 0, "ema") for run in ("none", "left"))
    two, seeded, null = (weights(bucket, run, 0, "ema")[OF_CLASSES] for run in ("two", "seeded", "null"))
    assert two.shape == (2, 32)
    # They have the initial values of the new run, by its own seed.
    assert not np.array_equal(two, seeded)
    # And by the parent, which began by an equal seed: no class begins as one of the parent's.
    assert all(most_alike(given[OF_CLASSES], rows) < 0.9 for rows in (two, null))
    assert "data.size" in refused(child(bucket, sets="data.size=48x", dataset="few"), 78)
    line = refused(child(bucket, sets="data.size=32 model.attention_sizes=8", dataset="few"), 78)
    assert "(model.attention_sizes: [16] → [8])" in line
    # The same settings fit, in whatever order they name the levels.
    for begun in ("", "first"):
        same = settings(model__attention_sizes="8,16")
        succeeded(child(bucket, *same, of=begun, run=f"{begun}first", dataset="plain"))


@pytest.mark.slow
def test_a_condition_that_comes_later_begins_at_zero(bucket):
    """The same command goes on, and another derivation of as many channels is no other network."""
    sets = "condition.derive=mask:brush condition.noise=0.5"
    said = child(bucket, sets=sets)
    succeeded(said)
    assert "noise_embedding.linear_2.weight: they are new, and change nothing at first" in said.stderr
    given, ours = weights(bucket, "walk", 312, "ema"), weights(bucket, "child", 0, "model")
    new = {f"noise_embedding.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}
    assert unequal(given, ours) == {"conv_in.weight"} | new
    assert np.array_equal(ours["conv_in.weight"][:, :3], given["conv_in.weight"])
    assert not ours["conv_in.weight"][:, 3:].any() and not ours["noise_embedding.linear_2.weight"].any()
    assert weights(bucket, "child", 312, "model")["conv_in.weight"][:, 3:].any()
    succeeded(child(bucket, sets=sets, epochs=2))
    succeeded(child(bucket, sets="condition.derive=mask:centre", run="centre", of="child"))
    for words, of, said in (
        ("condition.derive=grey", "child", "(condition.channels: 4 → 1)"),
        ("condition.derive='' condition.noise=0", "child", "(condition.channels: 4 → 0"),
        ("condition.derive=sepia", "walk@1", "condition.derive='sepia': use downscale:4"),
        ("condition.derive=downscale:5", "walk@1", "16 pixels are no multiple of 5"),
        ("condition.noise=0.1", "walk@1", "condition.noise needs a condition image"),
        ("condition.channels=3", "walk@1", "is set by --dataset NAME, or condition.derive"),
    ):
        assert said in refused(child(bucket, sets=words, run="other", of=of), Exit.BAD_CONFIG), words
    line = refused(child(bucket, sets="condition.derive=grey", of="", epochs=2), Exit.BAD_CONFIG)
    assert "condition.derive: the run has mask:brush, asked for grey" in line


@pytest.mark.parametrize(("preset", "small"), [("landscape-sample", {}), ("dit", {"model.depth": 1}), ("dome", {})])
def test_classes_begin_independently_of_the_parent_and_its_other_children(preset, small):
    """The draw is a function of the configuration alone."""

    def rows(classes: int, **changes: object) -> np.ndarray:
        config = draft(preset, small | {"data.size": 32, "data.channels": 3, "model.num_classes": classes})
        config = config.updated({name.replace("__", "."): value for name, value in changes.items()})
        named = build_network(config, torch.device("cpu")).named_parameters()
        (embedding,) = (value for name, value in named if name.startswith(catalogue.OF_CLASSES))
        return embedding.detach().numpy()

    mine = {"parent__sha256": "a" * 64, "data__dataset_id": "mine"}
    drawn = [rows(5), rows(5, train__seed=1), rows(3, **mine), rows(8, **mine | {"parent__sha256": "b" * 64})]
    drawn += [rows(6, **mine | {"data__dataset_id": "other"}), rows(6, **mine, train__seed=1)]
    assert max(most_alike(one, other) for one, other in combinations(drawn, 2)) < 0.9
    assert np.array_equal(drawn[2], rows(3, **mine))


def most_alike(some: np.ndarray, others: np.ndarray) -> float:
    """The largest cosine of a row of each."""
    unit, unit_too = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (some, others))
    return float((unit @ unit_too.T).max())


@pytest.mark.slow
def test_a_preset_gives_what_is_not_of_the_network(bucket):
    """Guidance only if the network can give it."""
    for run, preset, sets, guidance in (
        ("child", "fashion-mnist", "", 1),
        ("unguided", "dit", "", 1),
        ("guided", "dit", "model.label_dropout=0.1", 1.5),
    ):
        succeeded(child(bucket, "--preset", preset, sets=sets, run=run))
        assert config_of(bucket, run)["sample"]["guidance"] == guidance
    ours, theirs = config_of(bucket), config_of(bucket, "walk")
    assert (ours["model"], ours["diffusion"]) == (theirs["model"], theirs["diffusion"])
    assert (ours["preset"], ours["train"]["learning_rate"], ours["data"]["flip"]) == ("fashion-mnist", 5e-4, False)


@pytest.mark.slow
def test_a_child_keeps_the_teacher_that_guides_it(bucket):
    """Its classes and condition images, too. The guidance of the preset does not act a second time."""
    told = "model.label_dropout=0.1 condition.derive=downscale:2"
    few = "diffusion.objective=consistency consistency.guidance=2"
    ran("data", "pack", "landscape-sample", "shown", "--size", 16, "--hold-out", "20%", "--bucket", bucket)
    begin = partial(child, bucket, dataset="shown")
    succeeded(begin(sets=told, run="told"))
    given = weights(bucket, "told", 264, "ema")
    succeeded(begin("--preset", "dit", of="told", sets=few))
    assert config_of(bucket)["sample"]["guidance"] == 1
    for sets, said in (
        (f"{few} condition.derive=grey", "the weights of told fit another network"),
        (f"{few} condition.derive=blur:2", "without them: told has condition.derive=downscale:2"),
    ):
        assert said in refused(begin(of="told", run="new", sets=sets), Exit.BAD_CONFIG)
    again = refused(begin(of="child", run="new", sets=f"{few} model.label_dropout=0.2"), Exit.BAD_CONFIG)
    assert "without them: child has diffusion.objective=consistency" in again
    said = refused(begin(of="told", sets=few.replace("2", "3"), epochs=2), Exit.BAD_CONFIG)
    assert "consistency.guidance: the run has 2.0, asked for 3.0" in said
    # Each of these classes would be guided as the one with its number.
    names = yaml.safe_load(ran("data", "show", "shown", "--bucket", bucket, "--json"))["classes"]
    images = [(f"{name}s/{n}.png", png(n)) for name in names for n in range(2)]
    ran("data", "pack", folder_of(bucket.with_name("others"), images), "others", "--size", 16, "--bucket", bucket)
    said = refused(begin(of="told", run="new", sets=few, dataset="others"), Exit.BAD_CONFIG)
    assert "the classes and numbers of others: those of shown are others" in said
    shutil.rmtree(bucket / "runs" / "told")
    succeeded(begin(of="", epochs=2))
    for images_seen in (264, 504):
        assert unequal(given, weights(bucket, "child", images_seen, "teacher")) == set()
    run = open_store(str(bucket)).sub("runs/child")
    rows = read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
    assert [row["images_seen"] for row in rows if "val_loss" in row] == [0, 264, 504]
    assert len(list((bucket / "runs/child/samples").glob("epoch-0002-consistency-2*"))) == 1


UNFIT = [
    ("--from walk@2", 66, "no checkpoint of epoch 2 … there are: 1, 3"),
    ("--from nobody", 66, "no run 'nobody'"),
    ("--from {bucket}/runs/nobody", 66, "no run 'nobody' in {bucket}"),
    ("--from walk --set model.label_dropout=0.1 --set diffusion.objective=consistency --set consistency.guidance=2", 78,
     "consistency.guidance=2 needs a parent that denoises … without them: walk has model.label_dropout=0"),
    ("--from {bucket}/walk", 64, "is not the folder of a run"),
    ("--from walk --weights ema-0.05", 66, "no weights ema-0.05 (it has ema, ema-0.1) … ddpm ema --run walk"),
    ("--from walk --weights mean", 64, "--weights 'mean'"),
    ("--from walk@first", 64, "use RUN[@EPOCH], such as celeba@490"),
    ("--from=", 64, "use RUN[@EPOCH], such as celeba@490"),
    ("--from gs://me:secret@b/runs/walk@1", 64, "use RUN[@EPOCH]"),
    ("--from gs://b/runs/walk?sig=secret", 64, "use RUN[@EPOCH]"),
    ("--weights model", 64, "--weights chooses among the weights of a parent"),
    ("--run walk --from walk@1", 64, "run 'walk' would be its own parent: name the new one with --run"),
    ("--init-from walk", 2, "(Possible options: --from)"),
    ("--from walk --set model.channels=16 --set model.norm_groups=2 --set diffusion.prediction=x0", 78,
     "(model.channels: 8 → 16; model.norm_groups: 4 → 2; diffusion.prediction: v → x0)"),
    ("--from walk --set model.kind=dit", 78,
     "fit another network (model.kind: unet → dit): leave out these settings, or --from"),
    ("--from walk --set data.augment=0.1", 78, "(data.augment: 0.0 → 0.1)"),
    ("--from walk --set diffusion.variance=learned_range", 78, "(diffusion.variance: fixed → learned_range)"),
    ("--from walk --set train.freeze=down,encoder", 78, "has no part 'encoder', but conv_in, time_embedding, c"),
    ("--set train.freeze=conv,time,class,down,mid,up", 78, "freezes the whole network"),
    ("--from walk --dataset grey", 78, "(data.channels: 3 → 1): leave out … pack the images with --channels 3"),
]  # fmt: skip


@pytest.mark.slow
def test_what_does_not_fit_is_one_line_and_begins_nothing(bucket):
    images, grey = bucket.parent / "grey", ("grey", "--size", 16, "--channels", 1, "--bucket", bucket)
    ran("data", "pack", folder_of(images, [("1.png", png(1, 16, 16))]), *grey)
    for words, code, parts in UNFIT:
        line = refused(child(bucket, *words.format(bucket=bucket).split(), of=""), code)
        said = parts.format(bucket=bucket).split(" … ")
        assert all(part in line for part in said) and "secret" not in line, (words, line)
        assert sorted(path.name for path in (bucket / "runs").iterdir()) == ["walk"], words
    succeeded(child(bucket))
    succeeded(child(bucket, of="", run="anew"))
    for words, begun, said in (
        ([], {"of": "walk@3"}, "parent.epoch: the run has 1, asked for 3"),
        ([], {"of": "other@1"}, "parent.run: the run has walk, asked for other"),
        ([], {"run": "anew"}, "parent.run: the run has None, asked for walk"),
        (["--weights", "model"], {}, "parent.weights: the run has ema, asked for model"),
    ):
        assert said in refused(child(bucket, *words, epochs=2, **begun), Exit.BAD_CONFIG)


@pytest.mark.slow
def test_the_parent_is_the_pinned_one_or_none(bucket):
    """Before the run has a checkpoint of its own, each attempt begins with the same weights, or does not begin."""
    succeeded(child(bucket))
    before = weights(bucket, "child", 312, "model")
    for is_there in (True, False):
        shutil.rmtree(bucket / "runs/child/checkpoints")
        (bucket / "runs/child/LATEST").unlink()
        if is_there:
            succeeded(child(bucket, of=""))
            assert unequal(before, weights(bucket, "child", 312, "model")) == set()
    run = open_store(str(bucket)).sub("runs/walk")
    (key,) = [entry.key for entry in run.list("checkpoints") if entry.key.endswith("312/MANIFEST.json")]
    manifest = Manifest.load(run, key)
    run.put(key, manifest.model_copy(update={"loss_sums": [[7.0]]}).to_json())
    line = refused(child(bucket), Exit.BAD_DATA)
    assert f"{bucket}/runs/walk/checkpoints/000001-000000000312 has changed since it was pinned: restore it" in line
    run.delete(key)
    assert "312 is gone (no object at" in refused(child(bucket), Exit.MISSING_INPUT)
    run.put(key, manifest.to_json())
    file = next((bucket / "runs/walk/checkpoints").glob("*312/unet/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert f"{file} is corrupt" in refused(child(bucket), Exit.BAD_DATA)


@pytest.mark.slow
def test_an_imported_network_is_a_parent_and_a_child_is_imported(bucket, tmp_path):
    """Of a child that is imported elsewhere the name of its parent would mean another run."""
    for name in ("walk", "child"):
        ran("export", "--run", name, "--to", tmp_path / name, "--bucket", bucket)
        for _ in range(2):
            ran("import", tmp_path / name, "--run", f"{name}-in", "--bucket", bucket)
        assert set(config_of(bucket, f"{name}-in")["parent"].values()) == {None}
        succeeded(child(bucket, of="walk-in"))
    (first,) = (bucket / "runs/walk-in/checkpoints").glob("000002-*")
    assert unequal(load_file(first / "model-00.safetensors"), weights(bucket, "child", 0, "model")) == set()


@pytest.mark.slow
def test_a_resumed_child_is_bit_equal(bucket):
    """With frozen parts, too, which keep every bit."""
    about = {"sets": "train.freeze=down,mid train.weight_decay=0.1", "epochs": 1, "of": "walk@1"}
    for run, stop_after in (("whole", None), ("parted", 0), ("parted", 5), ("parted", None)):
        train(bucket, run, stop_after=stop_after, **about)
    ref, *_ = bit_equal(bucket, "whole", "parted")
    assert ref.fence == 3
    given = weights(bucket, "walk", 312, "ema")
    frozen = {name for name in given if name.startswith(("down", "mid"))}
    for group in ("model", "ema", "ema-0.1"):
        assert unequal(given, weights(bucket, "whole", 312, group)) == given.keys() - frozen
    assert not any(name.endswith(tuple(frozen)) for name in weights(bucket, "whole", 312, "optimizer"))


@pytest.mark.slow
def test_a_child_learns_to_sample_in_few_steps(bucket):
    """Its sampler, rate and stages follow from the objective; the stages keep their length in a longer run."""
    few = "diffusion.objective=consistency log.every_images=24 data.flip=true"
    succeeded(child(bucket, sets=few))
    ours, theirs = config_of(bucket), config_of(bucket, "walk")
    assert [ours["sample"][key] for key in ("sampler", "grid", "steps")] == ["consistency", "renoise", 2]
    assert ours["train"]["learning_rate"] == pytest.approx(theirs["train"]["learning_rate"] / 6)
    assert ours["consistency"]["stage_images"] == 312 // 8
    assert (bucket / "runs/child/samples/epoch-0001-consistency-2.png").exists()
    assert '"stage"' in (bucket / "runs/child/report.html").read_text()
    said = refused(child(bucket, sets="diffusion.objective=denoising", epochs=2), Exit.BAD_CONFIG)
    assert "diffusion.objective: the run has consistency, asked for denoising" in said
    succeeded(child(bucket, epochs=2))
    run = open_store(str(bucket)).sub("runs/child")
    rows = read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics, pytest.fail)
    stages = {row["images_seen"]: row["stage"] for row in rows if "stage" in row}
    assert stages == {seen: min((seen - 24) // 39, 7) + 1 for seen in range(24, 601, 24)}

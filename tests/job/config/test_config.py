"""Settings: presets, which value wins, what an attempt may change; and what falls due after a step because of them."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import yaml

from ddpm.image_size import ImageSize
from job import config as settings
from job.config import Start, draft, pack_config, parse_sets, preset_names
from job.config.method import build_network
from job.config.schema import NETWORKS
from job.data.pack_request import PackRequest
from job.exits import BadConfigError
from job.requests import TrainRequest, parse_numbers
from job.training.session import due_at
from tests.job.runs.leased import DATASET_IMAGES, small_config

PARAMETERS = {
    "celeba": (78_700_803, 0),
    "celebahq-256": (113_673_219, 0),
    "cifar10": (35_746_307, 0),
    "ddpm-improved": (52_546_438, 0),
    "dit": (130_389_600, 1000),
    "dome": (23_335_299 + 256, 10),
    "edm-cifar10": (62_436_611, 0),
    "edm2-64": (280_210_021, 1000),
    "erengurs": (23_332_739, 0),
    "fashion-mnist": (6_472_449, 10),
    "flow": (62_513_667, 0),
    "landscape": (35_746_307, 0),
    "landscape-sample": (878_019, 0),
    "lsun-256": (113_673_219, 0),
}
"""Of each preset's network with so many classes, as its source says but for what the preset's own lines name."""


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_its_network_and_survives_being_stored(name):
    config, packed, (parameters, classes) = draft(name, {}), pack_config(name), PARAMETERS[name]
    assert settings.validated(settings.flatten(yaml.safe_load(config.to_yaml())), "stored") == config
    config = config.updated({"data.channels": 1 if name == "fashion-mnist" else 3, "data.size": packed.size})
    assert config.data.size == packed.size
    if classes:
        config = config.updated({"model.num_classes": classes})
    with torch.device("meta"):
        network = build_network(config, torch.device("meta"))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


STARTS = [
    # memory of the GPU in GiB, size, images → preset, and settings by which the row differs
    (0, 32, 100, "landscape-sample", {"train.optimizer": "muon", "train.learning_rate": 6e-3}),
    (6.9, 256, 10**6, "landscape-sample", {"train.optimizer": "muon"}),
    (7, 64, 20_000, "landscape", {"model.dropout": 0.1, "train.epochs": 500}),
    (7, 64, 20_001, "landscape", {"model.dropout": 0.0, "train.epochs": 100}),
    (14.6, "128x96", 100, "landscape", {"model.channel_mults": (1, 2, 2, 2)}),
    (22, "96x80", 100, "landscape", {"model.channel_mults": (1, 1, 2, 2, 2), "train.micro_batch_size": 16}),
    (79, "256x128", 100, "lsun-256", {"diffusion.schedule": "flow", "sample.sampler": "unipc"}),
]


@pytest.mark.parametrize(("gpu_gib", "size", "images", "preset", "settings"), STARTS)
def test_a_run_without_a_preset_begins_as_machine_and_images_suggest(gpu_gib, size, images, preset, settings):
    start = Start.of(gpu_gib, ImageSize.of(size), images)
    config = draft(start.preset, {"data.size": size, "data.channels": 3, "model.num_classes": 5}, start.set)
    flat = config.flat()
    assert config.preset == preset and not config.data.flip
    assert {key: tuple(flat[key]) if isinstance(flat[key], list) else flat[key] for key in settings} == settings
    with torch.device("meta"):
        build_network(config, torch.device("meta"))
    # What it prints is what a person types.
    words = start.words.split()[2:]
    typed = draft(preset, parse_sets(words[1::2]) | {"data.size": size, "data.channels": 3, "model.num_classes": 5})
    assert typed == config


def test_presets_have_the_published_networks():
    cifar, celeba, hq = draft("cifar10", {}), draft("celeba", {}), draft("celebahq-256", {})
    assert (cifar.model.channels, cifar.model.channel_mults, cifar.model.dropout) == (128, (1, 2, 2, 2), 0.1)
    assert celeba.model.channel_mults == (1, 2, 2, 2, 4)
    assert (hq.model.channel_mults, hq.train.learning_rate) == ((1, 1, 2, 2, 4, 4), 2e-5)
    assert set(celeba.checkpoint.keep_epochs) >= {30, 80, 490}


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  batch_size: 16\n  seed: 3\n")
    config = draft(
        "cifar10", settings.read_config_file(file) | parse_sets(["train.batch_size=32", "model.channel_mults=1,2"])
    )
    assert (config.train.batch_size, config.train.seed, config.model.channel_mults) == (32, 3, (1, 2))
    assert config.train.learning_rate == 2e-4


def test_another_network_has_its_own_defaults():
    config = draft("celeba", {"model.kind": "dit", "model.depth": 4})
    assert config.model == NETWORKS["dit"](depth=4)
    assert config.train == draft("celeba", {}).train
    again = config.updated({"model.kind": "dome", "train.seed": 3})
    assert (again.model, again.train.seed) == (NETWORKS["dome"](), 3)
    # Said once more, it is no other.
    assert config.updated({"model.kind": "dit"}) == config
    assert draft("celeba", {"model.kind": "unet"}).model == draft("celeba", {}).model
    # An attempt may change some settings, and not the network.
    stored, changes = draft("celeba", {}), {"model.gradient_checkpointing": True}
    assert settings.changed_for_attempt(stored, stored.updated(changes), "r") == changes
    with pytest.raises(BadConfigError, match=r"\(model.kind: the run has unet, asked for dit\)"):
        settings.changed_for_attempt(stored, stored.updated({"model.kind": "dit"}), "r")


def test_requests_need_no_bucket():
    assert parse_numbers("0-3,7, 9-9", "--seeds") == [0, 1, 2, 3, 7, 9]
    request = TrainRequest("my_photos.v2", bucket="gs://nowhere", epochs=3).check()
    assert (request.run, request.changes) == ("my-photos-v2", {"train.epochs": 3})
    assert request.preset_name() == "landscape-sample"
    assert TrainRequest("celeba", bucket="x").check().preset_name() == "celeba"
    # Packing follows the preset.
    request = PackRequest("x.zip", "celeba").check()
    assert (str(request.size), request.crop, request.resize_filter) == ("64", "25,57,128,128", "bilinear")
    assert PackRequest("x.zip", "celeba", size=32, crop="squash").check().crop == "squash"


SCORED = {"checkpoint__every_epochs": 3, "evaluate__every_epochs": 2, "evaluate__metrics": ("fid",)}


@pytest.mark.parametrize(
    ("changes", "images_seen", "wanted"),
    [
        ({}, 24, ""),
        ({}, 48, "log validation save grid"),
        ({}, 144, "log validation save"),
        ({}, 192, "log validation save"),
        ({"log__every_images": 24}, 24, "log"),
        ({"log__validate_epochs": 0}, 48, "log save grid"),
        ({"log__validate_epochs": 0}, 192, "log validation save"),
        ({"sample__every_epochs": 3}, 96, "log validation save"),
        ({"sample__every_epochs": 3}, 144, "log validation save grid"),
        ({"sample__every_epochs": 0}, 48, "log validation save"),
        ({"checkpoint__every_epochs": 3}, 48, "log validation grid"),
        ({"checkpoint__every_epochs": 3, "checkpoint__keep_epochs": (1,)}, 48, "log validation save grid"),
        (SCORED, 96, "log validation scores save grid"),
        (SCORED, 144, "log validation save"),
        (SCORED, 192, "log validation scores save"),
        ({"data__size": 8, "parent__run": "theirs"}, 0, "validation save"),
        ({}, 0, ""),
    ],
)
@pytest.mark.parametrize("held_out", [object(), None], ids=["held out", "all learnt"])
def test_what_falls_due(changes, images_seen, wanted, held_out):
    """After a step of an epoch of 48 images in batches of 24, for four epochs."""
    index, target_images = SimpleNamespace(images=DATASET_IMAGES), 4 * DATASET_IMAGES
    config = small_config(**changes)
    plan = SimpleNamespace(config=config, target_images=target_images, index=index, held_out=held_out)
    due = [name for name, is_due in asdict(due_at(images_seen, plan)).items() if is_due]  # type: ignore[arg-type]
    assert due == [name for name in wanted.split() if held_out or name != "validation"]

import pytest
import torch
import yaml

from job.config import (
    changed_for_attempt,
    draft,
    flatten,
    pack_config,
    parse_sets,
    preset_names,
    read_config_file,
    validated,
)
from job.config.method import build_network
from job.config.schema import NETWORKS
from job.data.pack_request import PackRequest
from job.exits import BadConfigError
from job.requests import TrainRequest, parse_numbers


def test_every_preset_survives_being_stored():
    for name in preset_names():
        config = draft(name, {})
        assert validated(flatten(yaml.safe_load(config.to_yaml())), "stored") == config
        assert (packed := pack_config(name)) is not None
        assert config.updated({"data.size": packed.size}).data.size == packed.size


def test_presets_have_the_published_networks():
    cifar, celeba, hq = draft("cifar10", {}), draft("celeba", {}), draft("celebahq-256", {})
    assert (cifar.model.channels, cifar.model.channel_mults, cifar.model.dropout) == (128, (1, 2, 2, 2), 0.1)
    assert (celeba.model.channel_mults, pack_config("celeba").crop) == ((1, 2, 2, 2, 4), "25,57,128,128")
    assert (hq.model.channel_mults, hq.train.learning_rate) == ((1, 1, 2, 2, 4, 4), 2e-5)
    assert set(celeba.checkpoint.keep_epochs) >= {30, 80, 490}


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
def test_every_preset_builds_its_network(name):
    parameters, classes = PARAMETERS[name]
    config = draft(name, {"data.channels": 1 if name == "fashion-mnist" else 3, "data.size": pack_config(name).size})
    if classes:
        config = config.updated({"model.num_classes": classes})
    with torch.device("meta"):
        network = build_network(config, torch.device("meta"))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  batch_size: 16\n  seed: 3\n")
    changes = read_config_file(file) | parse_sets(["train.batch_size=32", "model.channel_mults=1,2"])
    config = draft("cifar10", changes)
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


def test_attempts_may_change_some_settings():
    stored = draft("celeba", {})
    changes = {"model.gradient_checkpointing": True}
    assert changed_for_attempt(stored, stored.updated(changes), "r") == changes
    with pytest.raises(BadConfigError, match=r"\(model.kind: the run has unet, asked for dit\)"):
        changed_for_attempt(stored, stored.updated({"model.kind": "dit"}), "r")


def test_numbers_and_ranges():
    assert parse_numbers("0-3,7, 9-9", "--seeds") == [0, 1, 2, 3, 7, 9]


def test_training_requests_need_no_bucket():
    request = TrainRequest("my_photos.v2", bucket="gs://nowhere", epochs=3).check()
    assert request.run == "my-photos-v2"
    assert request.changes == {"train.epochs": 3}
    assert request.preset_name() == "landscape-sample"
    assert TrainRequest("celeba", bucket="x").check().preset_name() == "celeba"


def test_packing_follows_the_preset():
    request = PackRequest("x.zip", "celeba").check()
    assert (str(request.size), request.crop, request.resize_filter) == ("64", "25,57,128,128", "bilinear")
    assert PackRequest("x.zip", "celeba", size=32, crop="squash").check().crop == "squash"

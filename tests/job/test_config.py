import pytest
import yaml

from job.config import (
    changed_for_attempt,
    draft,
    flatten,
    pack_config,
    parse_sets,
    presets,
    read_config_file,
    validated,
)
from job.data.shards import DatasetIndex, Shard
from job.exits import BadConfigError
from job.plan import follow_dataset


def index(size=32, channels=3, classes=("a", "b"), images=10):
    shard = Shard(
        name="shard-00000.tar", bytes=1, sha256="0" * 64, crc32c="0" * 8, images=images, offsets_sha256="0" * 64
    )
    return DatasetIndex(
        name="mine",
        size=size,
        channels=channels,
        classes=classes,
        crop="center",
        resize_filter="lanczos",
        source="mine.zip",
        source_sha256="0" * 64,
        shards=(shard,),
    )


def test_every_preset_is_valid_and_survives_being_stored():
    for name in presets():
        config = draft(name, {})
        assert validated(flatten(yaml.safe_load(config.to_yaml())), "stored") == config
        packed = pack_config(name)
        assert packed is not None
        assert follow_dataset(config, index(packed.size, classes=())).data.size == packed.size


def test_presets_have_the_published_networks():
    cifar, celeba, hq = draft("cifar10", {}), draft("celeba", {}), draft("celebahq-256", {})
    assert (cifar.model.channels, cifar.model.channel_mults, cifar.model.dropout) == (128, (1, 2, 2, 2), 0.1)
    assert (celeba.model.channel_mults, pack_config("celeba").crop) == ((1, 2, 2, 2, 4), "25,57,128,128")
    assert (hq.model.channel_mults, hq.train.learning_rate) == ((1, 1, 2, 2, 4, 4), 2e-5)
    assert set(celeba.checkpoint.keep_epochs) >= {30, 80, 490}


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  batch_size: 16\n  seed: 3\n")
    changes = read_config_file(file) | parse_sets(["train.batch_size=32", "model.channel_mults=1,2"])
    config = draft("cifar10", changes)
    assert (config.train.batch_size, config.train.seed, config.model.channel_mults) == (32, 3, (1, 2))
    assert config.train.learning_rate == 2e-4


def test_size_channels_and_classes_follow_the_dataset():
    config = follow_dataset(draft("landscape-sample", {}), index())
    assert (config.data.size, config.data.channels, config.model.num_classes) == (32, 3, 2)
    assert config.data.dataset_id == index().dataset_id
    unconditional = follow_dataset(draft("landscape-sample", {"model.num_classes": 0}), index())
    assert unconditional.model.num_classes == 0
    grey = follow_dataset(draft("landscape-sample", {}), index(channels=1, classes=()))
    assert (grey.data.channels, grey.model.num_classes) == (1, 0)


def test_an_attempt_may_change_cadence_but_not_what_is_learnt():
    stored = follow_dataset(draft("landscape-sample", {}), index())

    changes = {"train.epochs": 99, "checkpoint.every_minutes": 2.0, "train.micro_batch_size": 2}
    longer = stored.updated(changes)
    assert changed_for_attempt(stored, longer, "r") == changes
    other = stored.updated({"train.batch_size": 4, "train.seed": 5})
    with pytest.raises(BadConfigError) as caught:
        changed_for_attempt(stored, other, "r")
    message = str(caught.value)
    assert "train.batch_size: the run has 8, asked for 4" in message
    assert "train.seed: the run has 0, asked for 5" in message
    assert "--run" in message

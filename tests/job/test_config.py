from pathlib import Path

import pytest
import yaml

from job.config import changed_for_attempt, content_hash, flatten, validated
from job.config_input import draft, known_keys, pack_config, parse_sets, presets, read_config_file
from job.data.shards import DatasetIndex, Shard
from job.exits import BadConfigError, BadRequestError, Exit, MissingInputError
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


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_survives_being_stored(name):
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


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.batchsize=3", "did you mean 'train.batch_size'"),
        ("batch_size=3", "did you mean 'train.batch_size'"),
        ("train.batch_size", "key=value"),
        ("train.batch_size=[", "not valid YAML"),
        ("train.seed=2020-99-99", "not valid YAML"),
        ("train.seed=!!int x", "not valid YAML"),
        (f"train.seed={'9' * 5000}", "not valid YAML"),
        ("quite.something.else=1", "sections: preset, data"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(assignment, words):
    with pytest.raises(BadConfigError, match="--set") as caught:
        parse_sets([assignment])
    assert words in str(caught.value)
    assert caught.value.exit_code == Exit.BAD_CONFIG == 78


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.batch_size=0", "train.batch_size"),
        ("train.batch_size=many", "'many'"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("diffusion.schedule=square", "linear"),
        ("model.norm_groups=7", "model.norm_groups=7"),
        ("sample.steps=5000", "diffusion.timesteps=1000"),
        ("data.size=30", "multiple of 8"),
        ("model.attention_sizes=[-16]", "model.attention_sizes"),
        ("checkpoint.keep_epochs=[30,-1]", "checkpoint.keep_epochs"),
    ],
)
def test_bad_values_name_their_key(assignment, words):
    with pytest.raises(BadConfigError) as caught:
        draft("cifar10", {"data.size": 32} | parse_sets([assignment]))
    assert words in str(caught.value)


def test_a_config_file_may_be_missing_or_wrong(tmp_path):
    with pytest.raises(MissingInputError, match=r"nowhere\.yaml"):
        read_config_file(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    for content in (b"- a list\n", b"\xff\xfe", b"a: [", b"train: {batchsize: 1}"):
        bad.write_bytes(content)
        with pytest.raises(BadConfigError, match=r"bad\.yaml"):
            read_config_file(bad)
    with pytest.raises(BadConfigError, match="/dev/zero is longer than"):
        read_config_file(Path("/dev/zero"))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(BadRequestError, match="did you mean 'celeba'"):
        draft("celebra", {})


def test_size_channels_and_classes_follow_the_dataset():
    config = follow_dataset(draft("landscape-sample", {}), index())
    assert (config.data.size, config.data.channels, config.model.num_classes) == (32, 3, 2)
    assert config.data.dataset_id == index().dataset_id
    unconditional = follow_dataset(draft("landscape-sample", {"model.num_classes": 0}), index())
    assert unconditional.model.num_classes == 0
    grey = follow_dataset(draft("landscape-sample", {}), index(channels=1, classes=()))
    assert (grey.data.channels, grey.model.num_classes) == (1, 0)


def test_what_was_set_by_hand_must_fit_the_dataset():
    with pytest.raises(BadConfigError, match=r"data\.size is 64, but the dataset mine-32 has 32"):
        follow_dataset(draft("landscape-sample", {"data.size": 64}), index())
    with pytest.raises(BadConfigError, match=r"model\.num_classes is 3"):
        follow_dataset(draft("landscape-sample", {"model.num_classes": 3}), index())
    with pytest.raises(BadConfigError, match="multiple of 4"):
        follow_dataset(draft("landscape-sample", {}), index(size=30))


def test_an_attempt_may_change_cadence_but_not_what_is_learnt():
    stored = follow_dataset(draft("landscape-sample", {}), index())

    def asked(**changes):
        return validated(flatten(stored.model_dump(mode="json")) | changes, "test")

    longer = asked(**{"train.epochs": 99, "checkpoint.every_minutes": 2.0, "train.micro_batch_size": 2})
    assert set(changed_for_attempt(stored, longer, "r")) == {
        "train.epochs",
        "checkpoint.every_minutes",
        "train.micro_batch_size",
    }
    assert content_hash(longer) == content_hash(stored)
    other = asked(**{"train.batch_size": 4, "train.seed": 5})
    assert content_hash(other) != content_hash(stored)
    with pytest.raises(BadConfigError) as caught:
        changed_for_attempt(stored, other, "r")
    message = str(caught.value)
    assert "train.batch_size: the run has 8, asked for 4" in message
    assert "train.seed: the run has 0, asked for 5" in message
    assert "--run" in message


def test_the_main_keys_are_there():
    assert set(known_keys()) >= {
        *("data.size", "data.flip", "data.shuffle_block_images"),
        *("model.channels", "model.channel_mults", "model.attention_sizes", "model.norm_groups", "model.dropout"),
        *("diffusion.schedule", "diffusion.prediction"),
        *("train.batch_size", "train.micro_batch_size", "train.learning_rate", "train.warmup_images"),
        *("train.epochs", "train.seed"),
    }

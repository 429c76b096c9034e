"""Settings: presets, which value wins, what an attempt may change; and what falls due after a step because of them.

Whatever a person writes after `--set`, and a shell or a launcher leaves in variables: the command goes on with
something sensible, or says in one line what is wrong, soon and with a code of the table.
"""

from dataclasses import asdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import strategies as st

from ddpm.image_size import ImageSize
from job import config as settings
from job.config import Start, draft, known_keys, pack_config, parse_sets, preset_names
from job.config.method import build_network
from job.config.schema import NETWORKS
from job.data.pack_request import PackRequest
from job.exits import BadConfigError, Exit, JobError, ending_of
from job.requests import TrainRequest, parse_numbers
from job.store import open_store
from job.training.session import due_at
from tests.fuzzing import examples, search
from tests.job.command_line import ddpm_here, refuses
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
    changes = {"data.channels": 1 if name == "fashion-mnist" else 3, "data.size": packed.size}
    config = config.updated(changes | ({"model.num_classes": classes} if classes else {}))
    assert config.data.size == packed.size
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
    sets = parse_sets(["train.batch_size=32", "model.channel_mults=1,2"])
    config = draft("cifar10", settings.read_config_file(file) | sets)
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


DUE = [
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
]


def test_what_falls_due():
    """After a step of an epoch of 48 images in batches of 24, for four epochs."""
    index = SimpleNamespace(images=DATASET_IMAGES)
    for (changes, images_seen, wanted), held_out in product(DUE, (object(), None)):
        about = {"target_images": 4 * DATASET_IMAGES, "index": index, "held_out": held_out}
        plan = SimpleNamespace(config=small_config(**changes), **about)
        due = [name for name, is_due in asdict(due_at(images_seen, plan)).items() if is_due]  # type: ignore[arg-type]
        assert due == [name for name in wanted.split() if held_out or name != "validation"], (changes, images_seen)


ODD_NUMBERS = ["1e300", "1.0e+300", "5e-324", "-0.0", ".inf", "1:1:1", "0b1", "1_", "0x" + "f" * 5000, "9" * 5000]
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(ODD_NUMBERS)).map(str)
WORDS = [
    *("on", "no", "true", "null", "~", "linear", "fp32", "[on, 1]", "{a: b}", "[[]]", "- 1", "!!int x", "&a [*a]"),
    *("2020-99-99", "!!python/object:os.system x", "!!binary QQ==", "[" * 500, "1," * 500),
]
LISTS = st.lists(NUMBERS, max_size=20).map(",".join)
VALUES = st.one_of(NUMBERS, st.one_of(st.sampled_from(WORDS), st.text(max_size=20)), LISTS)
KEYS = st.one_of(st.sampled_from(known_keys()), st.text(max_size=12))
ASSIGNMENTS = st.lists(st.one_of(st.tuples(KEYS, VALUES).map("=".join), st.text(max_size=12)), min_size=1, max_size=3)


def in_one_line(error: JobError, codes: set[int]) -> str:
    code, said = ending_of(error)
    assert code in codes
    assert said.isprintable() and 20 < len(said) < 20_000, said
    return said


@examples(few=100, many=2_000)
def test_whatever_is_set(count):
    @search(count, ASSIGNMENTS)
    def check(assignments):
        try:
            config = draft("landscape-sample", parse_sets(assignments))
        except JobError as error:
            in_one_line(error, {Exit.BAD_CONFIG})
        else:
            for key, value in config.flat().items():
                for number in value if isinstance(value, list) else [value]:
                    # What no tensor can hold, or no sum of bytes, ends in a traceback later.
                    if isinstance(number, int | float) and key != "train.seed":
                        assert torch.isfinite(torch.tensor(number * 1e9, dtype=torch.float32)), (key, number)


def test_a_wrong_list_names_one_element():
    with pytest.raises(JobError) as error:
        draft("landscape-sample", parse_sets(["ema.stds=" + "1," * 5_000]))
    said = in_one_line(error.value, {Exit.BAD_CONFIG})
    assert "ema.stds.0: " in said and "ema.stds.1:" not in said


WRONG = [
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=x", "WORLD_SIZE='x'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=-1", "WORLD_SIZE='-1'"),
    ("MASTER_ADDR=a RANK=a WORLD_SIZE=1", "RANK='a'"),
    ("MASTER_ADDR=a RANK=2 WORLD_SIZE=2", "RANK='2'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2 LOCAL_RANK=abc", "LOCAL_RANK='abc'"),
    ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2 MASTER_PORT=x", "MASTER_PORT='x'"),
    ("NNODES=2 NODE_RANK=0 MASTER_ADDR=a MASTER_PORT=66000", "MASTER_PORT=66000"),
    ("DDPM_STOP_AT=x", "DDPM_STOP_AT='x'"),
    ("DDPM_STOP_AT=nan", "DDPM_STOP_AT='nan'"),
]


def test_variables_that_mean_nothing(tmp_path):
    for variables, named in WRONG:
        chosen = {"DDPM_LAUNCHED": None, **dict(one.split("=") for one in variables.split())}
        refuses([("train --dataset a --bucket", Exit.BAD_REQUEST, named)], tmp_path, **chosen)


VARIABLES = [
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"),
    *("DDPM_LAUNCHED", "DDPM_HEARTBEATS", "DDPM_STOP_AT", "DDPM_GPUS", "DDPM_GRACE_SECONDS", "DDPM_AWAY_SECONDS"),
    *("DDPM_JOB", "DDPM_BUCKET", "DDPM_CACHE", "DDPM_TARGETS", "XDG_CACHE_HOME", "HOME", "TMPDIR", "TERM", "TORCH"),
    *("KUBECONFIG", "CLOUDSDK_CONFIG", "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS"),
]
TEXTS = st.one_of(
    st.integers(-2, 70_000).map(str),
    NUMBERS,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.sampled_from(["", " ", "abc", "1_0", "²", "nan", "/dev/null", "/proc/self/mem", "~nobody/x", "s3://", "["]),
)
COMMANDS = [
    *("train --dataset nothing", "sample --run nothing", "sample --run n --count 4 --slice 1/4"),
    *("data list", "runs list", "data pack {bucket}/no.zip a --size 8", "jobs list --on local", "data ensure celeba"),
    *("submit train --dataset a --on local --dry-run", "submit train --dataset a --on container --dry-run"),
]


@examples(few=30, many=200)
def test_whatever_variables_hold(count, tmp_path, monkeypatch):
    """Each command ends before it begins its work, for there is none."""
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "bucket"
    there.mkdir()

    @search(count, st.sampled_from(COMMANDS), st.dictionaries(st.sampled_from(VARIABLES), TEXTS, max_size=4))
    def check(command, variables):
        chosen = {"DDPM_LAUNCHED": None, "DDPM_BUCKET": str(there), "DDPM_CACHE": str(tmp_path / "cache"), **variables}
        done = ddpm_here(*command.format(bucket=there).split(), **chosen)
        assert done.returncode in set(Exit) and "Traceback" not in done.stderr, (done.returncode, done.stderr)
        last = done.stderr.splitlines()[-1:] if done.returncode else ["a line that is long enough"]
        assert 20 < len(last[0]) < 20_000, done.stderr
        remote = {"AWS": "s3://nothing", "STO": "gs://nothing", "GOO": "gs://nothing"}
        for uri in {remote[name[:3]] for name in variables if name[:3] in remote}:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {"STORAGE_EMULATOR_HOST": "", **variables}.items():
                    patch.setenv(name, value)
                try:
                    open_store(uri)
                except JobError as error:
                    in_one_line(error, set(Exit))

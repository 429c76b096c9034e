"""Other people's checkpoints as runs, with diffusers as the judge of what they draw."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm.model import generate, make_denoiser, noise_of
from ddpm.networks.dome import DomeUNet
from ddpm.networks.unet import UNet
from ddpm.objective import Condition
from ddpm.samplers import beginning
from job.config import method
from job.exits import Exit
from job.runs.checkpoints import choose, list_checkpoints, load_manifest, load_weights
from job.runs.records import existing_config, load_attempt
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.ddpm.known import randomise
from tests.ddpm.test_interop import SMALL, ho_named
from tests.job.command_line import ddpm_here, refused, settings, succeeded

SEEDS = torch.arange(3)
AS_HO = ("--size", 16, "--set", "model.norm_groups=4")
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder as diffusers writes it, of a small network by its own conventions."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **kinds)
    randomise(unet)
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return folder


def imported(bucket: Path, source: Path, run: str, *more: object):
    return ddpm_here("import", source, "--run", run, "--bucket", bucket, *more)


def newest(bucket: Path, run: str) -> Path:
    """Where its newest checkpoint lies."""
    return bucket / "runs" / run / json.loads((bucket / "runs" / run / "LATEST").read_text())["checkpoint"]


def as_options(changes: str) -> list[str]:
    return [word for change in changes.split() for word in ("--set", change)]


def network_of(bucket: Path, run: str):
    """The configuration of an imported run, and the network with its averaged weights."""
    store = open_store(str(bucket))
    config = existing_config(store, run)
    network = method.build_network(config, torch.device("cpu")).eval()
    (ref,) = choose(store.sub(f"runs/{run}"), "latest", 1, 1)
    load_weights(store.sub(f"runs/{run}"), ref, "ema", network)
    return config, network


def drawn(bucket: Path, run: str):
    """Images of ten DDIM steps in [0, 1], and the noise that they begin with."""
    config, network = network_of(bucket, run)
    sampling = method.sampling_of(config.sample.model_copy(update={"sampler": "ddim", "steps": 10}))
    process, noise = method.process_of(config), noise_of(SEEDS, config.image_shape)
    denoise = make_denoiser(network, process, method.prediction_of(config), Condition(), clip=config.sample.clip)
    return generate(denoise, process, sampling, noise) / 2 + 0.5, beginning(sampling.points(process), noise)


def test_diffusers_folders_draw_the_same(pipeline, tmp_path, monkeypatch):
    from diffusers import DDIMPipeline
    from diffusers.pipelines.ddim import pipeline_ddim

    assert succeeded(imported(tmp_path, pipeline, "r")).startswith(f"{tmp_path}/runs/r/checkpoints/000001-0000")
    assert verify_run(open_store(str(tmp_path)), "r").problems == []
    ours, start = drawn(tmp_path, "r")
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: start)
    judge = DDIMPipeline.from_pretrained(pipeline)
    judge.scheduler = judge.scheduler.from_config(judge.scheduler.config, timestep_spacing="trailing")
    judge.set_progress_bar_config(disable=True)
    theirs = judge(len(SEEDS), num_inference_steps=10, use_clipped_model_output=True, output_type="pt").images
    assert (theirs - ours).abs().max() < 1e-5
    config, _ = network_of(tmp_path, "r")
    assert (config.model.conventions, config.sample.variance, config.sample.clip) == ("diffusers", "fixed_large", True)
    # It comes out as it went in.
    succeeded(ddpm_here("export", "--run", "r", "--to", tmp_path / "out", "--bucket", tmp_path))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (pipeline / WEIGHTS).read_bytes()


def flat(folder: Path) -> None:
    for path in (UNET, WEIGHTS, SCHEDULER):
        (folder / path).rename(folder / Path(path).name)


def old(folder: Path) -> None:
    """Weights as torch.save writes them, and the attention's layers by their older names."""
    named = load_file(folder / WEIGHTS)
    for today, before in LEGACY.items():
        named = {name.replace(f".{today}.", f".{before}."): tensor for name, tensor in named.items()}
    torch.save(named, (folder / WEIGHTS).with_suffix(".bin"))
    (folder / WEIGHTS).unlink()


def in_parts(folder: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    assert (folder / f"{WEIGHTS}.index.json").exists()


def averages_beside(folder: Path) -> None:
    """As diffusers' training example leaves a checkpoint: the averages are what is drawn with."""
    shutil.copytree(folder / "unet", folder / "unet_ema")
    (folder / WEIGHTS).write_bytes(b"not read")


def by_links(folder: Path) -> None:
    """As the hub's cache keeps it."""
    blobs = folder.rename(folder.with_name("blobs"))
    shutil.copytree(blobs, folder, copy_function=lambda path, link: Path(link).symlink_to(path))


def test_every_folder_gives_the_same_run(pipeline, tmp_path):
    succeeded(imported(tmp_path, pipeline, "as-it-is"))
    expected, _ = drawn(tmp_path, "as-it-is")
    for change in (flat, old, in_parts, averages_beside, by_links):
        folder = shutil.copytree(pipeline, tmp_path / change.__name__ / "folder")
        change(folder)
        run = f"of-{change.__name__.replace('_', '-')}"
        succeeded(imported(tmp_path, folder, run))
        assert torch.equal(drawn(tmp_path, run)[0], expected), run


@pytest.mark.slow
def test_an_imported_run_learns_on(tiles, pipeline, tmp_path):
    """From its own epoch, with the moments at zero; and what a bucket holds is imported as a local folder is."""
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    succeeded(imported(bucket, pipeline, "source"))
    source, learning = newest(bucket, "source"), "train.batch_size=24 sample.images=4 sample.steps=5"
    again = ("r", "--dataset", "tiles", "--epoch", 3, *as_options(f"{learning} checkpoint.every_epochs=1"))
    succeeded(imported(bucket, source, *again))
    train = ("train", "--dataset", "tiles", "--run", "r", "--epochs", 4, "--bucket", bucket)
    done = ddpm_here(*train)
    assert succeeded(done) and "resuming at epoch 3.1, image 912" in done.stderr
    assert verify_run(open_store(str(bucket)), "r").problems == []
    # What has learnt here is no place for another checkpoint.
    assert "has trained since (attempt 2)" in refused(imported(bucket, source, *again), Exit.BAD_REQUEST)
    alone = ddpm_here("train", "--dataset", "tiles", "--run", "source", "--bucket", bucket)
    assert "with --dataset tiles" in refused(alone, Exit.BAD_REQUEST)
    # The first three epochs were learnt elsewhere.
    replay = ("replay", "--bucket", bucket, "--image")
    assert succeeded(ddpm_here(*replay, 1200, "r", "--verify")).endswith("-000000001200, file by file\n")
    assert "has no way to image 888: the checkpoint of 912" in refused(ddpm_here(*replay, 888, "r"), Exit.MISSING_INPUT)
    assert "runs/source was imported without a dataset" in refused(ddpm_here(*replay, 0, "source"), Exit.BAD_REQUEST)


def dome(path: Path, prefix: str = "", **options: int) -> DomeUNet:
    """Saves a network of dome272's, which is returned."""
    network = DomeUNet(image_size=16, in_channels=3, out_channels=3, **options).eval()
    randomise(network)
    torch.save({f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}, path)
    return network


@pytest.mark.slow
def test_epochs_of_erengurs_are_compared(tiles, tmp_path):
    bucket, path = shutil.copytree(tiles, tmp_path / "bucket"), tmp_path / "ckpt.pt"
    sets = ("--set", "sample.steps=2", "--set", "sample.grid=trailing")
    for epoch in (30, 490):
        network = dome(path, "model.")
        more = ("--dataset", "tiles", "--size", 16, "--preset", "erengurs", "--epoch", epoch, *sets)
        succeeded(imported(bucket, path, "seed", *more))
    words = ("--run", "seed", "--checkpoints", "30,490", "--seeds", "0-3", "--bucket", bucket)
    assert "comparison-30-490-ddpm-2-seeds-0-3.png" in succeeded(ddpm_here("sample", *words))
    assert load_attempt(open_store(str(bucket)).sub("runs/seed"), 2).imported == str(path)
    assert_equal_outputs(network_of(bucket, "seed")[1], network, Condition())


@pytest.mark.slow
def test_classes_of_dome_are_guided(tmp_path):
    """There no class means that nothing is added to the timestep."""
    network = dome(tmp_path / "ema_ckpt.pt", num_classes=5)
    succeeded(imported(tmp_path, tmp_path / "ema_ckpt.pt", "r", "--size", 16))
    config, ours = network_of(tmp_path, "r")
    assert (config.model.num_classes, config.model.label_dropout) == (5, 0.1)
    assert_equal_outputs(ours, network, Condition(torch.tensor([4, 0])))
    network.label_emb = None
    assert_equal_outputs(ours, network, Condition(torch.tensor([5, 5])), Condition())
    words = ("--run", "r", "--guidance", 2, "--steps", 2, "--grid", "trailing", "--seeds", "0-4", "--bucket", tmp_path)
    succeeded(ddpm_here("sample", *words))


@torch.no_grad()
def assert_equal_outputs(ours, theirs, condition: Condition, of_theirs: Condition | None = None) -> None:
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    assert torch.equal(ours(x, t, condition), theirs(x, t, of_theirs or condition))


def assert_equal_tensors(ours, theirs) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def of_ho(path: Path, make=lambda weights, average: average) -> UNet:
    """Saves a small network of Ho et al. as `make` says; returns its average."""
    networks = UNet(**SMALL), UNet(**SMALL)
    for seed, network in enumerate(networks):
        randomise(network, seed)
    torch.save(make(*map(ho_named, networks)), path)
    return networks[1]


def named(prefix: str, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def test_averages_come_before_weights(tmp_path):
    for number, make in enumerate(
        (
            # The DDIM authors' list: weights, optimiser, epoch, step, average.
            lambda w, a: [named("module", w), {"state": {}, "param_groups": []}, 3, 1000, named("module", a)],
            lambda w, a: named("module", w) | named("ema_model", a),
            lambda w, a: {"model": w, "EMA": a},
        )
    ):
        average = of_ho(tmp_path / "ckpt.pth", make)
        succeeded(imported(tmp_path, tmp_path / "ckpt.pth", f"r{number}", *AS_HO))
        assert_equal_tensors(network_of(tmp_path, f"r{number}")[1], average)


FORK = """
    diffusion.variance=learned_range diffusion.schedule=sigmoid diffusion.weighting=soft_min_snr
    train.learning_rate=0.003 train.learning_rate_decay=cosine train.warmup_images=72 train.decay_images=7200
    train.weight_decay=0.02 train.seed=7 ema.decay=0.9 ema.stds=0.1,0.2 data.flip=false data.crop_scale=0.8,1.0
    sample.sampler=heun checkpoint.keep_epochs=1,7
"""
"""Settings of all sections that are neither their defaults nor the preset's."""
FREE = "diffusion.self_conditioning=true model.label_dropout=0.1"
OF_FLOW = f"{FREE} model.num_classes=5 diffusion.schedule=flow diffusion.prediction=flow"
FLOW = pytest.param(OF_FLOW, f"{FREE} diffusion.timesteps=50", marks=pytest.mark.slow)


@pytest.mark.parametrize(("changes", "sets"), [(FORK, ""), FLOW])
def test_our_own_checkpoints_come_back(tiles, tmp_path, changes, sets):
    """With all their settings, of an export and of a checkpoint where it lies; training goes on with them.

    An export without its configuration comes back if options state what diffusers' files cannot.
    """
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    train = ("train", "--dataset", "tiles", "--bucket", bucket, "--run")
    of_run = [*settings(model__num_classes="0"), *as_options(changes)]
    succeeded(ddpm_here(*train, "r", "--epochs", 1, *of_run))
    succeeded(ddpm_here("export", "--run", "r", "--to", tmp_path / "out", "--bucket", bucket))
    said = succeeded(imported(bucket, tmp_path / "out", "of-export", "--dataset", "tiles", "--epoch", 1))
    assert "weights, with the settings of its run)" in said
    succeeded(imported(bucket, newest(bucket, "r"), "of-checkpoint", "--set", "train.batch_size=8"))
    (tmp_path / "out/run_config.yaml").unlink()
    succeeded(imported(bucket, tmp_path / "out", "bare", *as_options(sets)))
    config, network = network_of(bucket, "r")
    differing = {}
    for run in ("of-export", "of-checkpoint", "bare"):
        other, theirs = network_of(bucket, run)
        assert_equal_tensors(theirs, network)
        changed = {"weighting", "gamma"} if run == "bare" else set()
        assert config.diffusion.model_dump(exclude=changed) == other.diffusion.model_dump(exclude=changed)
        differing[run] = {key for key, value in config.flat().items() if value != other.flat()[key]}
    assert differing["of-export"] == {"imported"}
    without_dataset = {"data.dataset", "data.dataset_id", "data.classes"}
    assert differing["of-checkpoint"] - without_dataset == {"imported", "train.batch_size"}
    done = ddpm_here(*train, "of-export", "--epochs", 2)
    assert succeeded(done) and "resuming at epoch 1" in done.stderr
    assert load_attempt(open_store(str(bucket)).sub("runs/of-export"), 2).changes == {"train.epochs": 2}


@pytest.mark.slow
def test_several_checkpoints_of_a_changed_run_come_back(bucket, tmp_path):
    """What a run may change meanwhile does not keep its checkpoints apart; an option does."""
    elsewhere = tmp_path / "elsewhere"
    for epochs in (3, 4):
        train = ("train", "--dataset", "tiles", "--run", "walk", "--epochs", epochs, "--bucket", bucket)
        succeeded(ddpm_here(*train))
        shutil.copytree(newest(bucket, "walk"), tmp_path / str(epochs))
        succeeded(imported(elsewhere, tmp_path / str(epochs), "r"))
    assert existing_config(open_store(str(elsewhere)), "r").train.epochs == 3
    assert len(list_checkpoints(open_store(str(elsewhere)).sub("runs/r"))) == 2
    done = imported(elsewhere, tmp_path / "4", "r", "--set", "sample.steps=5")
    assert "exists and has another sample.steps" in refused(done, Exit.BAD_REQUEST)


def test_configurations_of_strangers_are_checked(bucket, tmp_path):
    """What is damaged or of another checkpoint is refused, unless a preset replaces it; names are not taken."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    succeeded(ddpm_here("export", "--run", "walk", "--to", out, "--bucket", bucket))
    text = (out / "run_config.yaml").read_text()
    for changed, said in (
        ("", "is not a configuration"),
        ("train: [1", "is not a configuration"),
        ("a: &a [1]\nb: *a", "aliases are not supported"),
        ("train: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
        (text.replace("learning_rate: 0.01", "learning_rate: fast"), "train.learning_rate: input should be a valid"),
        (text + "later: 1\n", "later: extra inputs are not permitted"),
        (text.replace("channels: 8", "channels: 16"), "of another checkpoint (model.channels: 16, not 8)"),
        (text.replace("schedule: cosine", "schedule: linear"), "of another checkpoint (diffusion.schedule: 'linear'"),
        (text.replace("  size: 16", "  size: null"), "of another checkpoint"),
        (text + " " * 300_000, "is larger than 256 KiB"),
    ):
        assert changed != text, said
        (out / "run_config.yaml").write_text(changed)
        assert said in refused(imported(elsewhere, out, "r"), Exit.BAD_DATA)
        assert not elsewhere.exists()
    succeeded(imported(elsewhere, out, "r", "--preset", "landscape", "--set", "sample.steps=5"))
    assert existing_config(open_store(str(elsewhere)), "r").preset == "landscape"
    for ours, other in (
        *(("preset: landscape-sample", "preset: ../../x"), ("dataset: tiles", "dataset: ../../x")),
        *(("tracker: none", "tracker: wandb"), ("autoguidance_run: ''", "autoguidance_run: ../../x")),
        ("imported: false", "imported: true"),
    ):
        assert ours in text, ours
        text = text.replace(ours, other)
    (out / "run_config.yaml").write_text(text)
    succeeded(imported(elsewhere, out, "s"))
    stored = (elsewhere / "runs/s/config.yaml").read_text()
    assert "learning_rate: 0.01" in stored
    assert not [word for word in ("../", "wandb") if word in stored]


def test_classes_keep_their_names(bucket, tmp_path):
    """Without the dataset, of an export and of a checkpoint where it lies; and what such a run exports has them."""
    (tmp_path / "elsewhere").mkdir()
    succeeded(ddpm_here("export", "--run", "walk", "--to", tmp_path / "out", "--bucket", bucket))
    draw = ("sample", "--classes", "skyline,hills", "--count", 2, "--save", "png", "--steps", 4)
    succeeded(ddpm_here(*draw, "--run", "walk", "--bucket", bucket))
    images = [path.read_bytes() for path in sorted((bucket / "runs/walk/samples").glob("*/piece-*/*.png"))]
    assert len({*images}) == 2
    for source, run in ((tmp_path / "out", "of-export"), (newest(bucket, "walk"), "of-checkpoint")):
        succeeded(imported(tmp_path / "elsewhere", source, run))
        succeeded(ddpm_here(*draw, "--run", run, "--bucket", tmp_path / "elsewhere"))
        drawn = (tmp_path / "elsewhere/runs" / run / "samples").glob("*/piece-*/*.png")
        assert [path.read_bytes() for path in sorted(drawn)] == images
    again = ("export", "--run", "of-export", "--to", tmp_path / "again", "--bucket", tmp_path / "elsewhere")
    succeeded(ddpm_here(*again))
    assert (tmp_path / "again/id2label.json").read_bytes() == (tmp_path / "out/id2label.json").read_bytes()


def test_killed_imports_cannot_train(tiles, pipeline, tmp_path):
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    words = ("r", "--dataset", "tiles")
    succeeded(imported(bucket, pipeline, *words))
    shutil.rmtree(bucket / "runs/r/checkpoints")
    (bucket / "runs/r/LATEST").unlink()
    done = ddpm_here("train", "--dataset", "tiles", "--run", "r", "--bucket", bucket)
    assert "type the same `ddpm import` again" in refused(done, Exit.BAD_DATA)
    succeeded(imported(bucket, pipeline, *words))


DATA = Exit.BAD_DATA
# The file; keys that it gets, tensors that it gets or loses, or its bytes; and the words of the refusal.
FOLDERS = [
    (WEIGHTS, lambda content: content[:5000], "truncated", DATA),
    (UNET, {"act_fn": "gelu"}, "act_fn='gelu' has no counterpart", DATA),
    (UNET, {"act_fn": "a\n\x1b[31mb" * 10**5}, r"cannot be imported: act_fn='a\n\x1b[31mba\n", DATA),
    (UNET, {"block_out_channels": [8, 24]}, "([16, 8, 3, 3]) from checkpoint, the shape in current model is", DATA),
    (UNET, {"layers_per_block": 2}, "Missing key(s) in state_dict: ", DATA),
    (UNET, {"layers_per_block": 10**9}, "layers_per_level=1000000000 has no counterpart", DATA),
    (UNET, {"sample_size": 10**9}, "data.size: sides have 1 to 4,096 pixels (got 1000000000)", Exit.BAD_CONFIG),
    (UNET, {"sample_size": float("inf")}, "does not say what it is made of (ValueError: write 64 for a sq", DATA),
    (UNET, {"num_class_embeds": 10**8}, 'Missing key(s) in state_dict: "class_embedding.weight"', DATA),
    (SCHEDULER, {"beta_schedule": []}, "cannot be imported: TypeError: unhashable type: 'list'", DATA),
    (SCHEDULER, {"_class_name": "CMStochasticIterativeScheduler"}, "IterativeScheduler has no counterpart", DATA),
    (SCHEDULER, {"variance_type": "learned"}, "variance_type='learned' has no counterpart: learned_range has", DATA),
    (WEIGHTS, {"conv_in.bias": None}, 'Missing key(s) in state_dict: "conv_in.bias"', DATA),
    (WEIGHTS, {"conv_in.strange": torch.zeros(3)}, 'Unexpected key(s) in state_dict: "conv_in.strange"', DATA),
    (WEIGHTS, {"conv_in.bias": torch.full((8,), torch.inf)}, "conv_in.bias holds values that are not finite", DATA),
]
NAMES = [
    ('{"1": "sea", "2": "sky"}', 'does not name each class by its number, as in {"0": "forest"', DATA),
    ('{"0": {"en": "sea"}, "1": "sky"}', "does not name each class by its number", DATA),
    ('{"0": "sea", "1": "sky", "2": "sand"}', "has 3 names, but the network 2 classes", Exit.BAD_CONFIG),
    ('{"0": "sea", "1": ""}', "data.classes.1: string should have at least 1 character", Exit.BAD_CONFIG),
    ('["sea", "sky"]', "id2label.json is not a JSON object", DATA),
]


def spoiled(path: Path, change) -> None:
    """A file after a change: of its bytes, of its keys, or of its tensors, where None takes one away."""
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        save_file({name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}, path)


def assert_refused(bucket: Path, source: Path, said: str, code: Exit = DATA, *more: object) -> None:
    line = refused(imported(bucket, source, "r", *more), code)
    assert said in line and len(line) < 800 and "\x1b" not in line
    assert not bucket.exists()


def test_contradictory_folders_are_refused(pipeline, tmp_path):
    for number, (path, change, said, code) in enumerate(FOLDERS):
        folder = shutil.copytree(pipeline, tmp_path / str(number))
        spoiled(folder / path, change)
        assert_refused(tmp_path / "bucket", folder, said, code)
    said = "--size 32: the checkpoint states 16 pixels"
    assert_refused(tmp_path / "bucket", pipeline, said, Exit.BAD_CONFIG, "--size", 32)
    folder = shutil.copytree(pipeline, tmp_path / "index")
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json")
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": 5}')
    assert_refused(tmp_path / "bucket", folder, "cannot be imported: TypeError: 'int' object is not iterable")
    folder = shutil.copytree(pipeline, tmp_path / "classes")
    spoiled(folder / UNET, {"num_class_embeds": 2})
    spoiled(folder / WEIGHTS, {"class_embedding.weight": torch.zeros(2, 32)})
    succeeded(imported(tmp_path / "whole", folder, "r"))
    for text, said, code in NAMES:
        (folder / "id2label.json").write_text(text)
        assert_refused(tmp_path / "bucket", folder, said, code)


def test_nothing_of_a_file_is_run(pipeline, tmp_path):
    # A program, if somebody unpickles it.
    payload = type("Payload", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "marker"),))})()
    torch.save(payload, tmp_path / "a.pt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(payload))
    torch.save({"model": {"fc.weight": torch.zeros(3)}, "optimizer": {"state": {0: payload}}}, tmp_path / "c.pt")
    old(shutil.copytree(pipeline, tmp_path / "d"))
    torch.save({"conv_in.weight": payload}, tmp_path / "d/unet/diffusion_pytorch_model.bin")
    for name in ("a.pt", "b.ckpt", "c.pt", "d"):
        assert_refused(tmp_path / "bucket", tmp_path / name, "was executed")
    assert not (tmp_path / "marker").exists()


def test_odd_and_unknown_files_are_refused(tmp_path):
    first, path = "inc.double_conv.0.weight", tmp_path / "a.pt"
    known = dome(path).state_dict()
    shared: list = [torch.zeros(1)]
    for _ in range(60):
        shared = [shared, shared]
    average = {"ema_model.model.init_conv.weight": torch.zeros(64, 3, 7, 7), "online_model.model.x": torch.zeros(1)}
    infinite = torch.full_like(known[first], 1e300, dtype=torch.float64)
    for content, said in (
        (known | {first: torch.tensor(1.0)}, "IndexError: tuple index out of range"),
        (known | {first: known[first].to(torch.complex64)}, f"{first} holds values that are not finite numbers"),
        (known | {first: known[first].to(torch.int8)}, "looks like a U-Net of dome272's ddpm, and is not: "),
        (known | {first: known[first].to_sparse()}, "looks like a U-Net of dome272's ddpm, and is not: "),
        (known | {first: infinite}, f"{first} holds values that are not finite numbers"),
        (known | {"label_emb.weight": torch.zeros(1, 1).expand(10**9, 256)}, "cannot be imported: RuntimeError: "),
        (shared, "it holds no tensors by name"),
        ({"step": 1, "model": {"model.init_conv.weight": torch.zeros(1)}, "ema": average}, "init_conv"),
        ({"fc.weight": torch.zeros(3)}, "fc.weight"),
        ({"epoch": 3}, "no tensors by name"),
    ):
        torch.save(content, path)
        assert_refused(tmp_path / "bucket", path, said, DATA, "--size", 16)
    assert_refused(tmp_path / "bucket", path, "--epoch counts", Exit.BAD_REQUEST, "--epoch", 3)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert_refused(tmp_path / "bucket", path, "truncated, damaged")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("empty", "nowhere.pt", "pipe.pt"):
        assert_refused(tmp_path / "bucket", tmp_path / name, "nothing lies at", Exit.MISSING_INPUT)
    # PyTorch looks for the directory of a zip before the beginning of one that is cut in such places.
    torch.save({f"w{number}": torch.zeros(100) for number in range(300)}, path)
    content = path.read_bytes()
    for percent in (*range(1, 100, 7), 99):
        path.write_bytes(content[: len(content) * percent // 100])
        assert_refused(tmp_path / "bucket", path, "truncated")


def test_buckets_are_imported_and_exported(pipeline, gcs_bucket, tmp_path):
    store = open_store(gcs_bucket)
    for path in [path for path in pipeline.rglob("*") if path.is_file()]:
        store.upload(path, f"theirs/{path.relative_to(pipeline)}")
    of_ho(tmp_path / "ho.pt")
    store.upload(tmp_path / "ho.pt", "files/ho.pt")
    for source, run, how in (("theirs", "unet", ()), ("files/ho.pt", "ho", AS_HO)):
        succeeded(ddpm_here("import", f"{gcs_bucket}/{source}", "--run", run, "--bucket", gcs_bucket, *how))
        assert len(list_checkpoints(store.sub(f"runs/{run}"))) == 1
    succeeded(ddpm_here("export", "--run", "unet", "--to", f"{gcs_bucket}/out", "--bucket", gcs_bucket))
    assert load_manifest(store.sub("runs/unet"), list_checkpoints(store.sub("runs/unet"))[0]).unet_group == "ema"
    assert {entry.key for entry in store.list("out")} >= {"out/README.md", "out/model_index.json"}

"""Finding, verifying, loading and choosing checkpoints; and diffusers as the judge of one where it lies."""

import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch

from ddpm.model import generate, make_denoiser, noise_of
from ddpm.objective import UNCONDITIONAL, Condition
from ddpm.process import RectifiedFlow
from ddpm.samplers import beginning
from job.config import method
from job.exits import BadConfigError, BadDataError, MissingInputError
from job.runs import checkpoints
from job.runs.checkpoints import LATEST_KEY, choose, list_checkpoints, load_manifest, load_weights, newest_good
from job.runs.layout import CheckpointRef, Located, ObjectKind, located
from job.runs.records import existing_config
from job.runs.retention import delete_checkpoint
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, raised, settings, succeeded
from tests.job.damages import DAMAGES
from tests.job.runs.leased import live_tensors, small_config, write


def test_a_checkpoint_comes_back_bit_equal(new_run, capsys, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = new_run
    run.put("status.json", b"{}")
    assert newest_good(run) is None
    write(run, (1, 80), (1, 160))
    saved = live_tensors()
    target = {group: {n: torch.full_like(t, 9.0) for n, t in named.items()} for group, named in saved.items()}
    strides = target["model"]["conv.weight"].stride()
    newest = newest_good(run, into=target)
    assert (newest.images_seen, newest.loss_sums) == (160, [[1.5, 0.1], [3.0, 4.0]])
    assert (capsys.readouterr().err, [*scratch.rglob("*.safetensors")]) == ("", [])
    for group, named in saved.items():
        for name, tensor in named.items():
            assert torch.equal(target[group][name], tensor)
    assert target["model"]["conv.weight"].stride() == strides
    key, aside = "checkpoints/000001-000000000160/optimizer-00.safetensors", set()
    run.put(key, DAMAGES["bit in the middle"](run.read(key).data))
    assert newest_good(run, aside).images_seen == 80
    assert [key in warning for warning in capsys.readouterr().err.splitlines()] == [True]
    assert aside == {CheckpointRef(1, 160)}
    # Who came later knows better, also with less.
    write(run, (2, 40))
    assert newest_good(run).ref == CheckpointRef(2, 40)


def test_unfit_tensors_and_manifests_are_refused(new_run):
    write(new_run, (1, 80))
    misfits = {
        r"conv\.bias": {"conv.weight": torch.zeros(8, 4, 3, 3), "conv.bias": torch.zeros(9)},
        "'extra' does not fit": {**live_tensors()["model"], "extra": torch.zeros(1)},
        "'conv.weight' does not fit": {"conv.bias": live_tensors()["model"]["conv.bias"]},
    }
    for match, tensors in misfits.items():
        # An older checkpoint would lose work.
        raised(BadConfigError, match, newest_good, new_run, into={"model": tensors})
    new_run.create(CheckpointRef(2, 80).manifest_key, new_run.read(CheckpointRef(1, 80).manifest_key).data)
    raised(BadDataError, "was not written by attempt 2 of this run", load_manifest, new_run, CheckpointRef(2, 80))


def test_choosing_names_what_there_is(new_run):
    # The highest fence wins, and without a manifest there is nothing.
    write(new_run, (1, 48), (1, 80), (2, 80), (1, 96), (1, 112))
    new_run.delete(CheckpointRef(1, 112).manifest_key)
    refs = [CheckpointRef(1, 48), CheckpointRef(2, 80), CheckpointRef(1, 96)]
    for words, expected in {"1,2": refs[:2], "2,2": refs[1:2], "all": refs, "latest": refs[1:2]}.items():
        assert choose(new_run, words, 40, 16) == expected, words
    raised(MissingInputError, r"epoch 7.*there are: 1, 2", choose, new_run, "7", 40, 16)
    for ref in list_checkpoints(new_run):
        delete_checkpoint(new_run, ref)
    raised(BadDataError, r"no checkpoint any more: .*LATEST names it", choose, new_run, "latest", 40, 16)
    new_run.delete(LATEST_KEY)
    raised(MissingInputError, r"no checkpoint yet", choose, new_run, "latest", 40, 16)


READ = {"checkpoint": CheckpointRef(3, 480), "fence": 3, "group": "ema-0.13", "folder": "one", "piece": 12}
OTHERS = {"steps": 10, "number": 2, "name": "epoch-0001-ddim-4", "picture": "png", "seed": 3072, "unique": "d" * 32}
OTHERS["pipeline"] = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"


def test_a_key_is_read_back():
    """In the table of what lies where: out of it is read what it is made of."""
    for kind in ObjectKind:
        fields = {name: value for name, value in READ.items() if f"{{{name}" in kind.value}
        assert located(kind.key(**READ | OTHERS)) == Located(kind, **fields), kind


# --- a checkpoint where it lies: what diffusers loads, and whether it draws the same pictures

SHAPE = (3, 16, 16)
SEEDS = torch.arange(3)


@pytest.fixture(scope="module")
def bucket(tiles, tmp_path_factory):
    return shutil.copytree(tiles, tmp_path_factory.mktemp("pipeline") / "bucket")


def pipeline_of(kind, store, run, ref):
    pipeline = kind.from_pretrained(f"{store.uri}/runs/{run}/{ref.key}", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained(bucket, run, **changes):
    """The bucket, and the folder of the last checkpoint of a run of one epoch."""
    words = ("train", "--dataset", "tiles", "--run", run, "--epochs", 1, "--bucket", bucket)
    succeeded(ddpm_here(*words, *settings(sample__steps="5", **changes)))
    store = open_store(str(bucket))
    assert verify_run(store, run).problems == []
    return store, max(list_checkpoints(store.sub(f"runs/{run}")))


def network_of(store, run, ref):
    """The weights that draw, by our own reader."""
    config, device = existing_config(store, run), torch.device("cpu")
    network = method.build_network(config, device).eval()
    load_weights(store.sub(f"runs/{run}"), ref, config.sample.weights, network)
    return config, network


def drawn(config, network, condition=UNCONDITIONAL, **changes):
    sampling = method.sampling_of(config.sample.model_copy(update=changes))
    denoise = make_denoiser(network, method.process_of(config), method.prediction_of(config), condition)
    return generate(denoise, method.process_of(config), sampling, noise_of(SEEDS, SHAPE))


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("cosine", "v"), pytest.param("sigmoid", "x0", marks=pytest.mark.slow)]
)
def test_diffusers_draws_the_same_pictures(bucket, monkeypatch, schedule, prediction):
    from diffusers import DDIMPipeline
    from diffusers.pipelines.ddim import pipeline_ddim

    run = f"{schedule}-{prediction.lower()}"
    changes = {"diffusion__schedule": schedule, "diffusion__prediction": prediction}
    store, ref = trained(bucket, run, model__num_classes="0", **changes)
    config, network = network_of(store, run, ref)
    pipeline = pipeline_of(DDIMPipeline, store, run, ref)
    points = method.sampling_of(config.sample).points(method.process_of(config))
    start = beginning(points, noise_of(SEEDS, SHAPE))
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: start)
    for steps, same_call in product((5, 10), (True, None)):
        theirs = pipeline(len(SEEDS), num_inference_steps=steps, use_clipped_model_output=same_call, output_type="pt")
        ours = drawn(config, network, steps=steps) / 2 + 0.5
        difference = (theirs.images - ours).abs().max()
        # Its default keeps the noise of estimates that it then clips; none of these x_0 had to be clipped.
        assert difference < 2e-6 if same_call or prediction == "x0" else difference > 1e-4


def test_diffusers_draws_the_pictures_of_a_rectified_flow(bucket, monkeypatch):
    from diffusers import DDPMPipeline
    from diffusers.pipelines.ddpm import pipeline_ddpm

    how = {"diffusion__schedule": "flow", "diffusion__prediction": "flow", "diffusion__weighting": "plain"}
    store, ref = trained(bucket, "flow", model__num_classes="0", sample__clip="false", **how)
    config, network = network_of(store, "flow", ref)
    pipeline = pipeline_of(DDPMPipeline, store, "flow", ref)
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: noise_of(SEEDS, SHAPE)(0))
    theirs = pipeline(len(SEEDS), num_inference_steps=4, output_type="pt").images
    # Their four points: from pure noise to the last number, evenly.
    sampling = replace(method.sampling_of(config.sample), sampler="euler", numbers=(999, 666, 333, 0))
    process = RectifiedFlow(1000)
    denoise = make_denoiser(network, process, method.prediction_of(config), clip=False)
    ours = generate(denoise, process, sampling, noise_of(SEEDS, SHAPE)) / 2 + 0.5
    assert (theirs - ours.clamp(0, 1)).abs().max() < 2e-6


@pytest.mark.slow
def test_a_loop_of_diffusers_draws_the_same_classes(bucket):
    from diffusers import DDIMScheduler, UNet2DModel

    store, ref = trained(bucket, "classes")
    config, network = network_of(store, "classes", ref)
    folder = f"{store.uri}/runs/classes/{ref.key}"
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(5)
    x = noise_of(SEEDS, SHAPE)(0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(x, t, class_labels=SEEDS).sample
            x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    assert (x.clamp(-1, 1) - drawn(config, network, Condition(SEEDS))).abs().max() < 2e-6


@pytest.mark.slow
def test_large_weights_have_several_files(bucket, monkeypatch):
    from diffusers import UNet2DModel

    monkeypatch.setattr("job.runs.writer.PART_BYTES", 50_000)
    store, ref = trained(bucket, "large", ema__stds="0.1", sample__weights="ema-0.1")
    names = [file.name for file in load_manifest(store.sub("runs/large"), ref).files]
    assert names.count("diffusion_pytorch_model.safetensors.index.json") == 1
    assert sum(name.startswith("diffusion_pytorch_model-0") for name in names) > 2
    # The weights that draw lie there and nowhere else.
    groups = {name.rpartition("-")[0] for name in names if "-" in name} - {"diffusion_pytorch_model-00001-of"}
    assert {"model", "optimizer", "ema"} <= groups
    assert "ema-0.1" not in groups
    _, network = network_of(store, "large", ref)
    theirs = UNet2DModel.from_pretrained(f"{store.uri}/runs/large/{ref.key}", subfolder="unet", local_files_only=True)
    assert theirs.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in theirs.state_dict().items())


OF_EDM = {"diffusion__schedule": "edm", "diffusion__prediction": "edm"}
DESCRIBED = [
    ({}, {"unet/config.json", "scheduler/scheduler_config.json", "id2label.json", "run_config.yaml"}),
    (OF_EDM, {"unet/config.json", "id2label.json", "run_config.yaml"}),
    ({"model__heads": 2}, set()),
]


@pytest.mark.parametrize(("changes", "there"), DESCRIBED)
def test_only_what_diffusers_has_is_described(changes, there):
    network = {"model__kind": "unet", "model__channel_mults": (1, 2), "model__attention_sizes": (16, 8)}
    config = small_config(data__size=16, data__channels=3, model__num_classes=5, **network | changes)
    files = {"model-00.safetensors": {}, "ema-00.safetensors": {}}
    _, names, descriptions = checkpoints.files_for_diffusers(config, tuple("abcde"), files)
    assert descriptions.keys() == there
    assert [*names] == ["ema-00.safetensors"] * bool(there)


def test_learnt_variances_have_their_pipeline(bucket):
    from diffusers import DDPMPipeline

    store, ref = trained(bucket, "learnt", model__num_classes="0", diffusion__variance="learned_range")
    pipeline = pipeline_of(DDPMPipeline, store, "learnt", ref)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(2, num_inference_steps=3, output_type="np").images.shape == (2, 16, 16, 3)

"""A checkpoint where it lies, with diffusers as the judge: what it loads, and whether it draws the same pictures."""

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
from job.runs import checkpoints
from job.runs.checkpoints import list_checkpoints, load_manifest, load_weights
from job.runs.records import existing_config
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, settings, succeeded
from tests.job.runs.leased import small_config

SHAPE = (3, 16, 16)
SEEDS = torch.arange(3)


@pytest.fixture(scope="module")
def bucket(tiles, tmp_path_factory):
    return shutil.copytree(tiles, tmp_path_factory.mktemp("pipeline") / "bucket")


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
    pipeline = DDIMPipeline.from_pretrained(f"{store.uri}/runs/{run}/{ref.key}", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
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
    pipeline = DDPMPipeline.from_pretrained(f"{store.uri}/runs/flow/{ref.key}", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
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


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, {"unet/config.json", "scheduler/scheduler_config.json", "id2label.json", "run_config.yaml"}),
        (
            {"diffusion__schedule": "edm", "diffusion__prediction": "edm"},
            {"unet/config.json", "id2label.json", "run_config.yaml"},
        ),
        ({"model__heads": 2}, set()),
    ],
)
def test_only_what_diffusers_has_is_described(changes, there):
    network = {"model__kind": "unet", "model__channel_mults": (1, 2), "model__attention_sizes": (16, 8)}
    config = small_config(data__size=16, data__channels=3, model__num_classes=5, **network | changes)
    _, names, descriptions = checkpoints.files_for_diffusers(
        config, tuple("abcde"), {"model-00.safetensors": {}, "ema-00.safetensors": {}}
    )
    assert descriptions.keys() == there
    assert [*names] == ["ema-00.safetensors"] * bool(there)


def test_learnt_variances_have_their_pipeline(bucket):
    from diffusers import DDPMPipeline

    store, ref = trained(bucket, "learnt", model__num_classes="0", diffusion__variance="learned_range")
    pipeline = DDPMPipeline.from_pretrained(f"{store.uri}/runs/learnt/{ref.key}", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(2, num_inference_steps=3, output_type="np").images.shape == (2, 16, 16, 3)

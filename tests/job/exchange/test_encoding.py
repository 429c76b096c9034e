"""Datasets of latents from encoding to scores, with a small autoencoder of diffusers and webdataset as judges."""

import hashlib
import json
import shutil
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm.model import noise_of
from job.config import method
from job.data.latents import _Encoding, latents_of
from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.data.reading.cache import ImageCache
from job.data.shards import INDEX, OFFSETS_DTYPE, Shards, load_index, shard_name
from job.exits import Exit
from job.plan import plan_run
from job.requests import TrainRequest
from job.runs.records import existing_config
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.damages import flip_a_bit
from tests.job.launching import StopWhen
from tests.job.sampling.conftest import ddim_50, estimate_of

KEY = "datasets/tiles-latents-8"
NAN = float("nan")
NAMES = ("config.json", "diffusion_pytorch_model.safetensors")


def make_autoencoder(folder, levels=2, **changes):
    """A small one of diffusers, which nobody trained; it halves images `levels` - 1 times."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4}
    AutoencoderKL(**kinds, **{**sizes, **changes}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """One that nobody trained: it halves the size once, to four channels."""
    return make_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A bucket with the embedded images at 16 pixels in several shards, a fifth of them held out."""
    bucket = open_store(str(tmp_path_factory.mktemp("images") / "bucket"))
    source = str(resources.files("job") / "datasets" / "landscape-sample.zip")
    for part in PackRequest(source, "tiles", 16, hold_out="20%").check().parts():
        pack(bucket, part, shard_images=24)
    return bucket.uri


@pytest.fixture(scope="module")
def bucket(images, autoencoder, tmp_path_factory):
    """The same with the latents, and a run on them."""
    bucket = shutil.copytree(images, tmp_path_factory.mktemp("encoding") / "bucket")
    succeeded(encode("tiles", autoencoder, bucket))
    words = ("train", "--dataset", "tiles-latents", "--run", "r", "--epochs", 2, "--bucket", bucket)
    succeeded(ddpm_here(*words, *settings(model__attention_sizes="4", sample__nearest="true")))
    return bucket


@torch.no_grad()
def judged(folder, way, x):
    """What diffusers makes of images or latents."""
    from diffusers import AutoencoderKL

    return getattr(AutoencoderKL.from_pretrained(folder).eval(), way)(x)


def moments_in(store, index):
    """The stored float16 [N, 8, H, W]."""
    return ImageCache(store, index).read(np.arange(index.images)).transpose(0, 3, 1, 2).copy()


def encode(source, autoencoder, bucket, *more):
    return ddpm_here("data", "encode", source, "--autoencoder", autoencoder, "--bucket", bucket, *more)


def test_latents_are_the_autoencoders(bucket, autoencoder):
    import webdataset

    store = open_store(str(bucket))
    index, source = load_index(store, KEY), load_index(store, "datasets/tiles-16")
    assert len(index.shards) == len(source.shards) > 2
    assert (str(index.size), index.row_shape, index.classes) == ("8", (8, 8, 16), source.classes)
    pixels = ImageCache(store, source).read(np.arange(source.images))
    theirs = judged(autoencoder, "encode", torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    theirs = torch.cat([theirs.mean, theirs.logvar], dim=1)
    paths = [str(bucket / KEY / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode())
    stored = np.stack([sample["npy"] for sample in samples])
    ours = torch.from_numpy(stored).float()
    assert (ours - theirs).abs().max() < 2e-3
    assert [sample["cls"] for sample in samples[:3]] == ImageCache(store, index).labels(np.arange(3)).tolist()
    assert np.array_equal(moments_in(store, index), stored)
    # Measured over what is drawn.
    drawn = latents_of(index).drawn(0, torch.arange(index.images), ours)
    assert drawn.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (drawn.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "tiles-latents", "--bucket", bucket))
    shown = succeeded(ddpm_here("data", "show", "tiles-latents", "--bucket", bucket))
    assert f"{index.images} as latents of 8×8×4, encoded from tiles-16" in shown


def test_memory_that_runs_out_while_encoding(bucket, images, autoencoder, tmp_path, monkeypatch):
    moments, copy = _Encoding._moments, shutil.copytree(images, tmp_path / "bucket")

    def with_little_memory(encoding, numbers):
        if len(numbers) > 5:
            raise torch.OutOfMemoryError
        return moments(encoding, numbers)

    monkeypatch.setattr(_Encoding, "_moments", with_little_memory)
    succeeded(encode("tiles", autoencoder, copy))
    stores = map(open_store, map(str, (bucket, copy)))
    some, others = (moments_in(store, load_index(store, KEY)) for store in stores)
    assert some == pytest.approx(others, abs=2e-3)


def test_a_run_decodes_what_it_draws(bucket, autoencoder):
    store = open_store(str(bucket))
    config, index = existing_config(store, "r"), load_index(store, KEY)
    assert (config.data.flip, config.sample.clip, config.image_shape) == (False, False, (4, 8, 8))
    assert verify_run(store, "r").problems == []
    rows = [json.loads(line) for path in (bucket / "runs/r/metrics").glob("*.jsonl") for line in path.open()]
    (held_out, *_) = (row for row in rows if "val_loss" in row)
    assert "val_bits_per_dim" not in held_out
    seeds = torch.arange(3)
    latents = ddim_50(estimate_of(bucket, "r", seeds), noise_of(seeds, config.image_shape)(0))
    assert (latents.abs() > 1).float().mean() > 0.1, "latents have no bounds, and clipping them has to be seen here"
    encoding = index.encoding
    z = latents * torch.tensor(encoding.std)[:, None, None] + torch.tensor(encoding.mean)[:, None, None]
    theirs = judged(autoencoder, "decode", z).sample.permute(0, 2, 3, 1)
    words = ("--count", 3, "--save", "png", "--batch-size", 3, "--steps", 50, "--precision", "fp32")
    succeeded(ddpm_here("sample", "--run", "r", "--bucket", bucket, *words))
    paths = sorted(bucket.glob("runs/r/samples/*/piece-00000/*.png"))
    ours = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert ours.std() > 5, "grey would equal grey"
    assert np.abs(ours - ((theirs + 1) * 127.5).clip(0, 255).numpy()).max() < 0.51


def test_edms_network_sees_latents_of_unit_variance(bucket):
    """By c_in of Karras et al. 2022, table 1; a user's own sigma_data stays."""
    store, edm = open_store(str(bucket)), {"diffusion.schedule": "edm", "diffusion.prediction": "edm"}
    index = load_index(store, KEY)
    x_0 = latents_of(index).drawn(0, torch.arange(index.images), torch.from_numpy(moments_in(store, index)))
    for chosen, expected in (({}, 1.0), ({"diffusion.sigma_data": 0.5}, 0.5)):
        request = TrainRequest("tiles-latents", bucket=str(bucket), run="edm", changes=edm | chosen)
        config = plan_run(request).config
        assert config.diffusion.sigma_data == method.prediction_of(config).sigma_data == expected
        if not chosen:
            for sigma in (0.002, 0.05, 0.5, 5.0, 80.0):
                x_t = x_0 + sigma * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
                variance = (method.process_of(config).input_scale(sigma) * x_t).var()
                assert variance == pytest.approx(1, abs=0.05), sigma


def test_a_run_on_latents_is_replayed_to_the_bit(bucket):
    seen = max(int(path.name.partition("-")[2]) for path in (bucket / "runs/r/checkpoints").iterdir())
    printed = succeeded(ddpm_here("replay", "r", "--image", seen, "--verify", "--bucket", bucket))
    assert printed.endswith(f"-{seen:012d}, file by file\n")


@pytest.mark.slow
def test_scores_compare_with_encoded_images(bucket):
    few = ("--extractor", "mobilenet", "--count", 12, "--references", 24)
    bound = ddpm_here("evaluate", "--run", "r", "--bucket", bucket, *few, "--metrics", "bpd")
    assert "the bound needs pixels, and tiles-latents holds latents" in refused(bound, 64)
    said = succeeded(ddpm_here("evaluate", "--run", "r", "--bucket", bucket, *few))
    assert "of tiles-16 (crop center" in said
    assert "bpd" not in said
    shutil.rmtree(bucket / "datasets/tiles-16/references")


def test_what_is_about_pixels_is_refused(bucket, tmp_path):
    train = ("train", "--dataset", "tiles-latents", "--run", "x", "--bucket", bucket)
    assert "data.flip needs pixels" in refused(ddpm_here(*train, "--set", "data.flip=true"), Exit.BAD_CONFIG)
    sample = ("sample", "--run", "r", "--bucket", bucket, "--mode", "img2img", "--image", "0")
    assert "holds latents" in refused(ddpm_here(*sample), Exit.BAD_REQUEST)
    again = encode("tiles-latents", tmp_path, bucket)
    assert "holds latents already, of tiles" in refused(again, Exit.BAD_REQUEST)
    done = ddpm_here("export", "--run", "r", "--to", tmp_path / "out", "--bucket", bucket)
    assert succeeded(done) and "DDIMPipeline samples pixels" in done.stderr


def test_changed_autoencoders_are_noticed(bucket, tmp_path):
    changed = shutil.copytree(bucket, tmp_path / "bucket")
    flip_a_bit(changed / KEY / "autoencoder" / NAMES[1], -1)
    verified = ddpm_here("data", "verify", "tiles-latents", "--bucket", changed)
    assert "diffusion_pytorch_model.safetensors differs from the index" in refused(verified, Exit.BAD_DATA)
    sample = ("sample", "--run", "r", "--seeds", 0, "--bucket", changed)
    done = ddpm_here(*sample, DDPM_CACHE=str(tmp_path / "cache"))
    assert "or autoencoder/config.json differs from the index" in refused(done, Exit.BAD_DATA)


def test_encoding_resumes_behind_the_last_shard(images, autoencoder, tmp_path, monkeypatch):
    bucket = shutil.copytree(images, tmp_path / "bucket")
    with monkeypatch.context() as patch:
        is_begun = StopWhen(lambda: any((bucket / KEY / "pieces").glob("*.json")))
        # In the place of one that listens to signals.
        is_begun.install = lambda signals=True: is_begun
        patch.setattr("job.coordination.outcome.Stop", lambda: is_begun)
        assert "all whole pieces are saved" in refused(encode("tiles", autoencoder, bucket), Exit.STOPPED)
    assert any((bucket / KEY / "pieces").glob("*.json")) and not (bucket / KEY / INDEX).exists()
    shards = {path: path.stat().st_mtime_ns for path in (bucket / KEY).glob("*.tar")}
    other = make_autoencoder(tmp_path / "other", layers_per_block=2)
    line = refused(encode("tiles", other, bucket), Exit.BAD_REQUEST)
    assert "holds shards of other images than tiles-held-out-16 has now, or with other parameters" in line
    succeeded(encode("tiles", autoencoder, bucket))
    assert min(shards).stat().st_mtime_ns == shards[min(shards)]
    assert not (bucket / KEY / "pieces").exists() or not list((bucket / KEY / "pieces").iterdir())
    assert "is there already" in refused(encode("tiles", autoencoder, bucket), Exit.BAD_REQUEST)
    # As if it had been killed between the part that is held out and the rest.
    index = (bucket / KEY / INDEX).read_bytes()
    (bucket / KEY / INDEX).unlink()
    succeeded(encode("tiles", autoencoder, bucket))
    assert (bucket / KEY / INDEX).read_bytes() == index
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "tiles-latents", "--bucket", bucket))


# What another autoencoder is made with, or else what is said in its files; the code, and the words.
UNFIT = [
    ({"in_channels": 1, "out_channels": 1}, {}, Exit.BAD_CONFIG, "encodes 1 channels"),
    ({"levels": 6, "block_out_channels": (4,) * 6}, {}, Exit.BAD_CONFIG, "halves images 5 times"),
    ({}, {"_class_name": "VQModel"}, Exit.BAD_DATA, "is a VQModel"),
    ({}, {"block_out_channels": [8, 10**9]}, Exit.BAD_DATA, "its weights do not fit its configuration"),
    ({}, {"layers_per_block": 10**9}, Exit.BAD_DATA, "do not fit its configuration (layers_per_block=1000000000"),
    ({}, {"layers_per_block": 2}, Exit.BAD_DATA, "its weights do not fit its configuration"),
    ({}, {"down_block_types": ["Nonsense"] * 2}, Exit.BAD_DATA, "its weights do not fit its configuration"),
    # Infinite latents; what is finite may still overflow.
    ({}, {"encoder.conv_in.bias": NAN}, Exit.BAD_DATA, "encoder.conv_in.bias holds values that are not finite"),
    ({}, {"quant_conv.bias": 1e30}, Exit.BAD_DATA, "image 0 of tiles"),
]


@pytest.mark.parametrize(("changes", "said", "code", "line"), UNFIT)
def test_unfit_and_damaged_autoencoders_are_refused(images, tmp_path, changes, said, code, line):
    other = make_autoencoder(tmp_path / "other", **changes)
    for name, value in said.items():
        if name.endswith("bias"):
            tensors = load_file(other / NAMES[1])
            tensors[name].fill_(value)
            save_file(tensors, other / NAMES[1])
        else:
            (other / NAMES[0]).write_text(json.dumps(json.loads((other / NAMES[0]).read_text()) | {name: value}))
    assert line in refused(encode("tiles", other, images, "--to", "bad"), code).replace("tiles-held-out", "tiles")
    (other / NAMES[1]).write_bytes((other / NAMES[1]).read_bytes()[:2000])
    assert code == Exit.BAD_CONFIG or "truncated" in refused(encode("tiles", other, images, "--to", "bad"), code)
    assert not list(open_store(images).list("datasets/bad-8"))


def test_infinite_packed_latents_are_named(bucket, tmp_path):
    """As somebody else's program may have written them, with all hashes right."""
    copied = shutil.copytree(bucket, tmp_path / "bucket")
    store = open_store(str(copied))
    index = load_index(store, KEY)
    shard = index.shards[0]
    content = bytearray((copied / KEY / shard.name).read_bytes())
    rows = np.frombuffer((copied / KEY / shard.offsets_name).read_bytes(), OFFSETS_DTYPE).copy()
    start, end = int(rows["offset"][1]), int(rows["offset"][1] + rows["bytes"][1])
    content[end - 2 : end] = np.float16("nan").tobytes()
    rows["sha256"][1] = np.void(hashlib.sha256(content[start:end]).digest()[:16])
    hashes = {"sha256": hashlib.sha256(content).hexdigest(), "offsets_sha256": hashlib.sha256(rows).hexdigest()}
    forged = shard.model_copy(update=hashes | {"name": shard_name(0, hashes["sha256"])})
    for old, new, data in ((shard.name, forged.name, content), (shard.offsets_name, forged.offsets_name, rows)):
        (copied / KEY / old).unlink()
        (copied / KEY / new).write_bytes(data)
    forged_index = index.model_copy(update={"shards": Shards.of([forged, *list(index.shards)[1:]])})
    (copied / KEY / INDEX).write_bytes(forged_index.to_json())
    line = refused(ddpm_here("data", "verify", "tiles-latents", "--bucket", copied), Exit.BAD_DATA)
    assert "image 1 (at byte" in line and "its latents are not finite" in line
    words = ("train", "--dataset", "tiles-latents", "--run", "new", "--epochs", 1, "--bucket", copied)
    done = ddpm_here(*words, *settings(model__attention_sizes="4"), DDPM_CACHE=str(tmp_path / "cache"))
    assert "image 1 (at byte" in refused(done, Exit.BAD_DATA)
    of_nothing = index.encoding.model_copy(update={"std": (0.0, *index.encoding.std[1:])})
    (copied / KEY / INDEX).write_bytes(index.model_copy(update={"encoding": of_nothing}).to_json())
    shown = ddpm_here("data", "show", "tiles-latents", "--bucket", copied)
    assert "encoding.std.0" in refused(shown, Exit.BAD_DATA)

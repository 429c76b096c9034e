"""What people type and hand over by mistake, or on purpose: one line says what, where and what to do, and nothing
half-made is left that a later command would take for whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from job.exits import Exit
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.records import Status
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded

STATUS = {
    "state": "finished",
    "fence": 1,
    "attempt": "0" * 32,
    "images_seen": 304,
    "target_images": 304,
    "epoch": 1.0,
    "loss": 0.5,
    "images_per_second": 10.0,
    "updated": "2025-01-01T00:00:00Z",
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local bucket with the embedded images at 16 pixels, and a run `good` of one epoch."""
    folder = tmp_path_factory.mktemp("bad-input")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(folder / "cache"))
        succeeded(ddpm_here("data", "pack", "landscape-sample", "tiles", "--size", 16, "--bucket", folder / "bucket"))
        succeeded(ddpm_here("train", *about(folder / "bucket", "good")))
        yield folder / "bucket"


def about(bucket: object, run: str, **changes: str) -> list[object]:
    # On a machine so slow that saves come by time as well, one checkpoint is left all the same.
    changes = {"checkpoint__keep_last": "1", **changes}
    return ["--dataset", "tiles", "--run", run, "--bucket", bucket, "--epochs", 1, *settings(**changes)]


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Requests that mean nothing are refused before anybody looks for the bucket, which is not there.


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ("bogus", 2, ["No such command 'bogus'"]),
        ("train", 2, ["Missing option '--dataset'"]),
        ("train --dataset", 2, ["--dataset", "requires an argument"]),
        ("train --dataset a --dataste b", 2, ["No such option", "--dataste", "--dataset"]),
        ("train --dataset a --epochs 0", 2, ["--epochs", "greater than or equal to 1"]),
        ("train --dataset a --epochs many", 2, ["--epochs", "valid integer"]),
        ("train --dataset a --processes 100000", 2, ["--processes", "less than or equal to 64"]),
        ("sample --run a --steps 0", 2, ["--steps", "greater than or equal to 1"]),
        ("data pack x", 2, ["Missing argument", "NAME"]),
        ("train --dataset a/b", 64, ["'a/b'", "dataset's name", "lower-case letters"]),
        ("train --dataset a --run a/b", 64, ["'a/b'", "run's name", "lower-case letters"]),
        ("train --dataset a --run ../a", 64, ["'../a'", "run's name"]),
        ("train --dataset a --preset landscap", 64, ["'landscap'", "did you mean 'landscape'?"]),
        ("sample --run a/b", 64, ["'a/b'", "run's name"]),
        ("sample --run a --sampler euler", 64, ["no sampler 'euler'", "ddpm, ddim"]),
        ("sample --run a --precision fp16", 64, ["'fp16'", "fp32 or bf16"]),
        ("sample --run a --seeds 3-1", 64, ["--seeds '3-1'", "backwards"]),
        ("sample --run a --seeds 0-99999", 64, ["--seeds", "at most 10,000"]),
        ("sample --run a --checkpoints newest", 64, ["--checkpoints 'newest'", "30,80,490, or latest, or all"]),
        ("data pack x a/b --size 8", 64, ["'a/b'", "dataset's name"]),
        ("data pack x a", 64, ["--size is needed", "try --size 64"]),
        ("data pack x a --size 8 --crop middle", 64, ["--crop 'middle'", "center"]),
        ("data pack x a --size 8 --filter cubic", 64, ["'cubic'", "lanczos, bicubic"]),
        ("data pack x a --size 8 --channels 2", 64, ["--channels 2", "3 for colour or 1 for grey"]),
        ("data show a -o sheet.jpg", 64, ["sheet.jpg", "end in .png"]),
        ("data show a -o nowhere/sheet.png", 64, ["nowhere/sheet.png", "no folder nowhere"]),
        ("figure noising --dataset a --schedule sine", 64, ["no schedule 'sine'", "linear, cosine"]),
        ("figure noising --dataset a --timesteps 1000", 64, ["1000 is not in 0 to 999"]),
        ("figure noising --dataset a -o nowhere/n.png", 64, ["nowhere/n.png", "no folder nowhere"]),
        ("train --dataset a --set train.batchsize=8", 78, ["'train.batchsize'", "did you mean 'train.batch_size'?"]),
        ("train --dataset a --set train.batch_size", 78, ["'train.batch_size'", "key=value"]),
        ("train --dataset a --set train.batch_size=-8", 78, ["train.batch_size", "greater than", "got -8"]),
        ("train --dataset a --set train.learning_rate=.nan", 78, ["train.learning_rate", "finite"]),
        ("train --dataset a --set train.seed=[", 78, ["'train.seed=['", "not valid YAML"]),
        ("train --dataset a --set data.size=33", 78, ["data.size=33", "multiple of 4", "fewer levels"]),
        ("train --dataset a --set data.size=32 --set model.norm_groups=7", 78, ["model.channels=32", "groups=7"]),
        ("train --dataset a --set model.norm_groups=7", 78, ["model.norm_groups=7", "model.channels=32"]),
        ("train --dataset a --set model.channels=5 --set model.norm_groups=1", 78, ["model.channels=5 must be even"]),
        ("train --dataset a --set model.channels=1000000", 78, ["model.channels", "less than or equal to 4096"]),
        ("train --dataset a --set model.channel_mults=0,1", 78, ["model.channel_mults", "between 1 and 64"]),
        ("train --dataset a --set model.channel_mults=true", 78, ["model.channel_mults", "true and false"]),
        ("train --dataset a --set train.adam_betas=0.9,7", 78, ["train.adam_betas.1", "less than 1"]),
        ("train --dataset a --set sample.spacing=leading --set sample.steps=400", 78, ["t=798 of 1000", "500 or 333"]),
        ("figure denoising --run a --seeds 0-12", 64, ["--seeds 0-12", "up to 12 images, not 13"]),
        ("data pack b c --size 5000", 2, ["--size", "4096"]),
        ("train --dataset a --set sample.steps=2000", 78, ["sample.steps=2000", "diffusion.timesteps=1000"]),
        ("train --dataset a --epochs 100000000000000000000", 78, ["train.epochs", "less than or equal to 1000000"]),
        ("train --dataset a --set preset=celeba", 78, ["preset", "--preset NAME"]),
        ("train --dataset a --set data.dataset=b", 78, ["data.dataset", "--dataset NAME"]),
        ("train --dataset a --config {alias}", 78, ["alias.yaml", "aliases (*loop) are not supported"]),
        ("train --dataset a --config {deep}", 78, ["deep.yaml", "nested too deeply"]),
        ("train --dataset a --config {config}", 78, ["bad.yaml", "'trian.epochs'", "did you mean 'train.epochs'?"]),
        ("train --dataset a --config {notes}", 78, ["notes.yaml", "mapping of sections"]),
        ("train --dataset a --config {nowhere}", 66, ["nowhere", "No such file"]),
    ],
)
def test_a_request_that_means_nothing(tmp_path, monkeypatch, words, code, parts):
    (tmp_path / "bad.yaml").write_text("trian:\n  epochs: 3\n")
    (tmp_path / "notes.yaml").write_text("- buy milk\n")
    (tmp_path / "alias.yaml").write_text("train: &loop\n  epochs: *loop\n")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    nowhere = tmp_path / "nowhere"
    files = {name: tmp_path / f"{name}.yaml" for name in ("notes", "alias", "deep")}
    typed = words.format(config=tmp_path / "bad.yaml", nowhere=nowhere, **files).split()
    monkeypatch.chdir(tmp_path)
    line = refused(ddpm_here(*typed, DDPM_BUCKET=str(nowhere)), code)
    assert all(part in line for part in parts), line
    assert not nowhere.exists()


@pytest.mark.parametrize(
    ("bucket", "code", "parts"),
    [
        ("{folder}/nowhere", 66, ["{folder}/nowhere is no folder", "check the path"]),
        ("{folder}/file", 66, ["{folder}/file is no folder"]),
        ("az://mine", 64, ["'az://mine'", "gs://BUCKET"]),
        ("gs://", 64, ["gs:// names no bucket"]),
        ("", 64, ["names no folder"]),
    ],
)
@pytest.mark.parametrize("words", ["data list", "runs list", "train --dataset a", "data verify a"])
def test_a_bucket_that_is_not_there(tmp_path, words, bucket, code, parts):
    (tmp_path / "file").write_text("no bucket")
    line = refused(ddpm_here(*words.split(), "--bucket", bucket.format(folder=tmp_path)), code)
    assert all(part.format(folder=tmp_path) in line for part in parts), line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    ["data list", "data ensure celeba", "data pack landscape-sample a --size 8", "train --dataset a", "sample --run a"],
)
def test_an_object_server_without_the_bucket(gcs_server, words):
    line = refused(ddpm_here(*words.split(), "--bucket", "gs://no-such-bucket"), 66)
    assert "no bucket gs://no-such-bucket" in line
    assert "gcloud storage buckets create" in line


class Forbidding(BaseHTTPRequestHandler):
    """Answers as Google does when an account lacks a permission."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        message = "me@example.com does not have storage.objects.list access to the Google Cloud Storage bucket."
        body = json.dumps({"error": {"code": 403, "message": message, "errors": []}}).encode()
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def forbidding_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "words",
    ["data list", "data pack landscape-sample a --size 8", "train --dataset a", "sample --run a", "runs show a"],
)
def test_no_permission(forbidding_server, words):
    line = refused(
        ddpm_here(*words.split(), "--bucket", "gs://theirs", STORAGE_EMULATOR_HOST=forbidding_server),
        Exit.NO_PERMISSION,
    )
    assert "gs://theirs" in line
    assert "storage.objects.list" in line
    assert "roles/storage.objectUser" in line


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ("train --dataset other", 66, ["no dataset 'other'"]),
        ("train --dataset tiles --run good --set data.size=32", 66, ["'tiles' at 32 pixels", "there is tiles-16"]),
        (
            "train --dataset tiles --run good --set train.seed=1",
            78,
            ["train.seed: the run has 0, asked for 1", "--run"],
        ),
        ("train --dataset tiles --run new --set data.channels=1", 78, ["data.channels is 1", "tiles-16 has 3"]),
        ("train --dataset tiles --run new --set model.num_classes=4", 78, ["num_classes is 4", "tiles-16 has 5"]),
        (
            "train --dataset tiles --run new --set model.channel_mults=1,1,1,1,1,1",
            78,
            ["data.size=16 cannot be halved 5 times", "multiple of 32"],
        ),
        ("sample --run other", 66, ["no run 'other'", "ddpm runs list"]),
        ("sample --run good --checkpoints 1,7", 66, ["no checkpoint of epoch 7", "there are: 1)"]),
        ("sample --run good --checkpoints 7 --processes 2", 66, ["no checkpoint of epoch 7", "there are: 1)"]),
        ("sample --run good --steps 51", 78, ["--steps 51 exceeds", "diffusion.timesteps=50"]),
        ("figure denoising --run other", 66, ["no run 'other'"]),
        ("figure noising --dataset other", 66, ["no dataset 'other'"]),
        ("data show other", 66, ["no dataset 'other'"]),
        ("data verify tiles --size 8", 66, ["'tiles' at 8 pixels", "there is tiles-16"]),
        ("data pack landscape-sample tiles --size 16", 64, ["tiles-16 is there already", "299 images"]),
        ("data pack {bucket}/nothing.zip new --size 8", 66, ["nothing at", "nothing.zip", "folder or an archive"]),
        ("runs show other", 66, ["no run 'other'"]),
        ("submit train --dataset tiles --on mars", 64, ["no target 'mars'", "local"]),
    ],
)
def test_what_is_not_there_or_does_not_fit(bucket, words, code, parts):
    before = everything(bucket)
    line = refused(ddpm_here(*words.format(bucket=bucket).split(), DDPM_BUCKET=str(bucket)), code)
    assert all(part in line for part in parts), line
    assert everything(bucket) == before


@pytest.mark.parametrize("words", [["train", "--run", "new"], ["sample", "--run", "good"]])
def test_gpus_that_are_not_there(bucket, words):
    words = [*words, "--bucket", bucket, *(["--dataset", "tiles"] if words[0] == "train" else [])]
    done = ddpm(*words, DDPM_GPUS="1")
    assert "this job was given 1 GPU, and PyTorch sees 0" in refused(done, Exit.MISSING_INPUT)
    assert not (bucket / "runs/new").exists()


def test_more_processes_than_images_in_a_batch(bucket):
    before = everything(bucket)
    words = "train --dataset tiles --run new --processes 3 --set train.batch_size=2"
    line = refused(ddpm(*words.split(), DDPM_BUCKET=str(bucket)), 78)
    assert "3 processes cannot share train.batch_size=2" in line
    assert "--processes N" in line
    assert everything(bucket) == before


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ("train --dataset a --run a/b", 64, "'a/b' cannot be a run's name"),
        ("data list", 66, "{bucket} is no folder"),
        ("submit train --dataset a", 66, "{bucket} is no folder"),
        ("submit train --dataset a --epoch 3", 2, "No such option: --epoch"),
        ("submit train --dataset a --set x=1", 78, "unknown key 'x'"),
    ],
)
def test_the_line_and_the_code_reach_the_shell(tmp_path, words, code, part):
    line = refused(ddpm(*words.split(), DDPM_BUCKET=str(tmp_path / "nowhere")), code)
    assert part.format(bucket=tmp_path / "nowhere") in line


def test_a_dataset_without_a_source_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ddpm_here("data", "ensure", "celeba", "--bucket", "b")
    line = refused(done, Exit.MISSING_INPUT)
    assert line == (
        "ddpm: dataset 'celeba' is not in b yet. Get img_align_celeba.zip from the CelebA project page, then type"
    )
    assert done.stderr.splitlines()[1:] == [
        "  make submit-train DATASET=celeba SOURCE=path/to/it SIZE=64 BUCKET=b",
        "or, to pack alone,",
        "  ddpm data pack path/to/it celeba --size 64 --bucket b",
    ]
    assert not list(tmp_path.iterdir())


def test_rotten_checkpoints_are_named_and_not_used(bucket, tmp_path):
    run = open_store(str(bucket)).sub("runs/good")
    (ref,) = list_checkpoints(run)
    name = load_manifest(run, ref).files[0].name
    path = Path(run.uri_of(f"{ref.key}/{name}"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for words in (["train", *about(bucket, "good"), "--epochs", 2], ["sample", "--run", "good", "--raw"]):
            done = ddpm_here(*words, DDPM_BUCKET=str(bucket))
            assert done.returncode == Exit.BAD_DATA
            assert "Traceback" not in done.stderr
            assert f"{path} is rotten" in done.stderr.splitlines()[-1]
    finally:
        path.write_bytes(content)


def test_rotten_descriptions_are_named(tmp_path):
    bucket = tmp_path / "bucket"
    for key in ("datasets/mine-16/index.json", "runs/mine/config.yaml"):
        (bucket / key).parent.mkdir(parents=True)
        (bucket / key).write_text("{ : ")
    for words, name in (
        ("train --dataset mine --run new", "datasets/mine-16/index.json"),
        ("data show mine", "datasets/mine-16/index.json"),
        ("train --dataset mine", "runs/mine/config.yaml"),
        ("sample --run mine", "runs/mine/config.yaml"),
        ("runs show mine", "runs/mine/config.yaml"),
    ):
        assert f"{bucket}/{name}" in refused(ddpm_here(*words.split(), "--bucket", bucket), Exit.BAD_DATA)
    assert "its index.json is damaged" in succeeded(ddpm_here("data", "list", "--bucket", bucket))
    # What the message says to type works.
    assert f"`ddpm data delete mine --size 16 --bucket {bucket}`" in refused(
        ddpm_here("data", "show", "mine", "--bucket", bucket), Exit.BAD_DATA
    )
    succeeded(ddpm_here("data", "delete", "mine", "--size", 16, "--bucket", bucket, "--yes"))
    succeeded(ddpm_here("data", "pack", "landscape-sample", "mine", "--size", 16, "--bucket", bucket))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"state": 3}',
        b"\xff",
        Status.model_construct(**STATUS).to_json()[:-1],
        Status.model_construct(state="finished").to_json(),
        Status.model_construct(**{**STATUS, "updated": "now"}).to_json(),
    ],
)
def test_a_damaged_status_is_as_good_as_none(bucket, content):
    path = bucket / "runs/good/status.json"
    before = path.read_bytes()
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for words in (["list"], ["show", "good"]):
            assert "good" in succeeded(ddpm_here("runs", *words, "--bucket", bucket))
    finally:
        path.write_bytes(before)


def test_a_run_that_is_not_there_is_looked_for_in_the_bucket_that_was_named(bucket):
    line = refused(ddpm_here("runs", "show", "nobody", "--bucket", bucket), Exit.MISSING_INPUT)
    assert f"there is no run 'nobody' in {bucket}:" in line


def test_more_images_than_a_run_can_count(bucket, monkeypatch):
    monkeypatch.setattr("job.plan.MAX_IMAGES_SEEN", 1000)
    line = refused(ddpm_here("train", *about(bucket, "long"), "--epochs", 4), Exit.BAD_CONFIG)
    assert "train.epochs=4 of 299 images are more than the 1,000 that a run can count" in line
    assert not (bucket / "runs/long").exists()

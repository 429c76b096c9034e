"""Credentials stay where they are: none reaches a bucket, the local cache or what a program prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import job
from job.exits import BadRequestError, Exit
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded
from tests.job.data.file_server import server_fixture  # noqa: F401
from tests.job.some_images import encoded, folder_of, picture, png, zip_of
from tests.servers import SECRET

MARKED = {
    name: f"marked-{name.lower().replace('_', '-')}-8f3a"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "GOOGLE_OAUTH_ACCESS_TOKEN")
}
PRIVATE_KEY = "marked-private-key-8f3a"


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables that hold or name secrets; each secret has a mark that `told` looks for."""
    account = {"type": "service_account", "client_email": "a@b.c", "private_key": PRIVATE_KEY, "token_uri": "http://x"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    variables = {**MARKED, "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def told(text: str | bytes) -> list[str]:
    """The secrets in a text."""
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in (SECRET, PRIVATE_KEY, *MARKED.values()) if secret.encode() in data]


@pytest.mark.slow
@pytest.mark.parametrize("bucket_uri", ["gs", "s3"], indirect=True)
def test_a_run_stores_no_secret(bucket_uri, secrets, tmp_path):
    bucket, cache = bucket_uri, tmp_path / "cache"
    images = folder_of(tmp_path / "images", [(f"{n}.png", encoded(picture(n, 12, 12))) for n in range(12)])
    train = ["train", "--dataset", "small", "--bucket", bucket, "--epochs", 1, *settings(train__batch_size="12")]
    printed = []
    for words in (
        ["data", "pack", images, "small", "--size", 8, "--bucket", bucket],
        train,
        ["sample", "--run", "small", "--bucket", bucket, "--seeds", "0", "--steps", "1"],
        ["runs", "show", "small", "--bucket", bucket],
    ):
        # The run itself in processes of its own, as people start it.
        done = (ddpm if words is train else ddpm_here)(*words, DDPM_CACHE=str(cache))
        succeeded(done)
        printed.append(done.stdout + done.stderr)
    assert [secret for text in printed for secret in told(text)] == []
    store = open_store(bucket)
    keys = [entry.key for entry in store.list()]
    assert {"runs/small/config.yaml", "runs/small/attempts/000001.json", "datasets/small-8/index.json"} <= set(keys)
    assert [(key, secret) for key in keys for secret in told(key.encode() + store.read(key).data)] == []
    held = [path for path in cache.rglob("*") if path.is_file()]
    assert held
    assert [(path, secret) for path in held for secret in told(path.read_bytes())] == []


def test_refusals_repeat_no_credentials(secrets, tmp_path, monkeypatch):
    """A broken key file, a password, and the signature of a source that a job would show."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    targets, signed = tmp_path / "targets.yaml", f"https://host/archive.zip?X-Amz-Signature={SECRET}"
    targets.write_text("gke: {backend: kubernetes, image: i, bucket: gs://bucket}\n")
    pack, bucket = ("a", "--size", 8), ("--bucket", tmp_path / "bucket")
    on_a_cluster = (*pack, "--on", "gke", "--targets", targets, "--dry-run")
    for words, code in (
        (("data", "list", "--bucket", "gs://any"), Exit.NO_PERMISSION),
        (("data", "pack", f"https://somebody:{SECRET}@host/archive.zip", *pack, *bucket), Exit.BAD_REQUEST),
        (("data", "ensure", "a", "--source", f"s3://KEY:{SECRET}@mine/folder", *bucket), Exit.BAD_REQUEST),
        *(
            (words, code)
            for secret in (f"?sig={SECRET}", f"#{SECRET}")
            for words, code in (
                (("runs", "show", f"gs://mine/runs/a{secret}"), Exit.BAD_REQUEST),
                (("data", "index", f"https://host/a.tar{secret}", *pack, *bucket), Exit.BAD_REQUEST),
                (("data", "list", "--bucket", f"gs://mine{secret}"), Exit.BAD_REQUEST),
                (("import", f"http://host/a.pt{secret}", "--run", "a", *bucket), Exit.BAD_REQUEST),
                (("submit", "pack", f"https://host/a.zip{secret}", *on_a_cluster), Exit.BAD_REQUEST),
            )
        ),
        (("submit", "pack", signed, *on_a_cluster), Exit.BAD_REQUEST),
    ):
        done = ddpm_here(*words)
        refused(done, code)
        assert told(done.stdout + done.stderr) == []
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize(
    "place", ["https://host/runs/a", "https://host/a", "gs://mine/runs/a", "s3://mine/a", "a/runs/b"]
)
@pytest.mark.parametrize("secret", [f"?sig={SECRET}", f"#{SECRET}"])
def test_loading_repeats_no_signature(place, secret):
    with pytest.raises(BadRequestError) as error:
        job.load(f"{place}{secret}")
    assert told(str(error.value)) == []


@pytest.mark.parametrize("secret", [f"?sig={SECRET}", f"#{SECRET}"])
def test_signed_sources_leave_no_signature(server, tmp_path, secret):
    """It is needed to read a source, and shown and stored nowhere; a wrong one means that nothing is there."""
    handler, url = server
    images = [(f"{n}.png", png(n)) for n in range(3)]
    archive = zip_of(tmp_path / "all.zip", images).read_bytes()
    table = b"file,kind\n" + b"".join(b"%b,%d\n" % (name.encode(), n % 2) for n, (name, _) in enumerate(images))
    handler.content = {"/all.zip": archive, "/kinds.csv": table}
    at, bucket = ("--size", 16, "--bucket", tmp_path / "bucket"), tmp_path / "bucket"
    words = ("data", "pack", f"{url}/all.zip{secret}", "a", "--labels", f"{url}/kinds.csv{secret}", *at)
    done = [ddpm_here(*words, DDPM_CACHE=str(tmp_path / "cache"))]
    assert "classes  0, 1" in succeeded(done[0])
    for place, labels in (("none.zip", "kinds.csv"), ("all.zip", "none.csv")):
        words = ("data", "pack", f"{url}/{place}{secret}", "b", "--labels", f"{url}/{labels}{secret}", *at)
        done.append(ddpm_here(*words, DDPM_CACHE=str(tmp_path / "cache")))
        assert "there is nothing at" in refused(done[-1], Exit.MISSING_INPUT)
    assert [secret for each in done for secret in told(each.stdout + each.stderr)] == []
    files = [path for folder in (bucket, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if told(path.read_bytes())] == []

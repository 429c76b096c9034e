"""Credentials stay where they are: none reaches a bucket, the local cache or what a program prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from job.exits import Exit
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, refused, settings, succeeded
from tests.job.some_images import encoded, folder_of, picture
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


@pytest.mark.parametrize("bucket_uri", ["gs", pytest.param("s3-seaweedfs", marks=pytest.mark.slow)], indirect=True)
def test_a_run_stores_no_secret(bucket_uri, secrets, tmp_path):
    bucket, cache = bucket_uri, tmp_path / "cache"
    images = folder_of(tmp_path / "images", [(f"{n}.png", encoded(picture(n, 12, 12))) for n in range(12)])
    train = ["train", "--dataset", "small", "--bucket", bucket, "--epochs", 2, *settings(train__batch_size="12")]
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


def test_what_is_refused_is_not_repeated(seaweedfs_server, aws_credentials, secrets, monkeypatch):
    """Credentials, a password in the address of a server, and a broken key file."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    for uri, code, variables in (
        ("s3://any", Exit.NO_PERMISSION, {"AWS_ENDPOINT_URL": seaweedfs_server, "AWS_ACCESS_KEY_ID": "nobody"}),
        ("s3://any", Exit.BAD_REQUEST, {"AWS_ENDPOINT_URL": f"http://somebody:{SECRET}@127.0.0.1:1"}),
        ("gs://any", Exit.NO_PERMISSION, {}),
    ):
        done = ddpm_here("data", "list", "--bucket", uri, **variables)
        refused(done, code)
        assert told(done.stdout + done.stderr) == []


def test_uris_with_passwords_are_refused(tmp_path):
    bucket, targets = tmp_path / "bucket", tmp_path / "targets.yaml"
    targets.write_text("gke: {backend: kubernetes, image: i, bucket: gs://bucket}\n")
    for uri in (
        f"s3://AKIAEXAMPLE:{SECRET}@my-bucket",
        f"s3://AKIAEXAMPLE:ab/{SECRET}@my-bucket/folder",
        f"gs://somebody:{SECRET}@my-bucket/folder",
        f"https://somebody:{SECRET}@host/archive.zip",
        f"https://my-bucket.s3.amazonaws.com/archive.zip?X-Amz-Signature={SECRET}",
        f"hdfs://somebody:{SECRET}@host/folder",
    ):
        sources = (
            ["data", "pack", uri, "a", "--size", 8, "--bucket", bucket],
            ["data", "ensure", "a", "--source", uri, "--bucket", bucket],
        )
        # One that is signed is asked for, but handed to nobody else.
        signed = ["submit", "pack", uri, "a", "--size", 8, "--on", "gke", "--targets", targets, "--dry-run"]
        for words in (["data", "list", "--bucket", uri], *([signed] if "?" in uri else sources)):
            done = ddpm_here(*words)
            line = refused(done, Exit.BAD_REQUEST)
            assert re.search("is not supported|a user, password or|a user and password|which may be a signature", line)
            assert told(done.stdout + done.stderr) == []
    assert not bucket.exists()

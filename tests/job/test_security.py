"""What is read may come from anybody: nothing of it is executed, wherever a loader looks.

Credentials stay where they are: none reaches a bucket, the local cache or what a program prints.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import job
from job.data.shards import INDEX, SHARDS_DTYPE, Shard, Shards, ShardWriter, load_index
from job.exits import BadRequestError, Exit
from job.runs.checkpoints import Manifest
from job.runs.records import Attempt
from job.store import open_store
from tests.job.command_line import ddpm, ddpm_here, ran, refused, settings, succeeded
from tests.job.data.file_server import server_fixture  # noqa: F401
from tests.job.some_images import encoded, files_in, folder_of, picture, png, zip_of
from tests.servers import SECRET

CHECKOUT = Path(__file__).parents[2]
DATASET, RUN = "datasets/small-8", "runs/small"
SMALL = settings(train__batch_size="12", log__every_images="12", sample__steps="1", sample__images="1")
SMALL_IMAGES = [(f"{n}.png", encoded(picture(n, 12, 12))) for n in range(12)]


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def payloads(marker: Path) -> list[bytes]:
    """Contents that make a folder when unsafe loaders read them; the last one claims more memory than a machine has."""
    payload, weights, array = Payload(marker), io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.ones(3), "payload": payload}, weights)
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    return [
        pickle.dumps(payload),
        weights.getvalue(),
        array.getvalue(),
        f"train: !!python/object/apply:os.mkdir ['{marker}']\n".encode(),
        json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, [str(marker)]]}).encode(),
        struct.pack("<Q", 1 << 45) + b'{"weight":',
    ]


def test_unsafe_loaders_execute_the_payloads(tmp_path):
    loaders = (
        pickle.loads,
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
        lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        lambda data: yaml.load(data, yaml.UnsafeLoader),
    )
    for content, unsafe_load in zip(payloads(tmp_path / "marker"), loaders, strict=False):
        unsafe_load(content)
        (tmp_path / "marker").rmdir()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a dataset of twelve images and a run of two epochs over it."""
    folder = tmp_path_factory.mktemp("security")
    images, bucket = folder_of(folder / "images", SMALL_IMAGES), folder / "bucket"
    ran("data", "pack", images, "small", "--size", 8, "--bucket", bucket)
    succeeded(train(bucket, folder / "cache", epochs=2))
    return bucket


def train(bucket: Path, cache_dir: Path, epochs: int = 3, *more: str):
    words = ["--dataset", "small", "--bucket", bucket, "--epochs", epochs]
    return ddpm_here("train", *words, *SMALL, *more, DDPM_CACHE=str(cache_dir))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What no test may find when it ends; and nobody waits for the holder of a lease that is no lease."""
    monkeypatch.setattr("job.coordination.lease.EXPIRE_SECONDS", 0.5)
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def plant_tensors(bucket: Path, content: bytes) -> None:
    path = max((bucket / RUN).glob("checkpoints/*/MANIFEST.json"))
    manifest = Manifest.from_json(path.read_bytes(), "here")
    vouching = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = tuple(file.model_copy(update=vouching) for file in manifest.files)
    for file in files:
        (bucket / RUN / file.key).write_bytes(content)
    path.write_bytes(manifest.model_copy(update={"files": files}).to_json())


def plant_configuration(bucket: Path, content: bytes) -> None:
    (bucket / RUN / "config.yaml").write_bytes(content)
    path = bucket / RUN / "attempts/000001.json"
    attempt = Attempt.from_json(path.read_bytes(), "here")
    vouching = {"config_sha256": hashlib.sha256(content).hexdigest()}
    path.write_bytes(attempt.model_copy(update=vouching).to_json())


def replace_shard(bucket: Path, shard: Shard) -> None:
    """Another one in the dataset's index, which vouches for itself again; the run goes on with what it finds."""
    index = load_index(open_store(str(bucket)), DATASET).model_copy(update={"shards": Shards.of([shard])})
    (bucket / DATASET / INDEX).write_bytes(index.to_json())
    shutil.rmtree(bucket / RUN)


def plant_offsets(bucket: Path, content: bytes) -> None:
    """A table of the right length whose rows are nonsense."""
    (shard,) = load_index(open_store(str(bucket)), DATASET).shards
    path = bucket / DATASET / shard.offsets_name
    table = content[: path.stat().st_size].ljust(path.stat().st_size, b"\xff")
    path.write_bytes(table)
    replace_shard(bucket, shard.model_copy(update={"offsets_sha256": hashlib.sha256(table).hexdigest()}))


def plant_image(bucket: Path, content: bytes) -> None:
    writer = ShardWriter(bucket / DATASET / "shard-00000.tar")
    for number in range(12):
        writer.add(f"{number:09d}", content if number == 7 else encoded(picture(number, 8, 8)), -1)
    shard, offsets = writer.finish()
    (bucket / DATASET / shard.offsets_name).write_bytes(offsets)
    replace_shard(bucket, shard)


def bomb() -> bytes:
    """A PNG of 20,000 × 20,000 black pixels: 50 kilobytes, which decode to more than a gigabyte."""
    rows = zlib.compress(bytes(20_000 * (1 + 20_000 // 8)), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_a_payload_with_the_right_hashes(trained, tmp_path, marker):
    """Or a table of zeros: in the cache, too, one that was never read is all zeros."""
    in_memory, streamed = "data.cache_gigabytes=32", "data.cache_gigabytes=1e-6"
    for plant, said, more, *commands in (
        (plant_tensors, ".safetensors holds no tensors", [], "sample"),
        (plant_configuration, "config.yaml", [], "sample"),
        (plant_offsets, "shard-00000.offsets points beyond", [bytes(1 << 16)], in_memory),
        (plant_image, "shard-00000.tar, image 7 (at byte ", [bomb()], in_memory, streamed),
    ):
        for content, command in product(payloads(marker) + more, commands):
            bucket = shutil.copytree(trained, tmp_path / "bucket")
            plant(bucket, content)
            if command == "sample":
                done = ddpm_here("sample", "--run", "small", "--bucket", bucket)
            else:
                done = train(bucket, tmp_path / "cache", 3, "--set", command)
            assert said in refused(done, Exit.BAD_DATA), (plant, content[:100], command)
            shutil.rmtree(bucket)


def test_payloads_in_a_source_and_journal(tmp_path, marker):
    for number, content in enumerate(payloads(marker)):
        place, bucket = tmp_path / str(number), tmp_path / str(number) / "b"
        bad = ("0.npy", "0.npz", "0.pt", "0.pkl", "0.cls", "config.yaml", "x.png")
        files = SMALL_IMAGES[:3] + [(name, content) for name in bad] + [("bomb.png", bomb())]
        journal = [(f"pieces/{name}.json", content) for name in ("parameters", "shard-00000", "shard-00001")]
        folder_of(bucket / DATASET, [*journal, ("shard-00000.tar", content), ("shard-00000.offsets", b"")])
        images = folder_of(place / "images", files)
        words = ("data", "pack", images, "small", "--size", 8, "--bucket", bucket, "--no-classes")
        # A label that no other image has, or no text.
        refused(ddpm_here(*words[:-1]), Exit.BAD_DATA)
        # What the message says is to be done helps.
        assert f"`ddpm data delete small --size 8 --bucket {bucket}`" in refused(ddpm_here(*words), Exit.BAD_REQUEST)
        ran("data", "delete", "small", "--size", 8, "--bucket", bucket, "--yes")
        out = ran(*words)
        assert "images   3 colour" in out and "rejects  2," in out
        assert "(400000000 pixels)" in (bucket / DATASET / "rejects.jsonl").read_text()
        ran("data", "verify", "small", "--bucket", bucket)
        names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "a.npy")
        folder_of(place / "mnist", [(name, content) for name in names])
        for source in (place / "mnist", place / "mnist" / "a.npy"):
            done = ddpm_here("data", "pack", source, "small", "--size", 16, "--bucket", bucket)
            assert str(source) in refused(done, Exit.BAD_DATA)


def test_a_hostile_table_of_shards_is_refused(trained, tmp_path):
    index = load_index(open_store(str(trained)), DATASET)
    sizes = [{"images": 0}, {"images": 8_000_000}, {"images": (1 << 25) + 1, "bytes": 1 << 40}]
    sizes += [{"bytes": 0}, {"bytes": 1 << 44}, {"bytes": (1 << 64) - 1}]
    elsewhere = ("http://host/a.tar", "file:///a.tar", "../a.tar", "gs://b/a\n.tar", "gs://b/")
    for first, uris, said in (
        *((first, (), "impossible sizes") for first in sizes),
        *(({"number": number}, (), "impossible numbers") for number in (1, 10**9)),
        *(({}, uris, "some shards lack a URI") for uris in (("/a.tar",), ("/a.tar", ""))),
        *(({}, (uri, uri), "an index may not name this URI") for uri in elsewhere),
    ):
        rows = np.frombuffer(bytes.fromhex(index.shards.table), SHARDS_DTYPE).repeat(2)
        rows["number"] = 0, 1
        for name, value in first.items():
            rows[name][0] = value
        hostile = index.shards.model_copy(update={"table": rows.tobytes().hex(), "uris": uris})
        folder_of(tmp_path / DATASET, [(INDEX, index.model_copy(update={"shards": hostile}).to_json())])
        line = refused(ddpm_here("data", "show", "small", "--bucket", tmp_path), Exit.BAD_DATA)
        assert said in line and f"{DATASET}/index.json" in line


UNSAFE = re.compile(
    r"(?<![\w.])(?:eval|exec|compile|__import__)\(|os\.(?:system|popen)|getoutput|shell=True|extractall\("
    r"|(?:pickle|marshal|joblib|torch\.jit)\.loads?\b|Unpickler|shelve|read_pickle|yaml\.\w*load\w*"
    r"|torch\.load\((?![^)]*weights_only=True)|allow_pickle=True|(?:np|numpy)\.load\((?![^)]*allow_pickle=False)"
)
KNOWN = {
    ("job/processes/ranks.py", "pickle.loads"),  # between the processes of one run
    ("job/config/__init__.py", "yaml.load"),  # with a SafeLoader
    ("ddpm/features.py", "torch.jit.load"),  # of a file whose hash is known
    ("job/own_code.py", "compile("),  # of the file that a command names
    ("job/own_code.py", "exec("),
}


def test_the_program_has_no_unsafe_loader():
    sources = [path for part in ("ddpm", "job") for path in (CHECKOUT / part).rglob("*.py")]
    assert len(sources) > 60
    found = {(str(path.relative_to(CHECKOUT)), call) for path in sources for call in UNSAFE.findall(path.read_text())}
    assert found == KNOWN


PRIVATE_KEY = "marked-private-key-8f3a"
MARKED = {
    name: f"marked-{name.lower().replace('_', '-')}-8f3a"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "GOOGLE_OAUTH_ACCESS_TOKEN")
}


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that hold or name secrets; each secret has a mark that `told` looks for."""
    account = {"type": "service_account", "client_email": "a@b.c", "private_key": PRIVATE_KEY, "token_uri": "http://x"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    for name, value in {**MARKED, "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json")}.items():
        monkeypatch.setenv(name, value)


def told(text: str | bytes) -> list[str]:
    """The secrets in a text."""
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in (SECRET, PRIVATE_KEY, *MARKED.values()) if secret.encode() in data]


def tell_no_secret(*folders: Path) -> None:
    """Reads all files below the folders, of which each must have some."""
    for held in map(files_in, folders):
        assert held and [(name, secret) for name, data in held.items() for secret in told(data)] == []


@pytest.mark.slow
@pytest.mark.parametrize("bucket_uri", ["gs", "s3"], indirect=True)
def test_a_run_stores_no_secret(bucket_uri, secrets, tmp_path):
    images, at = folder_of(tmp_path / "images", SMALL_IMAGES), ("--bucket", bucket_uri)
    for run, *words in (
        (ddpm_here, "data", "pack", images, "small", "--size", 8),
        # The run itself in processes of its own, as people start it.
        (ddpm, "train", "--dataset", "small", "--epochs", 1, *settings(train__batch_size="12")),
        (ddpm_here, "sample", "--run", "small", "--seeds", "0", "--steps", "1"),
        (ddpm_here, "runs", "show", "small"),
    ):
        done = run(*words, *at, DDPM_CACHE=str(tmp_path / "cache"))
        succeeded(done)
        assert told(done.stdout + done.stderr) == []
    store = open_store(bucket_uri)
    keys = [entry.key for entry in store.list()]
    assert {"runs/small/config.yaml", "runs/small/attempts/000001.json", "datasets/small-8/index.json"} <= set(keys)
    assert [(key, secret) for key in keys for secret in told(key.encode() + store.read(key).data)] == []
    tell_no_secret(tmp_path / "cache")


SIGNATURES = (f"?sig={SECRET}", f"#{SECRET}")


def test_refusals_repeat_no_credentials(secrets, tmp_path, monkeypatch):
    """A broken key file, a password, and the signature of a source that a job would show."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    targets, signed = tmp_path / "targets.yaml", f"https://host/archive.zip?X-Amz-Signature={SECRET}"
    targets.write_text("gke: {backend: kubernetes, image: i, bucket: gs://bucket}\n")
    pack, bucket = ("a", "--size", 8), ("--bucket", tmp_path / "bucket")
    on_a_cluster = (*pack, "--on", "gke", "--targets", targets, "--dry-run")
    refusals = [
        ("data", "pack", f"https://somebody:{SECRET}@host/archive.zip", *pack, *bucket),
        ("data", "ensure", "a", "--source", f"s3://KEY:{SECRET}@mine/folder", *bucket),
        ("submit", "pack", signed, *on_a_cluster),
    ]
    for secret in SIGNATURES:
        refusals += [
            ("runs", "show", f"gs://mine/runs/a{secret}"),
            ("data", "index", f"https://host/a.tar{secret}", *pack, *bucket),
            ("data", "list", "--bucket", f"gs://mine{secret}"),
            ("import", f"http://host/a.pt{secret}", "--run", "a", *bucket),
            ("submit", "pack", f"https://host/a.zip{secret}", *on_a_cluster),
        ]
        for place in ("https://host/runs/a", "https://host/a", "gs://mine/runs/a", "s3://mine/a", "a/runs/b"):
            with pytest.raises(BadRequestError) as error:
                job.load(f"{place}{secret}")
            assert told(str(error.value)) == []
    for words in (("data", "list", "--bucket", "gs://any"), *refusals):
        done = ddpm_here(*words)
        refused(done, Exit.BAD_REQUEST if words in refusals else Exit.NO_PERMISSION)
        assert told(done.stdout + done.stderr) == []
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize("secret", SIGNATURES)
def test_signed_sources_leave_no_signature(server, tmp_path, secret):
    """It is needed to read a source, and shown and stored nowhere; a wrong one means that nothing is there."""
    handler, url = server
    archive = zip_of(tmp_path / "all.zip", [(f"{n}.png", png(n)) for n in range(3)]).read_bytes()
    handler.content = {"/all.zip": archive, "/kinds.csv": b"file,kind\n0.png,0\n1.png,1\n2.png,0\n"}
    bucket, cache = tmp_path / "bucket", tmp_path / "cache"
    for name, source, labels in (("a", "all.zip", "kinds.csv"), ("b", "none.zip", "kinds.csv"), ("b", "all.zip", "no")):
        words = ("data", "pack", f"{url}/{source}{secret}", name, "--labels", f"{url}/{labels}{secret}", "--size", 16)
        done = ddpm_here(*words, "--bucket", bucket, DDPM_CACHE=str(cache))
        assert told(done.stdout + done.stderr) == []
        if name == "a":
            assert "classes  0, 1" in succeeded(done)
        else:
            assert "there is nothing at" in refused(done, Exit.MISSING_INPUT)
    tell_no_secret(bucket, cache)

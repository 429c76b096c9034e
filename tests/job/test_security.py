"""What is read may come from anybody: nothing of it is executed, wherever a loader looks."""

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
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from job.data.shards import INDEX, SHARDS_DTYPE, Shard, Shards, ShardWriter, load_index
from job.exits import Exit
from job.runs.checkpoints import Manifest, list_checkpoints
from job.runs.layout import ObjectKind
from job.runs.records import Attempt
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, settings, succeeded
from tests.job.some_images import encoded, folder_of, picture

CHECKOUT = Path(__file__).parents[2]
DATASET, RUN = "datasets/small-8", "runs/small"
SMALL = settings(train__batch_size="12", log__every_images="12", sample__steps="1", sample__images="1")


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.marker,)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def torch_saved(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.ones(3), "payload": Payload(marker)}, file)
    return file.getvalue()


def object_array(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def tagged_yaml(marker: Path) -> bytes:
    return f"train: !!python/object/apply:os.mkdir ['{marker}']\n".encode()


def json_of_a_pickle(marker: Path) -> bytes:
    return json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, [str(marker)]]}).encode()


def gigabytes(marker: Path) -> bytes:
    """A safetensors file whose header claims more memory than any machine has."""
    return struct.pack("<Q", 1 << 45) + b'{"weight":'


PAYLOADS = [pickled, torch_saved, object_array, tagged_yaml, json_of_a_pickle, gigabytes]


def test_unsafe_loaders_execute_the_payloads(tmp_path):
    for payload, unsafe_load in (
        (pickled, pickle.loads),
        (torch_saved, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
        (object_array, lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
        (tagged_yaml, lambda data: yaml.load(data, yaml.UnsafeLoader)),
    ):
        unsafe_load(payload(tmp_path / "marker"))
        (tmp_path / "marker").rmdir()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a dataset of twelve images and a run of two epochs over it."""
    folder = tmp_path_factory.mktemp("security")
    images = folder_of(folder / "images", [(f"{n}.png", encoded(picture(n, 12, 12))) for n in range(12)])
    bucket = folder / "bucket"
    succeeded(ddpm_here("data", "pack", images, "small", "--size", 8, "--bucket", bucket))
    succeeded(train(bucket, folder / "cache", epochs=2))
    return bucket


def train(bucket: Path, cache_dir: Path, epochs: int = 3, *more: str):
    words = ["--dataset", "small", "--bucket", bucket, "--epochs", epochs]
    return ddpm_here("train", *words, *SMALL, *more, DDPM_CACHE=str(cache_dir))


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What no test may find when it ends; and nobody waits for the holder of a lease that is no lease."""
    monkeypatch.setattr("job.coordination.lease.EXPIRE_SECONDS", 0.5)
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def plant_tensors(bucket: Path, content: bytes) -> None:
    store = open_store(str(bucket / RUN))
    ref = list_checkpoints(store)[-1]
    path = bucket / RUN / ObjectKind.MANIFEST.key(checkpoint=ref)
    manifest = Manifest.from_json(path.read_bytes(), "here")
    vouching = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = tuple(file.model_copy(update=vouching) for file in manifest.files)
    for file in files:
        (bucket / RUN / file.key).write_bytes(content)
    path.write_bytes(manifest.model_copy(update={"files": files}).to_json())


def plant_configuration(bucket: Path, content: bytes) -> None:
    (bucket / RUN / "config.yaml").write_bytes(content)
    path = bucket / RUN / ObjectKind.ATTEMPT.key(fence=1)
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


def test_a_payload_with_the_right_hashes(trained, tmp_path, marker):
    in_memory, streamed = "data.cache_gigabytes=32", "data.cache_gigabytes=1e-6"
    for plant, said, *commands in (
        (plant_tensors, ".safetensors holds no tensors", "sample", in_memory),
        (plant_configuration, "config.yaml", "sample", in_memory),
        (plant_offsets, "shard-00000.offsets points beyond", in_memory),
        (plant_image, "shard-00000.tar, image 7 (at byte ", in_memory, streamed),
    ):
        for payload in (*PAYLOADS, *([lambda _: bomb()] if plant is plant_image else [])):
            for command in commands:
                bucket = shutil.copytree(trained, tmp_path / "bucket")
                plant(bucket, payload(marker))
                if command == "sample":
                    done = ddpm_here("sample", "--run", "small", "--bucket", bucket)
                else:
                    done = train(bucket, tmp_path / "cache", 3, "--set", command)
                assert said in refused(done, Exit.BAD_DATA), (plant, payload, command)
                shutil.rmtree(bucket)


@cache
def bomb() -> bytes:
    """A PNG of 20,000 × 20,000 black pixels: 50 kilobytes, which decode to more than a gigabyte."""
    rows = zlib.compress(bytes(20_000 * (1 + 20_000 // 8)), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_payloads_in_a_source_and_journal(tmp_path, marker):
    for number, payload in enumerate(PAYLOADS):
        place, bucket = tmp_path / str(number), tmp_path / str(number) / "b"
        good = [(f"{n}.png", encoded(picture(n, 12, 12))) for n in range(3)]
        bad = [(name, payload(marker)) for name in ("0.npy", "0.npz", "0.pt", "0.pkl", "0.cls", "config.yaml", "x.png")]
        bad.append(("bomb.png", bomb()))
        for name in ("parameters", "shard-00000", "shard-00001"):
            folder_of(bucket / DATASET, [(f"pieces/{name}.json", payload(marker))])
        folder_of(bucket / DATASET, [("shard-00000.tar", payload(marker)), ("shard-00000.offsets", b"")])
        images = folder_of(place / "images", good + bad)
        words = ("data", "pack", images, "small", "--size", 8, "--bucket", bucket, "--no-classes")
        # A label that no other image has, or no text.
        refused(ddpm_here(*words[:-1]), Exit.BAD_DATA)
        # What the message says is to be done helps.
        assert f"`ddpm data delete small --size 8 --bucket {bucket}`" in refused(ddpm_here(*words), Exit.BAD_REQUEST)
        succeeded(ddpm_here("data", "delete", "small", "--size", 8, "--bucket", bucket, "--yes"))
        out = succeeded(ddpm_here(*words))
        assert "images   3 colour" in out
        assert "rejects  2," in out
        assert "(400000000 pixels)" in (bucket / DATASET / "rejects.jsonl").read_text()
        succeeded(ddpm_here("data", "verify", "small", "--bucket", bucket))
        names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "a.npy")
        folder_of(place / "mnist", [(name, payload(marker)) for name in names])
        for source in (place / "mnist", place / "mnist" / "a.npy"):
            done = ddpm_here("data", "pack", source, "small", "--size", 16, "--bucket", bucket)
            assert str(source) in refused(done, Exit.BAD_DATA)


@pytest.mark.parametrize(
    ("first", "uris", "said"),
    [
        ({"images": 0}, (), "impossible sizes"),
        ({"images": 8_000_000}, (), "impossible sizes"),
        ({"images": (1 << 25) + 1, "bytes": 1 << 40}, (), "impossible sizes"),
        ({"bytes": 0}, (), "impossible sizes"),
        ({"bytes": 1 << 44}, (), "impossible sizes"),
        ({"bytes": (1 << 64) - 1}, (), "impossible sizes"),
        ({"number": 10**9}, (), "impossible numbers"),
        ({"number": 1}, (), "impossible numbers"),
        ({}, ("/a.tar",), "some shards lack a URI"),
        ({}, ("/a.tar", ""), "some shards lack a URI"),
    ],
)
def test_a_hostile_table_of_shards_is_refused(trained, tmp_path, first, uris, said):
    index = load_index(open_store(str(trained)), DATASET)
    rows = np.frombuffer(bytes.fromhex(index.shards.table), SHARDS_DTYPE).repeat(2)
    rows["number"] = 0, 1
    for name, value in first.items():
        rows[name][0] = value
    hostile = index.shards.model_copy(update={"table": rows.tobytes().hex(), "uris": uris})
    folder_of(tmp_path / DATASET, [(INDEX, index.model_copy(update={"shards": hostile}).to_json())])
    line = refused(ddpm_here("data", "show", "small", "--bucket", tmp_path), Exit.BAD_DATA)
    assert said in line and f"{DATASET}/index.json" in line


def test_a_table_of_zeros_is_refused(trained, tmp_path):
    """In the cache, too, a table that was never read is all zeros."""
    bucket = shutil.copytree(trained, tmp_path / "bucket")
    plant_offsets(bucket, bytes(1 << 16))
    assert "shard-00000.offsets points beyond" in refused(train(bucket, tmp_path / "cache"), Exit.BAD_DATA)


def test_an_index_names_no_other_place(trained, tmp_path):
    bucket = shutil.copytree(trained, tmp_path / "bucket")
    index = load_index(open_store(str(bucket)), DATASET)
    for uri in ("http://host/a.tar", "file:///a.tar", "../a.tar", "gs://b/a\n.tar", "gs://b/"):
        elsewhere = index.shards.model_copy(update={"uris": (uri,) * len(index.shards)})
        (bucket / DATASET / INDEX).write_bytes(index.model_copy(update={"shards": elsewhere}).to_json())
        assert "index.json" in refused(ddpm_here("data", "verify", "small", "--bucket", bucket), Exit.BAD_DATA)


UNSAFE = re.compile(
    r"(?<![\w.])(?:eval|exec|compile|__import__)\(|os\.(?:system|popen)|getoutput|shell=True|extractall\("
    r"|(?:pickle|marshal|joblib|torch\.jit)\.loads?\b|Unpickler|shelve|read_pickle|yaml\.\w*load\w*"
    r"|torch\.load\((?![^)]*weights_only=True)|allow_pickle=True|(?:np|numpy)\.load\((?![^)]*allow_pickle=False)"
)
KNOWN = {
    ("job/processes/ranks.py", "pickle.loads"),  # between the processes of one run
    ("job/config/__init__.py", "yaml.load"),  # with a SafeLoader
    ("ddpm/features.py", "torch.jit.load"),  # of a file whose hash is known
}


def test_the_program_has_no_unsafe_loader():
    sources = [path for part in ("ddpm", "job") for path in (CHECKOUT / part).rglob("*.py")]
    assert len(sources) > 60
    found = {(str(path.relative_to(CHECKOUT)), call) for path in sources for call in UNSAFE.findall(path.read_text())}
    assert found == KNOWN

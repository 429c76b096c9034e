"""A dataset of ten times the budget, read in processes of their own: the same batches, and no more memory or disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job.command_line import environment
from tests.job.small_dataset import SmallDataset, write_dataset

SHARD_IMAGES = 60
SHARDS_IN_BUDGET = 4

READ = """
import hashlib, json, os, re, sys
from contextlib import suppress
from pathlib import Path
from job.data.cache import open_cache
from job.data.order import Order
from job.data.shards import INDEX, DatasetIndex
from job.data.stream import stream_batches
from tests.job.small_dataset import KEY, FarStore

root, cache_dir, budget_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = FarStore(root / "bucket")
index = DatasetIndex.load(store, f"{KEY}/{INDEX}")
cache = open_cache(store, KEY, index, cache_dir=cache_dir, budget_bytes=budget_bytes)
order = Order(tuple(shard.images for shard in index.shards), seed=5, block_images=60)
most = {"anonymous": 0, "disk": 0}
sha256 = hashlib.sha256()
for batch in stream_batches(cache, order, batch_size_images=20, first_image=0, last_image=2 * index.images):
    sha256.update(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes())
    status = Path("/proc/self/status").read_text()
    most["anonymous"] = max(most["anonymous"], 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
    listed = [f"{folder}/{name}" for folder, _, names in os.walk(cache_dir) for name in names if name.endswith(".tar")]
    # Those that are still there were there together; one that was listed first may have made room for another.
    sizes = []
    for path in listed:
        with suppress(FileNotFoundError):
            sizes.append(os.stat(path).st_size)
    most["disk"] = max(most["disk"], sum(sizes))
cache.close()
found = {"type": type(cache).__name__, "sha256": sha256.hexdigest(), "downloads": len(store.downloads)}
print(json.dumps(found | most))
"""


def read(root: Path, cache_dir: Path, budget_bytes: int) -> dict:
    command = [sys.executable, "-c", READ, str(root), str(cache_dir), str(budget_bytes)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    def write(shards: int) -> tuple[Path, SmallDataset]:
        root = tmp_path_factory.mktemp(f"shards-{shards}")
        return root, write_dataset(str(root / "bucket"), root, (SHARD_IMAGES,) * shards, size=64, grain=4)

    return write


@pytest.mark.slow
def test_ten_times_the_dataset_takes_no_more_memory_or_disk_and_gives_the_same_batches(written, tmp_path):
    small_root, small = written(6)
    large_root, large = written(40)
    budget_bytes = SHARDS_IN_BUDGET * max(shard.bytes for shard in large.index.shards)
    assert sum(shard.bytes for shard in large.index.shards) > 9 * budget_bytes
    assert budget_bytes < small.index.decoded_bytes
    few = read(small_root, tmp_path / "few", budget_bytes)
    many = read(large_root, tmp_path / "many", budget_bytes)
    mapped = read(large_root, tmp_path / "mapped", large.index.decoded_bytes)
    assert [few["type"], many["type"], mapped["type"]] == ["ShardCache", "ShardCache", "DecodedCache"]
    assert many["sha256"] == mapped["sha256"]
    assert max(few["disk"], many["disk"]) <= budget_bytes
    # Each shard comes once per epoch, but for those whose block goes on in the next, and what the end fetched ahead.
    assert many["downloads"] <= 2 * 40 + 2 * SHARDS_IN_BUDGET
    # Its images take 29 MB when they are decoded, 25 MB more than those of the small one.
    assert many["anonymous"] - few["anonymous"] < 8e6

"""A dataset of ten times the budget, read in processes of their own: no more memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.job.command_line import environment
from tests.job.small_dataset import write_dataset

SHARD_IMAGES = 60
SHARDS_IN_BUDGET = 4

READ = """
import json, re, sys
from pathlib import Path
from job.data.reading.cache import open_cache
from job.data.reading.order import Order, stream_batches
from job.data.shards import load_index
from tests.job.small_dataset import FarStore

store, cache_dir, budget_bytes = FarStore(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
index = load_index(store, "datasets/random-64")
cache = open_cache(store, index, budget_bytes, cache_dir=cache_dir)
order = Order(tuple(index.shards.images.tolist()), seed=5, block_images=60)
anonymous = 0
for batch in stream_batches(cache, order, batch_size_images=20, first_image=0, last_image=2 * index.images):
    status = Path("/proc/self/status").read_text()
    anonymous = max(anonymous, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
cache.close()
print(json.dumps({"type": type(cache).__name__, "downloads": len(store.downloads), "anonymous": anonymous}))
"""


def read(bucket: Path, cache_dir: Path, budget_bytes: int) -> dict:
    command = [sys.executable, "-c", READ, str(bucket), str(cache_dir), str(budget_bytes)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_dataset(tmp_path):
    small, large = (
        write_dataset(str(tmp_path / str(shards)), tmp_path, (SHARD_IMAGES,) * shards, size=64, grain=4)
        for shards in (6, 40)
    )
    budget_bytes = SHARDS_IN_BUDGET * max(shard.bytes for shard in large.index.shards)
    assert sum(shard.bytes for shard in large.index.shards) > 9 * budget_bytes
    assert budget_bytes < small.index.decoded_bytes
    few = read(tmp_path / "6", tmp_path / "few", budget_bytes)
    many = read(tmp_path / "40", tmp_path / "many", budget_bytes)
    assert few["type"] == many["type"] == "ShardCache"
    # Each shard comes once per epoch, but for those whose block goes on in the next, and what the end fetched ahead.
    assert many["downloads"] <= 2 * 40 + 2 * SHARDS_IN_BUDGET
    # Its images take 29 MB when they are decoded, 25 MB more than those of the small one.
    assert many["anonymous"] - few["anonymous"] < 8e6

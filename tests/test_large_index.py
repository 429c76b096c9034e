"""Ten million images are open, shuffled and yield a batch within seconds, in a memory that hardly depends on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import large_index

ROOT = Path(__file__).parents[1]
IMAGES = 10_000_000


def read(bucket: Path, key: str, cache: Path) -> dict[str, float]:
    """As the benchmark does it, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large_index", "--read", str(bucket), key, str(cache), "100000"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.slow
def test_ten_million_images_open_in_seconds(tmp_path):
    large_key = large_index.write_dataset(tmp_path / "large", IMAGES)
    small_key = large_index.write_dataset(tmp_path / "small", 100_000)
    large = read(tmp_path / "large", large_key, tmp_path / "cache")
    small = read(tmp_path / "small", small_key, tmp_path / "cache")
    assert (large["images"], large["shards"], small["images"]) == (IMAGES, 1000, 100_000)
    # Two or three seconds on an idle machine.
    assert large["total_seconds"] < 60
    # Two bytes per image; the tables, twenty bytes per image, are mapped and not held.
    assert large["anonymous_bytes"] - small["anonymous_bytes"] < 2 * IMAGES
    assert large["peak_rss_bytes"] < 1e9

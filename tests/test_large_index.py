"""A hundred million images in a bucket are open, shuffled and yield a batch in seconds, in little memory."""

from __future__ import annotations

import pytest

from benchmarks import large_index


@pytest.mark.slow
def test_a_hundred_million_images_open_in_seconds(tmp_path):
    with large_index.served(tmp_path) as (bucket, objects):
        key = large_index.write_dataset(bucket, objects, large_index.SHARDS[1])
        first, again = (large_index.read(bucket, key, tmp_path / "cache") for _ in range(2))
    assert (first["images"], first["shards"]) == (100_100_000, 11_000)
    # One second on an idle machine, of which a block's shards take most.
    assert first["total_seconds"] < 20
    assert max(first["peak_bytes"], again["peak_bytes"]) < 100e6
    # The tables, 3.2 GB in all, are a sparse file, of which a block's are written.
    (tables,) = tmp_path.glob("cache/*/offsets")
    assert tables.stat().st_size == 32 * first["images"]
    assert tables.stat().st_blocks * 512 < tables.stat().st_size / 100

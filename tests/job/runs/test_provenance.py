"""Pictures that say where they come from, and show any damage."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ddpm import figures
from job.exits import BadDataError
from job.runs.provenance import picture_problems, put_picture, read_provenance, stamped
from job.store import open_store

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8, 3), dtype=np.uint8)
KINDS = {
    "samples/epoch-0080-ddim-100.png": figures.png(Image.fromarray(PIXELS[0, 0])),
    "samples/denoising-epoch-0080.gif": figures.denoising_gif(list(PIXELS)),
}


@pytest.mark.parametrize("key", KINDS)
def test_a_picture_carries_its_provenance_and_looks_the_same(key):
    picture = KINDS[key]
    data = stamped(key, picture, fence=3, images_seen=480)
    record = read_provenance(data, "here")
    assert (record.key, record.fence, record.images_seen) == (key, 3, 480)
    before, after = Image.open(io.BytesIO(picture)), Image.open(io.BytesIO(data))
    frames = getattr(before, "n_frames", 1)
    assert getattr(after, "n_frames", 1) == frames
    for frame in range(frames):
        before.seek(frame)
        after.seek(frame)
        np.testing.assert_array_equal(np.asarray(after.convert("RGB")), np.asarray(before.convert("RGB")))
    assert len(data) < len(picture) + 400


def test_other_programs_show_it():
    (key, picture), *_ = KINDS.items()
    image = Image.open(io.BytesIO(stamped(key, picture, fence=3, images_seen=480)))
    # What stands behind the pixels is read with them.
    image.load()
    assert f'"key": "{key}"' in image.info["ddpm-provenance"]


@pytest.mark.parametrize("key", KINDS)
def test_every_bit_of_it_counts(key):
    data = stamped(key, KINDS[key], fence=3, images_seen=480)
    stamp_bits = 8 * 400
    for bit in [*range(0, 8 * len(data) - stamp_bits, 37), *range(8 * len(data) - stamp_bits, 8 * len(data))]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadDataError, match=r"^here (is rotten|holds no provenance)"):
            read_provenance(bytes(damaged), "here")
    for size in range(0, len(data), 7):
        with pytest.raises(BadDataError, match=r"^here (is rotten|holds no provenance)"):
            read_provenance(data[:size], "here")


@pytest.mark.parametrize("key", KINDS)
def test_a_picture_of_another_place_is_told(tmp_path, key):
    store = open_store(str(tmp_path))
    put_picture(store, key, KINDS[key], fence=1, images_seen=1)
    assert picture_problems(store, key) == []
    other = key.replace("0080", "0081")
    store.put(other, store.read(key).data)
    assert picture_problems(store, other) == [f"{store.uri_of(other)} is not in its place: it was made as {key}"]
    store.put(other, KINDS[key])
    assert "holds no provenance" in picture_problems(store, other)[0]
    store.delete(other)
    assert "is missing" in picture_problems(store, other)[0]


def test_of_two_records_the_last_one_counts():
    (key, picture), *_ = KINDS.items()
    once = stamped(key, picture, fence=1, images_seen=1)
    assert read_provenance(stamped(key, once, fence=2, images_seen=2), "here").fence == 2
    with pytest.raises(BadDataError, match=r"^here is rotten"):
        read_provenance(once + once, "here")

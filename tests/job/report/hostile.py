"""A run whose words are all meant to be taken for something else, one as long as runs get, and pictures that lie."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from job.data.pack import pack
from job.data.pack_request import PackRequest
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.metric_rows import History
from job.runs.run import open_run
from job.store import open_store
from tests.job.command_line import ddpm_here, settings, succeeded
from tests.job.some_images import encoded, picture, zip_of

MARKUP = "<script>alert(1)</script>"
CLASSES = (MARKUP, "</script><img src=x onerror=alert(2)>", '"onload="alert(3)')


def fill_hostile(folder: Path) -> None:
    """A bucket with a run `odd` of two epochs, on images whose classes, licence and source are markup."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (len(CLASSES), 8, 16, 16, 3), np.uint8)
    # A zip's names have no slashes within a folder's.
    files = [
        (f"{name.replace('/', '∕')}/{number}.png", encoded(Image.fromarray(each)))
        for name, images in zip(CLASSES, noise, strict=True)
        for number, each in enumerate(images)
    ]
    source = zip_of(folder / "{{7*7}}<b>.zip", files)
    pack(open_store(str(folder)), PackRequest(str(source), "odd", 16, licence=MARKUP))
    words = ("--dataset", "odd", "--run", "odd", "--bucket", folder, "--epochs", 2)
    succeeded(ddpm_here("train", *words, *settings(sample__every_epochs="1", train__batch_size="8")))


def lengthen(bucket: Path, run: str, epochs: int, grids: int, rows: int) -> None:
    """Makes a run of one epoch look as if it were of many, with pictures that compress badly and all its metrics."""
    found, noise = open_run(str(bucket), run), np.random.default_rng(0)
    store, images = found.run, found.dataset_images
    for epoch in np.linspace(1, epochs, grids).astype(int):
        # As smooth as photographs are, and 64 of them.
        coarse = Image.fromarray(noise.integers(0, 255, (80, 80, 3), np.uint8))
        smooth = encoded(coarse.resize((784, 784), Image.Resampling.BICUBIC))
        store.put(f"samples/epoch-{epoch:04d}-{found.how_sampled}.png", smooth)
    ref = max(list_checkpoints(store))
    logged = [
        {"images_seen": int(images * epochs * (i + 1) / rows), "time": 1.8e9 + i, "learning_rate": 2e-4}
        | {"images_per_second": 400 + noise.random(), "memory_bytes": 9e9 + i}
        | {name: 0.1 * noise.random() for name in ("loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3", "val_loss")}
        for i in range(rows)
    ]
    history = History(store, (), found.config)
    history.add(logged, CheckpointRef(ref.fence, 1), is_hurried=False)
    manifest = load_manifest(store, ref).model_copy(update={"segments": history.segments})
    store.put(ObjectKind.MANIFEST.key(checkpoint=ref), manifest.to_json())


def multiply(bucket: Path, run: str, count: int) -> None:
    """Adds so many runs, `RUN-000` and on, that differ from this one in their seed alone."""
    for number in range(count):
        copied = shutil.copytree(bucket / "runs" / run, bucket / f"runs/{run}-{number:03d}")
        config, attempt = copied / "config.yaml", copied / "attempts/000001.json"
        config.write_text(re.sub(r"\bseed: \d+", f"seed: {number + 1}", config.read_text()))
        record = json.loads(attempt.read_bytes()) | {"config_sha256": sha256(config.read_bytes()).hexdigest()}
        del record["sha256"]
        record["sha256"] = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        attempt.write_text(json.dumps(record, indent=1) + "\n")


def data_of(page: str) -> dict[str, object]:
    """What a page gives to its scripts."""
    _, _, after = page.partition('id="data-of-page">')
    return json.loads(after.partition("</script>")[0])


# Pictures that are small files, and cost whoever believes their headers gigabytes or minutes.
def png(width: int, height: int, pixels: bytes = b"", kind: bytes = b"\x08\x02\0\0\0") -> bytes:
    """A PNG that says this of itself, whatever it holds."""
    made = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">II", width, height) + kind
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return made


def gif(width: int, height: int, frames: int, frame_width: int = 0, frame_height: int = 0) -> bytes:
    """A GIF of one colour, whose frames after the first are of another size if one is named."""
    one = encoded(Image.new("L", (width, height)), "GIF")
    start = one.index(b",\0\0\0\0")
    frame = bytearray(one[start:-1])
    if frame_width:
        frame[5:9] = struct.pack("<HH", frame_width, frame_height)
    return one[:-1] + bytes(frame) * (frames - 1) + b";"


FORGED = {
    "many large frames": lambda: gif(4000, 4000, 300),
    "many small frames": lambda: gif(1, 1, 100_000),
    "frames that grow": lambda: gif(16, 16, 3, 30_000, 30_000),
    "a header alone": lambda: png(30_000, 30_000),
    "a few pixels of many": lambda: png(9000, 9000, b"\0" * 9000),
    "sixteen bits": lambda: png(1000, 1000, bytes(1000 * (1000 * 8 + 1)), b"\x10\x06\0\0\0"),
    "a line": lambda: png(1, 80_000_000),
    "no pixels": lambda: png(0, 0),
    "cut off": lambda: encoded(picture(0, 400, 400))[:-99],
    "another kind": lambda: encoded(picture(0), "TIFF"),
    "nothing": lambda: b"",
}
"""By what is wrong, or odd."""


@cache
def forged(what: str) -> bytes:
    """One of these."""
    return FORGED[what]()

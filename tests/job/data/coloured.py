"""Images whose colour says their class, and the judge of a dataset that is packed of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from job.exits import JobError
from tests.job.packing import KEY, packed
from tests.job.some_images import encoded

KINDS = ("cat", "dog", "owl")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
GREYS = (60, 120, 180)
NAMES = tuple(f"{number:03d}.png" for number in range(7))
PLAIN = tuple((name, number % 3) for number, name in enumerate(NAMES))
"""Names of images, and the classes that their colours say."""

Files = list[tuple[str, bytes]]


def pixels(kind: int) -> np.ndarray:
    return np.full((16, 16, 3), COLOURS[kind], np.uint8)


def png(kind: int) -> bytes:
    return encoded(Image.fromarray(pixels(kind)))


def images(truth: Sequence[tuple[str, int]] = PLAIN) -> Files:
    return [(name, png(kind)) for name, kind in truth]


def shown_in(image: bytes) -> int:
    """The class that an image shows."""
    colour = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), int).mean((0, 1))
    kinds = np.array(COLOURS) if np.ptp(colour) > 50 else np.array(GREYS)[:, None]
    return int(np.abs(kinds - colour).sum(1).argmin())


def judged(bucket: Path) -> list[tuple[int, str]]:
    """The class that each image of the packed dataset shows, and the one that its shard and the index say."""
    index, found = json.loads((bucket / KEY / "index.json").read_bytes()), []
    for shard in sorted((bucket / KEY).glob("shard-*.tar")):
        with tarfile.open(shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in sorted(name for name in files if name.endswith(".png")):
            said = files.get(name.replace(".png", ".cls"))
            found.append((shown_in(files[name]), index["classes"][int(said)] if said is not None else ""))
    return found


def stem(name: str) -> str:
    return name.rpartition(".")[0]


DOTS = tuple((f"v1.{name}", kind) for name, kind in PLAIN)
FOLDERS = tuple((f"{'ab'[number % 2]}/{number // 2}.png", number % 3) for number in range(6))
SPLITS = tuple(
    (f"{split}/{number}.png", (number + (split == "test")) % 3) for split in ("test", "train") for number in range(6)
)
REFUSED, BAD = 64, 65


def outcome(bucket: Path, source: Path, **options: object) -> int:
    """The exit code of a packing, or else its number of images; checks that each has the class that it shows."""
    try:
        packed(bucket, source, shard_images=None, **options)
    except JobError as error:
        assert len(str(error).splitlines()) == 1
        return int(error.exit_code)
    found = judged(bucket)
    if options.get("classes") is False:
        assert {said for _, said in found} == {""}
    else:
        names = [(KINDS[shown], str(shown), "owl" if shown == 2 else "not owl") for shown, _ in found]
        assert all(said in possible for (_, said), possible in zip(found, names, strict=True)), found
    return len(found)

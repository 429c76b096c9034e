"""Many images in pieces: which images they are, and that nobody who is stopped, killed or started twice does harm."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from job.config.schema import SampleConfig
from job.requests import MAX_COUNT, SampleRequest
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.layout import ObjectKind
from job.sampling.pictures import made_piece
from job.sampling.sampling_plan import SampleSet, plan_sampling, plan_sets
from job.store import Store, open_store
from job.verbs.upkeep import verify_run
from tests.conftest import only_linux
from tests.job.command_line import ddpm, ddpm_here, refused, started, succeeded
from tests.job.damages import flip_a_bit
from tests.job.launching import children, eventually, is_gone

SLOW = ("--steps", 25)
"""So that a process can be caught at work."""
PIXELS = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)


def words(bucket: object, count: int, *more: object) -> tuple[object, ...]:
    return ("sample", "--run", "walk", "--bucket", bucket, "--count", count, *more)


def set_of(bucket: object, count: int, **options) -> SampleSet:
    chosen = {key: options.pop(key) for key in SampleConfig.model_fields.keys() & options.keys()}
    request = SampleRequest("walk", bucket=str(bucket), chosen=chosen, count=count, **options)
    (images,) = plan_sets(plan_sampling(request.check()))
    return images


def commit(images: SampleSet, pixels: np.ndarray) -> bool:
    return images.pieces.commit(0, made_piece(images, 0, pixels))


def contents(store: Store, but: str = "nothing") -> dict[str, bytes]:
    return {entry.key: store.read(entry.key).data for entry in store.list() if not entry.key.startswith(but)}


@pytest.fixture
def far(bucket: Path, gcs_bucket: str) -> str:
    """A copy of the bucket on a server."""
    here, there = open_store(str(bucket)), open_store(gcs_bucket)
    for entry in here.list():
        if not entry.key.endswith(".tar"):
            there.create(entry.key, here.read(entry.key).data)
    return gcs_bucket


def test_pieces_hold_every_seed_once(walked):
    for count in (1, 17, 5000, MAX_COUNT):
        config = set_of(walked, count, first_seed=7).config
        first, last = config.seeds(0), config.seeds(config.pieces - 1)
        assert (first[0], last[-1]) == (7, 7 + count - 1)
        assert config.seeds(1)[:1] in (range(first[-1] + 1, first[-1] + 2), range(0))
        assert config.pieces <= 100_000
        assert len(first) <= max(256, count / 100_000)


def test_shards_hold_each_seeds_image(bucket, draw):
    out = succeeded(ddpm_here(*words(bucket, 40, "--first-seed", 995)))
    images = set_of(bucket, 40, first_seed=995)
    index = images.index()
    assert re.search("/runs/walk/samples/epoch-0003-ddim-4-995-40-[0-9a-f]{8}$", images.folder.uri)
    assert out.startswith(f"{images.folder.uri}/index.json  (40 images in 3 pieces; 40 made at ")
    assert [entry.name for entry in index.pieces] == ["piece-00000.tar", "piece-00001.tar", "piece-00002.tar"]
    shards = [Path(images.folder.uri) / entry.name for entry in index.pieces]
    assert [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards] == [e.sha256 for e in index.pieces]
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{seed:09d}" for seed in range(995, 1035)]
    assert [sample["cls"] for sample in samples] == [seed % 5 for seed in range(995, 1035)]
    drawn = draw(range(995, 1035), 16)
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), drawn)
    # The grid of this run has four images below the names of their classes, and two pixels around each.
    grid = np.asarray(Image.open(io.BytesIO(images.folder.read("grid.png").data)))
    assert np.array_equal(grid[-98:-2, 2:98], drawn[0].repeat(6, axis=0).repeat(6, axis=1))

    # Whoever else saw the last piece come writes the same index.
    before = {path: path.stat().st_mtime_ns for path in Path(images.folder.uri).rglob("*")}
    for done in (ddpm(*words(bucket, 40, "--first-seed", 995)), ddpm_here(*words(bucket, 40, "--first-seed", 995))):
        assert succeeded(done) == f"{images.folder.uri}/index.json  (40 images in 3 pieces; complete already)\n"
    assert {path: path.stat().st_mtime_ns for path in Path(images.folder.uri).rglob("*")} == before


def test_png_files_hold_each_seeds_image(bucket):
    succeeded(ddpm_here(*words(bucket, 20, "--save", "png", "--weights", "model")))
    images = set_of(bucket, 20, save="png", weights="model")
    assert re.search("/epoch-0003-ddim-4-weights-model-0-20-[0-9a-f]{8}$", images.folder.uri)
    folder, index = Path(images.folder.uri), images.index()
    paths = sorted(folder.glob("piece-*/*.png"))
    names = [f"piece-{seed // 16:05d}/{seed:09d}.png" for seed in range(20)]
    assert [str(path.relative_to(folder)) for path in paths] == names
    assert len({path.read_bytes() for path in paths}) == 20
    for entry in index.pieces:
        sums = subprocess.run(["sh", "-c", "sha256sum *.png"], cwd=folder / entry.name, capture_output=True, check=True)
        assert hashlib.sha256(sums.stdout).hexdigest() == entry.sha256


@pytest.mark.slow
def test_slices_make_what_one_process_makes(bucket, far):
    """Also after a process was killed, whose pieces stay as they are."""
    images = set_of(far, 96, steps=25)
    child = started(*words(far, 96, *SLOW))
    eventually(lambda: len(images.pieces.committed()) >= 2)
    ranks = children(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    eventually(lambda: all(map(is_gone, ranks)))
    # What a process leaves behind that dies between a piece and its record.
    images.run.delete(images.key(ObjectKind.RECORD, 1))
    before, there = contents(images.folder), 16 * len(images.pieces.committed())
    assert 0 < there < 96
    assert images.index() is None
    # The first one alive takes what no other has begun.
    outputs = [succeeded(ddpm_here(*words(far, 96, *SLOW, "--slice", f"{index}/2"))) for index in range(2)]
    assert f"96 images in 6 pieces; {96 - there} made" in outputs[0]
    assert "complete already" in outputs[1]
    after = contents(images.folder)
    assert {key: after[key] for key in before} == before
    assert len(images.pieces.committed()) == 6
    # Two that are alive at once, on another set, make what one makes.
    child = started(*words(far, 100, "--slice", "1/2"))
    succeeded(ddpm_here(*words(bucket, 100)))
    outputs = [succeeded(ddpm_here(*words(far, 100, "--slice", "0/2"))), child.communicate(timeout=200)[0]]
    assert child.returncode == 0, outputs
    made = [int(re.search(r"(\d+) made", out)[1]) for out in outputs if "made" in out]
    assert sum(made) == 100 and any("100 images in 7 pieces" in out for out in outputs), outputs
    alone, together = (set_of(uri, 100).folder for uri in (bucket, far))
    # Times and makers are in the records.
    assert contents(together, but="pieces/") == contents(alone, but="pieces/")


@pytest.mark.slow
@only_linux
def test_a_stop_keeps_committed_pieces(bucket):
    images = set_of(bucket, 96, steps=25)
    typed = words(bucket, 96, *SLOW, "--processes", 2)
    child = started(*typed)
    eventually(lambda: len(images.pieces.committed()) >= 2)
    # One process alone: its end must end the other, which has pieces of its own to draw.
    (second,) = [pid for pid in children(child.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGTERM)
    said, _ = child.communicate(timeout=100)
    assert child.returncode == 75, said
    assert "the same command goes on from there" in said
    there = 16 * len(images.pieces.committed())
    assert 0 < there < 96
    out = succeeded(ddpm(*typed))
    assert "96 images in 6 pieces" in out
    assert f"{96 - there} made at" in out
    assert f", {there} there before" in out


@pytest.mark.parametrize("save", ["shards", "png"])
def test_repeated_pieces_do_no_harm(far, save):
    """Also with other bytes, as another machine that rounds otherwise makes them."""
    images = set_of(far, 20, save=save)
    assert commit(images, PIXELS[:16])
    first = contents(images.folder)
    for again in (PIXELS[:16], PIXELS[:16] + 1):
        assert not commit(images, again)
        assert contents(images.folder) == first
    # The piece of a process that died before it could commit it is taken over as it is.
    pieces = contents(images.folder, but="pieces/")
    images.run.delete(images.key(ObjectKind.RECORD, 0))
    assert commit(images, PIXELS[:16] + 1)
    assert contents(images.folder, but="pieces/") == pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "harm", "slices"),
    [
        ("pieces/00000.json", flip_a_bit, 2),
        ("piece-00000.tar", Path.unlink, 2),
        ("piece-00001.tar", Path.unlink, 1),
        ("piece-00001/000000017.png", Path.unlink, 1),
        ("index.json", flip_a_bit, 1),
    ],
)
def test_damages_are_named_with_their_remedy(bucket, key, harm, slices):
    save = "png" if key.endswith("png") else "shards"
    images, more = set_of(bucket, 20, save=save), ("--save", save)
    folder = Path(images.folder.uri)
    succeeded(ddpm_here(*words(bucket, 20, *more, "--slice", f"0/{slices}")))
    whole = contents(images.folder, but="pieces/")
    if slices > 1:
        # As before the last piece.
        (folder / "index.json").unlink()
    harm(folder / key)
    problems = verify_run(open_store(str(bucket)), "walk").problems
    assert any(f"{folder}/{key} " in line for line in problems), problems
    line = refused(ddpm_here(*words(bucket, 20, *more)), 65)
    assert f"{folder}/{key.removesuffix('/000000017.png')}" in line
    for name in re.findall(rf"{re.escape(str(folder))}/(\S+?\.json|piece-\d+(?:\.tar)?)(?=[ ,;:])", line):
        for path in (folder / name).parent.glob(f"{Path(name).name}*"):
            subprocess.run(["rm", "-r", path], check=True)
    assert "20 images in 2 pieces" in succeeded(ddpm_here(*words(bucket, 20, *more)))
    assert whole.items() <= contents(images.folder, but="pieces/").items()


def test_checkpoints_of_a_set_never_mix(bucket):
    before = set_of(bucket, 20)
    assert commit(before, PIXELS[:16])
    there = contents(before.folder)
    run = open_store(str(bucket)).sub("runs/walk")
    ref = max(list_checkpoints(run))
    manifest = load_manifest(run, ref).model_copy(update={"loss_sums": [[7.0]]})
    run.put(ObjectKind.MANIFEST.key(checkpoint=ref), manifest.to_json())
    assert "(20 images in 2 pieces; 20 made at " in succeeded(ddpm_here(*words(bucket, 20)))
    after = set_of(bucket, 20)
    assert len(after.index().pieces) == 2
    assert after.folder.uri != before.folder.uri
    assert contents(before.folder) == there


def test_each_checkpoint_has_its_folder(bucket):
    out = succeeded(ddpm_here(*words(bucket, 18, "--checkpoints", "all", "--sampler", "ddpm", "--steps", 3)))
    names = [Path(line.split()[0]).parent.name for line in out.splitlines()]
    assert [name[:-9] for name in names] == ["epoch-0001-ddpm-3-0-18", "epoch-0003-ddpm-3-0-18"]
    folders = (open_store(str(bucket)).sub(f"runs/walk/samples/{name}") for name in names)
    first, second = (folder.read("piece-00000.tar").data for folder in folders)
    assert first != second

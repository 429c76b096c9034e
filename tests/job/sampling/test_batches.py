"""Many images in pieces: which images they are, and that nobody who is stopped, killed or started twice does harm."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from accelerate.state import AcceleratorState
from PIL import Image

from job.exits import BadDataError, BadRequestError
from job.processes import compute
from job.processes.ranks import Agreement, Ranks
from job.requests import SampleRequest
from job.runs.checkpoints import MANIFEST, list_checkpoints, load_manifest, opened
from job.runs.verification import verify_run
from job.sampling import batches
from job.sampling.piece_files import commit_piece, read_images
from job.sampling.pieces import DRAWING, GRID, INDEX, Batch, record_key
from job.sampling.plan import plan_batches, plan_sampling
from job.sampling.sample import Painter, sampling_of
from job.stop import NEVER
from job.store import Store, open_store
from tests.job.command_line import DDPM, ddpm, ddpm_here, environment, refused, succeeded
from tests.job.launching import children, eventually, is_gone

SLOW = ("--steps", 25)
"""So that a process can be caught at work."""


def words(bucket: str, count: int, *more: object) -> tuple[object, ...]:
    return ("sample", "--run", "walk", "--bucket", bucket, "--count", count, *more)


def batch_of(bucket: str, count: int, **options) -> Batch:
    request = SampleRequest("walk", bucket, count=count, **options).check()
    (batch,) = plan_batches(plan_sampling(request), request)
    return batch


def drawn(bucket: str, seeds: range, batch_size: int, **options) -> np.ndarray:
    """What `Painter.draw` makes of these seeds: uint8 [n, 16, 16, 3]."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = plan_sampling(SampleRequest("walk", bucket, **options))
    ranks = Ranks(compute.build_accelerator("fp32"))
    painter = Painter(plan.config, ranks, "fp32", NEVER, Agreement(1, flags=1))
    with opened(plan.run, plan.checkpoints[0], ("ema",)) as restored:
        restored.copy_into({"ema": dict(painter.network.named_parameters())})
    return painter.draw(seeds, sampling_of(plan), batch_size, "test")


def contents(store: Store, prefix: str = "") -> dict[str, bytes]:
    return {entry.key: store.read(entry.key).data for entry in store.list(prefix)}


def pieces(store: Store) -> dict[str, bytes]:
    """All objects but records, whose times and makers differ."""
    return {key: data for key, data in contents(store).items() if not key.startswith("records/")}


@pytest.mark.parametrize("count", [1, 16, 17, 1000, 5000, 50_000, 10**6, 10**8, 10**9])
def test_pieces_hold_every_seed_once_and_slices_are_even(bucket, count):
    drawing = batch_of(bucket, count, first_seed=7).drawing
    first, last = drawing.seeds(0), drawing.seeds(drawing.pieces - 1)
    assert (first[0], last[-1]) == (7, 7 + count - 1)
    assert drawing.seeds(1)[:1] in (range(first[-1] + 1, first[-1] + 2), range(0))
    assert drawing.pieces <= 100_000
    assert len(first) <= max(256, count / 100_000)
    slices = [drawing.slice(index, 7) for index in range(7)]
    assert sorted(number for part in slices for number in part) == list(range(drawing.pieces))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_shards_hold_the_image_of_each_seed(bucket):
    out = succeeded(ddpm_here(*words(bucket, 40, "--first-seed", 995)))
    batch = batch_of(bucket, 40, first_seed=995)
    store, index = batch.store, batch.index()
    assert store.uri.endswith("/runs/walk/samples/epoch-0002-ddim-4-995-40")
    assert out.startswith(f"{store.uri}/index.json  (40 images in 3 pieces; 40 made at ")
    assert index is not None
    assert [(entry.name, entry.first_seed, entry.images) for entry in index.pieces] == [
        ("piece-00000.tar", 995, 16),
        ("piece-00001.tar", 1011, 16),
        ("piece-00002.tar", 1027, 8),
    ]
    shards = [Path(store.uri) / entry.name for entry in index.pieces]
    assert [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards] == [e.sha256 for e in index.pieces]
    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"{seed:09d}" for seed in range(995, 1035)]
    assert [sample["cls"] for sample in samples] == [seed % 5 for seed in range(995, 1035)]
    images = drawn(bucket, range(995, 1035), batch_size=16)
    assert np.array_equal(np.stack([sample["png"] for sample in samples]), images)
    # The grid of this run has four images below the names of their classes, and two pixels around each.
    grid = np.asarray(Image.open(io.BytesIO(store.read("grid.png").data)))
    tile = images[0].repeat(6, axis=0).repeat(6, axis=1)
    assert np.array_equal(grid[-98:-2, 2:98], tile)

    # Whoever else saw the last piece come writes the same index.
    batch.commit_index(batch.load_all(range(3)))
    before = {path: path.stat().st_mtime_ns for path in Path(store.uri).rglob("*")}
    for done in (ddpm(*words(bucket, 40, "--first-seed", 995)), ddpm_here(*words(bucket, 40, "--first-seed", 995))):
        assert succeeded(done) == f"{store.uri}/index.json  (40 images in 3 pieces; complete already)\n"
    assert {path: path.stat().st_mtime_ns for path in Path(store.uri).rglob("*")} == before


def test_png_files_hold_the_image_of_each_seed(bucket):
    succeeded(ddpm_here(*words(bucket, 20, "--save", "png", "--raw")))
    batch = batch_of(bucket, 20, save="png", raw=True)
    assert batch.store.uri.endswith("/epoch-0002-ddim-4-raw-0-20-png")
    folder = Path(batch.store.uri)
    paths = sorted(folder.glob("piece-*/*.png"))
    assert [str(path.relative_to(folder)) for path in paths] == [
        f"piece-{seed // 16:05d}/{seed:09d}.png" for seed in range(20)
    ]
    assert len({path.read_bytes() for path in paths}) == 20
    index = batch.index()
    assert index is not None
    for entry in index.pieces:
        sums = subprocess.run(["sh", "-c", "sha256sum *.png"], cwd=folder / entry.name, capture_output=True, check=True)
        assert hashlib.sha256(sums.stdout).hexdigest() == entry.sha256
    assert np.array_equal(read_images(batch, batch.load(1), 3), [np.asarray(Image.open(path)) for path in paths[16:19]])


def test_slices_side_by_side_make_what_one_process_makes(bucket, gcs_copy):
    processes = [
        subprocess.Popen(
            [DDPM, *map(str, words(gcs_copy, 100, "--slice", f"{index}/3"))],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    succeeded(ddpm_here(*words(bucket, 100)))
    outputs = []
    for child in processes:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0, out + err
        outputs.append(out)
    alone, together = batch_of(bucket, 100).store, batch_of(gcs_copy, 100).store
    assert pieces(together) == pieces(alone)
    assert set(contents(together)) == set(contents(alone))
    assert any("100 images in 7 pieces" in out for out in outputs)
    for index, made in enumerate((36, 32, 32)):
        assert f"{made} made at" in outputs[index]


def test_after_a_kill_other_slices_go_on_and_make_no_piece_twice(bucket, monkeypatch):
    batch = batch_of(bucket, 160, steps=25)
    child = subprocess.Popen([DDPM, *map(str, words(bucket, 160, *SLOW))], env=environment(), stderr=subprocess.DEVNULL)
    eventually(lambda: Path(batch.store.uri).exists() and len(batch.committed()) >= 2)
    ranks = children(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    eventually(lambda: all(map(is_gone, ranks)))
    # What a process leaves behind that dies between a piece and its record.
    batch.store.delete(record_key(1))
    before = contents(batch.store)
    committed = batch.committed()
    there = 16 * len(committed)
    assert 0 < there < 160
    assert batch.index() is None

    drawn_pieces: list[int] = []
    draw_piece = batches._Slice._draw_piece

    def spy(self, number, advance):
        drawn_pieces.append(number)
        return draw_piece(self, number, advance)

    monkeypatch.setattr(batches._Slice, "_draw_piece", spy)
    outputs = [succeeded(ddpm_here(*words(bucket, 160, *SLOW, "--slice", f"{index}/2"))) for index in range(2)]
    assert "slice 0/2 is done" in outputs[0]
    assert "160 images in 10 pieces" in outputs[1]
    assert sum(int(re.search(r"(\d+) made", out)[1]) for out in outputs) == 160 - there, outputs
    assert sorted(drawn_pieces) == sorted(set(range(10)) - committed)
    after = contents(batch.store)
    assert {key: after[key] for key in before} == before
    assert len(batch.committed()) == 10


def test_a_stop_keeps_what_is_committed_and_processes_share_the_rest(bucket):
    batch = batch_of(bucket, 160, steps=25)
    typed = [DDPM, *map(str, words(bucket, 160, *SLOW, "--processes", 2))]
    child = subprocess.Popen(typed, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: Path(batch.store.uri).exists() and len(batch.committed()) >= 2)
    # One process alone: its end must end the other, which has pieces of its own to draw.
    (second,) = [pid for pid in children(child.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGTERM)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 75, out + err
    assert "the same command goes on from there" in err
    before = contents(batch.store)
    there = 16 * len(batch.committed())
    assert 0 < there < 160
    out = succeeded(ddpm(*typed[1:]))
    assert "160 images in 10 pieces" in out
    assert f"{160 - there} made at" in out
    assert f", {there} there before" in out
    after = contents(batch.store)
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("save", ["shards", "png"])
def test_who_makes_a_piece_again_does_no_harm(gcs_copy, save):
    """Also with other bytes, as another machine that rounds otherwise makes them."""
    batch = batch_of(gcs_copy, 20, save=save)
    batch.begin()
    images = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    assert commit_piece(batch, 0, images[:16])
    first = contents(batch.store)
    for again in (images[:16], images[:16] + 1):
        assert not commit_piece(batch, 0, again)
        assert contents(batch.store) == first
    # The piece of a process that died before it could commit it is taken over as it is.
    batch.store.delete(record_key(0))
    assert commit_piece(batch, 0, images[:16] + 1)
    assert np.array_equal(read_images(batch, batch.load(0), 16), images[:16])
    key = "piece-00001.tar" if save == "shards" else "piece-00001/000000016.png"
    batch.store.create(key, b"something else")
    with pytest.raises(BadDataError, match=f"{key} is not what belongs there, or damaged: delete it"):
        commit_piece(batch, 1, images[16:])
    assert batch.committed() == {0}


@pytest.mark.parametrize("save", ["shards", "png"])
def test_a_piece_that_rotted_before_it_was_committed_is_not_adopted(gcs_copy, save):
    batch = batch_of(gcs_copy, 20, save=save)
    batch.begin()
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), dtype=np.uint8)
    assert commit_piece(batch, 0, images)
    key = "piece-00000.tar" if save == "shards" else "piece-00000/000000003.png"
    data = bytearray(batch.store.read(key).data)
    at = data.index(b"IDAT") + 40
    data[at : at + 20] = bytes(20)
    batch.store.put(key, bytes(data))
    batch.store.delete(record_key(0))
    with pytest.raises(BadDataError, match=f"{key} is not what belongs there, or damaged: delete it"):
        commit_piece(batch, 0, images)
    assert batch.committed() == set()


@pytest.mark.parametrize("save", ["shards", "png"])
def test_a_batch_that_lost_something_is_not_called_complete(bucket, save):
    command = words(bucket, 20, "--save", save)
    succeeded(ddpm_here(*command))
    batch = batch_of(bucket, 20, save=save)
    whole = contents(batch.store)
    pieces = {"shards": "piece-00001.tar", "png": "piece-00001/000000017.png"}
    for key in (pieces[save], record_key(1), GRID, DRAWING):
        batch.store.delete(key)
        said = refused(ddpm(*command), 65)
        assert INDEX in said, key
        for named in re.findall(r"(index\.json|records/piece-\d+\.json|piece-00001\S*(?:tar|png))", said):
            batch.store.delete(named)
        succeeded(ddpm_here(*command))
        assert contents(batch.store).keys() == whole.keys(), key


def test_a_piece_that_another_process_makes_meanwhile_is_not_drawn(bucket, monkeypatch):
    batch, drawn_pieces = batch_of(bucket, 40), []
    draw_piece = batches._Slice._draw_piece

    def draw(self, number, advance):
        drawn_pieces.append(number)
        images = draw_piece(self, number, advance)
        if number == 0:
            assert commit_piece(batch, 1, images)
        return images

    monkeypatch.setattr(batches._Slice, "_draw_piece", draw)
    assert "40 images in 3 pieces; 24 made at" in succeeded(ddpm_here(*words(bucket, 40)))
    assert drawn_pieces == [0, 2]


def test_images_of_another_drawing_are_not_mixed_in(bucket):
    run = open_store(bucket).sub("runs/walk")
    succeeded(ddpm_here(*words(bucket, 33, "--slice", "1/2")))
    batch = batch_of(bucket, 33)
    # What an attempt may change about a run is not in the folder's name.
    other = replace(batch, drawing=batch.drawing.model_copy(update={"eta": 0.5}))
    for work in (other.check, other.begin):
        with pytest.raises(BadRequestError, match=r"drawing.json .* another drawing \(eta 0.0 and not 0.5\): delete "):
            work()
    # The same epoch again, by a run that was begun anew.
    ref = list_checkpoints(run)[-1]
    run.put(f"{ref.key}/{MANIFEST}", load_manifest(run, ref).model_copy(update={"attempt": "another"}).to_json())
    for slice_ in ("0/2", "1/2"):
        line = refused(ddpm_here(*words(bucket, 33, "--slice", slice_)), 64)
        assert "another drawing (checkpoint_sha256 " in line
        assert "--first-seed" in line


def test_each_checkpoint_has_a_folder_of_its_own(bucket):
    out = succeeded(ddpm_here(*words(bucket, 18, "--checkpoints", "all", "--sampler", "ddpm", "--steps", 3)))
    names = [Path(line.split()[0]).parent.name for line in out.splitlines()]
    assert names == ["epoch-0001-ddpm-3-0-18", "epoch-0002-ddpm-3-0-18"]
    first, second = (pieces(open_store(bucket).sub(f"runs/walk/samples/{name}")) for name in names)
    assert set(first) == set(second)
    assert not set(first.values()) & set(second.values())


@pytest.mark.parametrize("what", ["record", "shard", "index"])
def test_rot_is_named(bucket, what):
    def rot(key: str) -> None:
        data = bytearray(batch.store.read(key).data)
        data[len(data) // 2] ^= 1
        batch.store.put(key, bytes(data))

    batch = batch_of(bucket, 40)
    slices = 1 if what == "index" else 2
    succeeded(ddpm_here(*words(bucket, 40, "--slice", f"0/{slices}")))
    key = {"record": record_key(0), "shard": "piece-00000.tar", "index": "index.json"}[what]
    rot(key)
    line = refused(ddpm_here(*words(bucket, 40)), 65)
    assert f"{batch.store.uri}/{key} is rotten" in line
    assert "elete" in line
    findings = verify_run(open_store(bucket), "walk")
    named = [problem for problem in findings.problems if f"{batch.store.uri}/" in problem]
    assert [f"{batch.store.uri}/{key} " in problem for problem in named] == [True]
    # A good piece whose record is rotten is none that a killed sampler left.
    assert not [left for left in findings.leftovers if f"{batch.store.uri}/".endswith(f"/{left.split('/')[1]}/")]
    # What it says is to be done helps.
    batch.store.delete(key)
    if what == "shard":
        batch.store.delete(record_key(0))
    assert "40 images in 3 pieces" in succeeded(ddpm_here(*words(bucket, 40)))
    batch.load_all(range(3))

"""Work in pieces that machines share: packing, encoding, drawing and scoring, each with its own way of publishing.

The protocols are those of the job; only the images are replaced by a few bytes that depend on the number of the piece.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.exploration import runtime
from benchmarks.exploration.checks import Checks, sha256
from benchmarks.exploration.store import SimulatedStore
from benchmarks.exploration.world import Process, Request, Violation, World
from ddpm.image_size import ImageSize
from job.coordination.pieces import RECORDS, Advance, Made, Slice
from job.data import latents, shards
from job.data import pack as packing
from job.data.pack_request import EncodeRequest, PackRequest
from job.evaluation import evaluate
from job.evaluation.evaluation_plan import Evaluation
from job.exits import BadRequestError
from job.runs.layout import CheckpointRef
from job.runs.run import Reference, SampleSetConfig
from job.sampling.sampling_plan import SampleSet
from job.store import Store

PIECES = 3
MAKING_SECONDS = 2.0
SIZE = 8


def _make_slowly() -> None:
    runtime.world().sleep(MAKING_SECONDS)


class PieceChecks(Checks):
    """A record names files that are there; a result names files that stay; each piece counts once."""

    def __init__(self, world: World, undisturbed: Any, folder: str, result: str) -> None:
        super().__init__(world)
        self._undisturbed, self._folder, self._result = undisturbed, folder, f"{folder}/{result}"
        self._named = dict[str, dict[str, str]]()
        """The files of each record that exists, and of the result, by its key."""

    def observe(self, request: Request, before: bytes | None) -> None:
        """Checks a change of the folder."""
        super().observe(request, before)
        key, is_finished = request.key, self._result in self.world.objects
        if request.op == "delete":
            if before is not None:
                self._check_deletion(request, is_finished)
        elif key == self._result or (f"/{RECORDS}/" in key and key.endswith(".json")):
            named = self.named_in(key, json.loads(request.data))
            # A machine that slept may commit a piece after the others have published and cleared up.
            for file, wanted in named.items() if key == self._result or not is_finished else ():
                content = self.world.objects.get(file)
                if content is None or sha256(content[0]) != wanted:
                    state = "is missing" if content is None else "differs"
                    raise Violation(f"{request.process.name} committed {key}, but {file} {state}")
            self._named[key] = named

    def _check_deletion(self, request: Request, is_finished: bool) -> None:
        named = self._named.pop(request.key, None)
        if named is not None and not is_finished:
            raise Violation(f"{request.process.name} deleted {request.key} before there was a result")
        for record, files in self._named.items():
            if request.key in files and (record == self._result or not is_finished):
                raise Violation(f"{request.process.name} deleted {request.key}, which {record} names")

    def named_in(self, key: str, document: dict[str, Any]) -> dict[str, str]:
        """Returns the files that a record or a result names, with their hashes."""
        entries = document.get("files", document.get("pieces", ()))
        above = self.above
        found = {f"{above}{file['key']}": file["sha256"] for file in entries}
        for shard in shards.Shards(**document["shards"]) if "shards" in document else ():
            found[f"{self._folder}/{shard.name}"] = shard.sha256
            found[f"{self._folder}/{shard.offsets_name}"] = shard.offsets_sha256
        return found

    @property
    def above(self) -> str:
        """The beginning of the keys in a record."""
        return f"{self._folder}/"

    def outcome(self) -> Any:
        """Returns what the work ends with, which no disturbance may change."""
        return sha256(self.world.objects[self._result][0])

    def at_end(self) -> None:
        """Checks that the result is that of an undisturbed world, and that no piece counted twice."""
        if self._result not in self.world.objects:
            raise Violation(f"{self._result} is missing at the end")
        self.result = self.outcome()
        if self._undisturbed not in (None, self.result):
            raise Violation(f"{self._result} is another than that of an undisturbed world")


# Packing


class _FewImages(packing._Packing):
    """A source of three pieces, in the place of a folder of images."""

    def _survey(self) -> dict[str, Any]:
        self.where, self.of_index = "images", {"source": "images"}
        self.sizes = [2.0] * PIECES
        return {"images": "0" * 64}

    def made(self, number: int, advance: Advance) -> Made:
        """Writes a shard, as `_Copying` does."""
        _make_slowly()
        self._check_stop()
        writer = shards.ShardWriter(self._folder / shards.shard_name(number))
        for image in (2 * number, 2 * number + 1):
            writer.add(f"{image:09d}", b"image %d" % image, -1)
            advance(1)
        shard, offsets = writer.finish()
        facts = {"rejects": [], "converted": {}, "shard": shard.model_dump()}
        return Made({shard.name: writer.path, shard.offsets_name: offsets}, facts)


PACKED = f"datasets/tiny-{SIZE}"
ENCODED = f"datasets/latents-{SIZE // 2}"


def pack(world: World, process: Process, slice_text: str) -> None:
    """Packs three shards."""
    request = PackRequest("images", "tiny", size=SIZE, crop="center", resize_filter="lanczos", slice=slice_text)
    packing.pack(SimulatedStore(world, process), request, stop=process.stop)


class PackChecks(PieceChecks):
    """Also: to pack again is refused."""

    def __init__(self, world: World, undisturbed: Any) -> None:
        super().__init__(world, undisturbed, PACKED, shards.INDEX)

    def ended(self, process: Process) -> None:
        """Checks how a process ended."""
        if isinstance(process.error, BadRequestError) and "is there already" in str(process.error):
            process.error = None
        super().ended(process)


# Encoding


def _tar(image: bytes) -> bytes:
    """Returns an image with the least size of a tar that holds one: a header and a block."""
    return image.ljust(2 * tarfile.BLOCKSIZE)


def _shard_of(number: int, content: bytes) -> tuple[shards.Shard, bytes]:
    digests = shards.Digests()
    digests.update(content)
    return digests.shard(shards.shard_name(number), [(0, len(content), -1, bytes(16))])


@cache
def _source() -> shards.DatasetIndex:
    """The index of the images that are encoded."""
    found = tuple(_shard_of(number, _tar(b"images"))[0] for number in range(PIECES))
    return shards.DatasetIndex(
        name="tiny", size=ImageSize.of(SIZE), channels=3, crop="center", resize_filter="lanczos",
        source="images", shards=shards.Shards.of(found),
    )  # fmt: skip


def with_source(world: World) -> None:
    """Puts the dataset of images into the bucket."""
    world.objects[f"{PACKED}/{shards.INDEX}"] = _source().to_json(), "of the source"


def _latents(host: str, number: int) -> tuple[bytes, float]:
    """Returns latents as a host rounds them, and their sum."""
    return _tar(f"latents {number} of {host}".encode()), 1.0 + number + len(host) / 1024


class _FewLatents(latents._Encoding):
    """Latents of a few bytes."""

    def made(self, number: int, advance: Advance) -> Made:
        """Writes a shard, as `_Encoding` does."""
        _make_slowly()
        process = runtime.world().process
        process.stop.check("while encoding")
        content, total = _latents(process.host, number)
        shard, offsets = _shard_of(number, content)
        shard = shard.model_copy(update={"name": shards.shard_name(number, shard.sha256)})
        advance(1)
        files = {shard.name: content, shard.offsets_name: offsets}
        return Made(files, {"shard": shard.model_dump(), "sums": [total] * 3, "squares": [100.0 * total] * 3})

    def _moments(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(0)


def _opened(bucket: Store, index: shards.DatasetIndex, stop: Any) -> Any:
    return SimpleNamespace(index=index, close=lambda: None)


def encode(world: World, process: Process, slice_text: str) -> None:
    """Encodes the dataset."""
    request = EncodeRequest(name="tiny", bucket="sim://bucket", autoencoder="there", to="latents", slice=slice_text)
    opened = cast(latents.Opened, lambda *_: nullcontext(({}, {})))
    latents.encode_dataset(SimulatedStore(world, process), request, opened, process.stop)


class EncodeChecks(PieceChecks):
    """Machines round differently: the statistics must be those of the shards that the index names."""

    def __init__(self, world: World, undisturbed: Any) -> None:
        super().__init__(world, None, ENCODED, shards.INDEX)

    def outcome(self) -> Any:
        """Checks the statistics."""
        index = json.loads(self.world.objects[self._result][0])
        totals = {sha256(content): total for host in ("one", "two", "elsewhere")
                  for content, total in (_latents(host, number) for number in range(PIECES))}  # fmt: skip
        wanted = sum(totals[shard.sha256] for shard in shards.Shards(**index["shards"])) / (PIECES * (SIZE // 2) ** 2)
        if not np.allclose(index["encoding"]["mean"], wanted, rtol=1e-12):
            raise Violation("the statistics of the latents are not those of the shards in the index")
        return None

    def ended(self, process: Process) -> None:
        """Checks how a process ended."""
        if isinstance(process.error, BadRequestError) and "is there already" in str(process.error):
            process.error = None
        super().ended(process)


# Sampling


@cache
def _sample_set_config() -> SampleSetConfig:
    return SampleSetConfig(
        checkpoint="checkpoints/000001-000000000024", checkpoint_sha256="0" * 64, size=ImageSize.of(SIZE),
        channels=3, classes=(), first_seed=0, count=2 * PIECES, piece_images=2, save="shards",
    )  # fmt: skip


def _set(store: Store, slice_text: str) -> SampleSet:
    return SampleSet(store.sub("runs/r"), "drawn", CheckpointRef(1, 24), _sample_set_config(), Slice.parse(slice_text))


def sample(world: World, process: Process, slice_text: str) -> float:
    """Draws the pieces of a set, as `job.sampling.pictures` does; returns how many images this process made."""
    sample_set = _set(SimulatedStore(world, process), slice_text)

    def make(number: int, advance: Advance) -> Made:
        _make_slowly()
        process.stop.check("while drawing")
        advance(2)
        key = f"samples/drawn/piece-{number:05d}.tar"
        return Made({key: f"piece {number} as {process.host} rounds".encode()})

    made = sample_set.pieces.make_missing(make, "drawing", stop=process.stop)
    if not sample_set.pieces.missing() and sample_set.index() is None:
        sample_set.publish(process.stop)
    return made


class SampleChecks(PieceChecks):
    """The images that all machines say they made are those that there are."""

    def __init__(self, world: World, undisturbed: Any) -> None:
        super().__init__(world, None, "runs/r/samples/drawn", "index.json")

    @property
    def above(self) -> str:
        """Keys are below the run."""
        return "runs/r/"

    def outcome(self) -> Any:
        """Checks the sum over all machines."""
        processes = self.world.processes
        made = sum(process.result or 0 for process in processes)
        if made > 2 * PIECES or (made < 2 * PIECES and not any(one.was_killed or one.error for one in processes)):
            raise Violation(f"the machines made {made:g} images in all, of {2 * PIECES}")
        return None


# Scoring


@cache
def _reference() -> Reference:
    return Reference(
        dataset="tiny", dataset_id="0" * 64, size=ImageSize.of(SIZE), crop="center", resize_filter="lanczos",
        images=12, of_images=12, extractor="inception", extractor_sha256="0" * 64,
    )  # fmt: skip


def _scored(chosen: Any, drawn: Any, real: Any, stop: Any, title: str) -> Any:
    return {"fid": float(drawn["features"].sum())}, {"fid": 0.0}, (6, 6)


def score(world: World, process: Process, slice_text: str) -> None:
    """Makes features and scores them, as `job.evaluation.evaluate` does."""
    plan: Any = SimpleNamespace(reference=_reference(), index=SimpleNamespace(held_out=""))
    evaluation = Evaluation(plan, _set(SimulatedStore(world, process), slice_text))
    features = evaluation.features

    def make(number: int, advance: Advance) -> Made:
        _make_slowly()
        process.stop.check("while drawing")
        advance(2)
        return features.made(number, {"features": torch.full((2, 2), float(number + 1))})

    if evaluation.scores() is None:
        features.make_missing(make, "drawn", stop=process.stop)
        if not features.missing():
            evaluate._publish(evaluation, {}, (None, 0), process.stop)


class ScoreChecks(PieceChecks):
    """The score is that of all pieces, each of them once."""

    def __init__(self, world: World, undisturbed: Any) -> None:
        plan: Any = SimpleNamespace(reference=_reference())
        name = Evaluation(plan, SampleSet(None, "drawn", CheckpointRef(1, 24), _sample_set_config())).name  # type: ignore[arg-type]
        super().__init__(world, undisturbed, f"runs/r/evaluations/{name}", "scores.json")

    def outcome(self) -> Any:
        """Returns the score."""
        return json.loads(self.world.objects[self._result][0])["values"]


@contextmanager
def small_work() -> Iterator[None]:
    """Replaces images by a few bytes until the context ends."""
    encoder = SimpleNamespace(
        size=ImageSize.of(SIZE // 2),
        channels=3,
        files=(b"config", b"weights"),
    )
    with ExitStack() as stack:
        for module, name, ours in (
            (packing, "_Copying", _FewImages),
            (latents, "_encoder", lambda *_: encoder),
            (latents, "ImageCache", _opened),
            (latents, "_Encoding", _FewLatents),
            (evaluate, "scored", _scored),
        ):
            stack.enter_context(patch.object(module, name, ours))
        yield

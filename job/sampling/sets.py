"""`ddpm sample --count`: many images of a checkpoint, in pieces that are committed one by one.

RUN/samples/epoch-0080-ddim-100-0-50000/drawing.json               what decides the images: created once, first
                                        piece-00012.tar            a shard that webdataset can read
                                        records/piece-00012.json   created once, after the piece: its commit
                                        grid.png                   the first images
                                        index.json                 created once, when all pieces are there
RUN/samples/epoch-0080-ddim-100-0-50000-png/piece-00012/000003072.png …   with --save png

Each process makes pieces of its own and commits them. Which pieces are there decides what is left to do, so that a job
goes on wherever it was stopped, in other slices and processes too. Nobody who samples writes over or deletes anything.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import numpy as np
from PIL import Image

from job.code_version import code_version
from job.data.images import decode
from job.exits import BadDataError, BadRequestError, StoppedError
from job.progress import Progress
from job.runs import records
from job.runs.layout import SAMPLES, CheckpointRef, ObjectKind
from job.runs.pictures import put_picture
from job.runs.pieces import BatchIndex, Drawing, Opening, PieceFile, PieceRecord, piece_entry, piece_name
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError, Store

AboutDrawing = TypeVar("AboutDrawing", Opening, PieceRecord, BatchIndex)

PIECES_WANTED = 64
"""So many pieces, if they are of a useful size, let a dozen slices finish at about the same time."""
SMALLEST_PIECE_IMAGES = 16
LARGEST_PIECE_IMAGES = 256
"""What a process that is killed has drawn in vain is at most two of these: one on its way, one half drawn."""
MOST_PIECES = 100_000
TRANSFERS = 16
ARRIVAL_POLL_SECONDS = 0.05


def piece_images(count: int) -> int:
    """Images of a piece: a function of `count` alone, so that a job may go on in other slices, batches or processes."""
    wanted = min(max(ceil(count / PIECES_WANTED), SMALLEST_PIECE_IMAGES), LARGEST_PIECE_IMAGES)
    return max(wanted, ceil(count / MOST_PIECES))


@dataclass(frozen=True)
class SampleSet:
    """The images of a drawing, and their folder `name` below the run's samples."""

    run: Store
    name: str
    ref: CheckpointRef
    drawing: Drawing

    @property
    def uri(self) -> str:
        """Of its folder."""
        return self.folder.uri

    @property
    def folder(self) -> Store:
        """Where it lies."""
        return self.run.sub(f"{SAMPLES}/{self.name}")

    def key(self, kind: ObjectKind, piece: int = 0) -> str:
        """Where an object of this set lies, below the run."""
        return kind.key(batch=self.name, piece=piece)

    def check(self) -> None:
        """Returns if the folder is empty, or about this drawing.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        self._load(Opening, self.key(ObjectKind.DRAWING))

    def begin(self) -> set[int]:
        """Claims the folder for this drawing, and returns the numbers of the pieces that are there.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        try:
            self.run.create(self.key(ObjectKind.DRAWING), Opening(drawing=self.drawing).to_json())
        except ObjectExistsError:
            self.check()
        return self.committed()

    def committed(self) -> set[int]:
        """The numbers of the pieces that are there."""
        numbers = {self.key(ObjectKind.RECORD, number): number for number in range(self.drawing.pieces)}
        folder = self.key(ObjectKind.RECORD).rpartition("/")[0]
        return {numbers[entry.key] for entry in self.run.list(folder) if entry.key in numbers}

    def is_committed(self, number: int) -> bool:
        """Whether a piece is there by now."""
        return self.run.exists(self.key(ObjectKind.RECORD, number))

    def record(self, number: int) -> PieceRecord:
        """The record of a piece.

        Raises:
            BadDataError: it is rotten, missing, or that of another piece.
            BadRequestError: it is about another drawing.
        """
        key, seeds = self.key(ObjectKind.RECORD, number), self.drawing.seeds(number)
        record = self._load(PieceRecord, key)
        if record is None or (record.number, record.first_seed, record.images) != (number, seeds[0], len(seeds)):
            raise BadDataError(f"{self.run.uri_of(key)} is missing or another's: delete it, and type the same again")
        return record

    def index(self) -> BatchIndex | None:
        """The index, if all pieces are there.

        Raises:
            BadDataError: it is rotten, or a piece has gone that it lists; the message says what to delete.
            BadRequestError: it is about another drawing.
        """
        index = self._load(BatchIndex, self.key(ObjectKind.INDEX))
        if index is not None:
            self._check_files(index)
        return index

    def publish(self, grid_of: Callable[[np.ndarray], bytes], images: int, stop: Stop = NEVER) -> None:
        """Says that everything is there: a grid of the first `images`, which `grid_of` makes, and the index.

        Raises:
            BadDataError: something is rotten or missing; the message says what to delete.
        """
        found: list[PieceRecord] = []
        bar = Progress("reading records", total=self.drawing.pieces, unit="records")
        with bar, ThreadPoolExecutor(TRANSFERS) as pool:
            for record in pool.map(self.record, range(self.drawing.pieces)):
                stop.check("while the records were read")
                found.append(record)
                bar.update(len(found))
        index = BatchIndex(drawing=self.drawing, pieces=tuple(map(piece_entry, found)))
        self._check_files(index)
        grid = grid_of(self.images_of(found[0], images))
        put_picture(self.run, self.key(ObjectKind.GRID), grid, self.ref)
        # Whoever else saw the last piece come writes the same.
        self.run.create(self.key(ObjectKind.INDEX), index.to_json())

    def images_of(self, record: PieceRecord, images: int) -> np.ndarray:
        """The first images of a piece: uint8 [n, H, W, C].

        Raises:
            BadDataError: an object of it is missing or damaged; the message names it.
        """
        found: list[np.ndarray] = []
        for file in record.files:
            data = self.folder.read(file.name).data
            try:
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise BadDataError("its SHA-256 is not the one in its record")
                found += [decode(png, self.drawing.channels, self.drawing.size) for png in _pngs(file.name, data)]
            except (BadDataError, tarfile.TarError) as error:
                what = f"{self.folder.uri_of(file.name)} is rotten: {error}"
                raise BadDataError(f"{what}; {self._how_to_repeat(record.number)}") from None
            if len(found) >= images:
                break
        return np.stack(found[:images])

    def describe(self, note: str) -> str:
        """A line for people about a whole set."""
        drawing = self.drawing
        pieces = f"{drawing.pieces:,} piece{'s' * (drawing.pieces > 1)}"
        return f"{self.run.uri_of(self.key(ObjectKind.INDEX))}  ({drawing.count:,} images in {pieces}; {note})"

    def _load(self, kind: type[AboutDrawing], key: str) -> AboutDrawing | None:
        """A record if it is there and about this drawing."""
        try:
            found = kind.load(self.run, key)
        except ObjectMissingError:
            return None
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes it again") from None
        theirs, ours = found.drawing.model_dump(), self.drawing.model_dump()
        differing = [
            f"{name} {theirs[name]!s:.12} and not {ours[name]!s:.12}" for name in ours if theirs[name] != ours[name]
        ]
        if differing:
            raise BadRequestError(
                f"{self.run.uri_of(key)} is about images of another drawing ({', '.join(differing)}): "
                f"delete {self.uri} to draw them anew, or draw others with --first-seed"
            )
        return found

    def _check_files(self, index: BatchIndex) -> None:
        """Returns if the pieces are there, going by a listing; what is in them is for `ddpm runs verify`."""
        found = Counter[str]()
        for entry in self.folder.list():
            found[entry.key.partition("/")[0]] += entry.size_bytes
        wrong = [number for number, piece in enumerate(index.pieces) if found[piece.name] != piece.bytes]
        if wrong:
            raise BadDataError(
                f"{self.uri}/{index.pieces[wrong[0]].name} is missing or not as its record says "
                f"({len(wrong)} such); {self._how_to_repeat(wrong[0])}"
            )

    def _how_to_repeat(self, number: int) -> str:
        others = " and ".join(
            self.run.uri_of(key) for key in (self.key(ObjectKind.RECORD, number), self.key(ObjectKind.INDEX))
        )
        return f"delete it, {others}, as far as they are there, and the same command makes this piece again"


def commit_piece(sample_set: SampleSet, number: int, images: np.ndarray) -> int:
    """Uploads uint8 [n, H, W, C] as a piece and creates its record; how many images this process has made by that.

    What a process that was killed left of the piece is taken as it is: it shows the same images.
    """
    from ddpm import figures

    drawing, seeds = sample_set.drawing, sample_set.drawing.seeds(number)
    pngs = [figures.png(Image.fromarray(one.squeeze(-1) if drawing.channels == 1 else one)) for one in images]
    if drawing.save == "shards":
        files = {f"{piece_name(number)}.tar": _shard(drawing, seeds, pngs)}
    else:
        names = (f"{piece_name(number)}/{drawing.image_name(seed)}.png" for seed in seeds)
        files = dict(zip(names, pngs, strict=True))

    def store(name: str) -> PieceFile:
        data = files[name]
        try:
            sample_set.folder.create(name, data)
        except ObjectExistsError:
            data = sample_set.folder.read(name).data
        return PieceFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    with ThreadPoolExecutor(TRANSFERS) as pool:
        stored = tuple(pool.map(store, files))
    record = PieceRecord(
        number=number,
        first_seed=seeds[0],
        images=len(seeds),
        files=stored,
        drawing=drawing,
        attempt=uuid.uuid4().hex,
        created=records.utc_now(),
        code_version=code_version(),
    )
    try:
        sample_set.run.create(sample_set.key(ObjectKind.RECORD, number), record.to_json())
    except ObjectExistsError:
        return 0
    return len(seeds)


class PieceWriter:
    """Commits a piece in a thread of its own, while the next one is drawn."""

    def __init__(self, sample_set: SampleSet, stop: Stop) -> None:
        """Pieces belong to `sample_set`; a stop lets what is on its way arrive, for as long as there is time."""
        self.made_images = 0
        self._set, self._stop = sample_set, stop
        self._pool = ThreadPoolExecutor(1, "piece-writer")
        self._pending: Future[int] | None = None

    def submit(self, number: int, images: np.ndarray) -> None:
        """Sends a piece, uint8 [n, H, W, C], on its way once the one before has arrived; for the rest see `wait`."""
        self.wait()
        self._pending = self._pool.submit(commit_piece, self._set, number, images)

    def wait(self) -> None:
        """Returns when everything has arrived.

        Raises:
            StoppedError: there was no time left for it.
            JobError: it could not be committed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        while not pending.done():
            if self._stop() and self._stop.seconds_left_to_save() <= 0:
                raise StoppedError("stopped before the last piece was in the bucket")
            wait([pending], ARRIVAL_POLL_SECONDS)
        self.made_images += pending.result()


def _shard(drawing: Drawing, seeds: range, pngs: list[bytes]) -> bytes:
    """A tar that webdataset can read: `000003072.png`, and `000003072.cls` where there are classes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for seed, png in zip(seeds, pngs, strict=True):
            members = {"png": png} | ({"cls": str(drawing.label(seed)).encode()} if drawing.classes else {})
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{drawing.image_name(seed)}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _pngs(name: str, data: bytes) -> list[bytes]:
    if name.endswith(".png"):
        return [data]
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = (tar.extractfile(member) for member in tar if member.name.endswith(".png"))
        return [file.read() for file in files if file is not None]

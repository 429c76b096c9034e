"""`ddpm sample --count`: many images of a checkpoint, in pieces that are committed one by one.

RUN/samples/epoch-0080-ddim-100-0-50000/drawing.json               what decides the images: created once, first
                                        piece-00012.tar            a shard that webdataset can read
                                        records/piece-00012.json   created once, after the piece: its commit
                                        grid.png                   the first images, before their piece
                                        index.json                 created once, when all pieces are there
RUN/samples/epoch-0080-ddim-100-0-50000-png/piece-00012/000003072.png …   with --save png

Each process makes pieces of its own and commits them. Which pieces are there decides what is left to do, so that a job
goes on wherever it was stopped, in other slices and processes too. Nobody who samples writes over or deletes anything.
"""

from __future__ import annotations

import io
import tarfile
import uuid
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TypeVar

import numpy as np
from PIL import Image

from job.code_version import code_version
from job.exits import BadDataError, BadRequestError, StoppedError
from job.runs.layout import SAMPLES, CheckpointRef, ObjectKind, places_in
from job.runs.records import NamedObject
from job.runs.samples import BatchIndex, DrawingRecord, NumberedDrawing, PieceRecord
from job.sealed import utc_now
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError, Store

AboutDrawing = TypeVar("AboutDrawing", DrawingRecord, PieceRecord, BatchIndex)

PIECES_WANTED = 64
"""So many pieces, if they are of a useful size, let a dozen slices finish at about the same time."""
SMALLEST_PIECE_IMAGES = 16
LARGEST_PIECE_IMAGES = 256
"""What a process that is killed has drawn in vain is at most two of these: one on its way, one half drawn."""
TRANSFERS = 16
ARRIVAL_POLL_SECONDS = 0.05


def piece_images(count: int) -> int:
    """Images of a piece: a function of `count` alone, so that a job may go on in other slices, batches or processes."""
    return min(max(ceil(count / PIECES_WANTED), SMALLEST_PIECE_IMAGES), LARGEST_PIECE_IMAGES)


@dataclass(frozen=True)
class SampleSet:
    """The images of a drawing, and their folder `name` below the run's samples."""

    run: Store
    name: str
    ref: CheckpointRef
    drawing: NumberedDrawing

    @property
    def folder(self) -> Store:
        """Where it lies."""
        return self.run.sub(f"{SAMPLES}/{self.name}")

    def key(self, kind: ObjectKind, piece: int = 0, seed: int = 0) -> str:
        """Where an object of this set lies, below the run."""
        return kind.key(batch=self.name, piece=piece, seed=seed)

    def check(self) -> None:
        """Returns if the folder is empty, or about this drawing.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        self._load(DrawingRecord, self.key(ObjectKind.DRAWING))

    def begin(self) -> set[int]:
        """Claims the folder for this drawing, and returns the numbers of the pieces that are there.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        try:
            self.run.create(self.key(ObjectKind.DRAWING), DrawingRecord(drawing=self.drawing).to_json())
        except ObjectExistsError:
            self.check()
        return self.committed()

    def committed(self) -> set[int]:
        """The numbers of the pieces that are there."""
        places = places_in(self.run, self.key(ObjectKind.RECORD).rpartition("/")[0]).values()
        return {place.piece for place in places} & {*range(self.drawing.pieces)}

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

    def publish(self, stop: Stop = NEVER) -> None:
        """Says in the index that everything is there.

        Raises:
            BadDataError: something is rotten or missing; the message says what to delete.
        """
        pieces, keys = list[NamedObject](), [self.key(ObjectKind.RECORD, n) for n in range(self.drawing.pieces)]
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for key, record in zip(keys, pool.map(partial(self._load, PieceRecord), keys), strict=True):
                stop.check("while the records were read")
                if record is None:
                    raise BadDataError(f"{self.run.uri_of(key)} is missing: type the same again")
                pieces.append(record.in_index)
        index = BatchIndex(drawing=self.drawing, pieces=tuple(pieces))
        self._check_files(index)
        # Whoever else saw the last piece come writes the same.
        self.run.create(self.key(ObjectKind.INDEX), index.to_json())

    def describe(self, note: str) -> str:
        """A line for people about a whole set."""
        pieces = f"{self.drawing.pieces:,} piece{'s' * (self.drawing.pieces > 1)}"
        return f"{self.run.uri_of(self.key(ObjectKind.INDEX))}  ({self.drawing.count:,} images in {pieces}; {note})"

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
                f"delete {self.folder.uri} to draw them anew, or draw others with --first-seed"
            )
        return found

    def _check_files(self, index: BatchIndex) -> None:
        """Returns if the pieces are there, going by a listing; what is in them is for `ddpm runs verify`."""
        found = Counter[str]()
        for entry in self.run.list(f"{SAMPLES}/{self.name}"):
            # An image belongs to the folder of its piece.
            found["/".join(entry.key.split("/")[:3])] += entry.size_bytes
        wrong = [number for number, piece in enumerate(index.pieces) if found[piece.key] != piece.size_bytes]
        if wrong:
            record_key, index_key = self.key(ObjectKind.RECORD, wrong[0]), self.key(ObjectKind.INDEX)
            raise BadDataError(
                f"{self.run.uri_of(index.pieces[wrong[0]].key)} is missing or not as its record says "
                f"({len(wrong)} such); delete it, {self.run.uri_of(record_key)} and {self.run.uri_of(index_key)}, as "
                "far as they are there, and the same command makes this piece again"
            )


def commit_piece(sample_set: SampleSet, number: int, images: np.ndarray) -> int:
    """Uploads uint8 [n, H, W, C] as a piece and creates its record; how many images this process has made by that.

    What a process that was killed left of the piece is taken as it is: it shows the same images.
    """
    from ddpm import figures

    drawing, seeds = sample_set.drawing, sample_set.drawing.seeds(number)
    pngs = [figures.png(Image.fromarray(one.squeeze(-1) if drawing.channels == 1 else one)) for one in images]
    if drawing.save == "shards":
        files = {sample_set.key(ObjectKind.PIECE, number): _shard(drawing, seeds, pngs)}
    else:
        files = {sample_set.key(ObjectKind.IMAGE, number, seed): png for seed, png in zip(seeds, pngs, strict=True)}

    def store(key: str) -> NamedObject:
        data = files[key]
        try:
            sample_set.run.create(key, data)
        except ObjectExistsError:
            data = sample_set.run.read(key).data
        return NamedObject.of(key, data)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        stored = tuple(pool.map(store, files))
    record = PieceRecord(
        number=number,
        files=stored,
        drawing=drawing,
        attempt=uuid.uuid4().hex,
        created=utc_now(),
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
        while not wait([pending], ARRIVAL_POLL_SECONDS).done:
            if self._stop() and self._stop.seconds_left_to_save() <= 0:
                raise StoppedError("stopped before the last piece was in the bucket")
        self.made_images += pending.result()


def _shard(drawing: NumberedDrawing, seeds: range, pngs: list[bytes]) -> bytes:
    """A tar that webdataset can read: `000003072.png`, and `000003072.cls` where there are classes."""
    file = io.BytesIO()
    labels = drawing.labels or range(len(drawing.classes))
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for seed, png in zip(seeds, pngs, strict=True):
            members = {"png": png} | ({"cls": str(labels[seed % len(labels)]).encode()} if labels else {})
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{seed:09d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()

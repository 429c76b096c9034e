"""Many images of one checkpoint, in pieces that are committed one by one: their layout, and which are there.

RUN/samples/epoch-0080-ddim-100-0-50000/drawing.json               what decides the images: created once, first
                                        piece-00012.tar            a shard that webdataset can read
                                        records/piece-00012.json   created once, after the piece: its commit
                                        grid.png                   the first images
                                        index.json                 created once, when all pieces are there
RUN/samples/epoch-0080-ddim-100-0-50000-png/piece-00012/000003072.png …   with --save png

Nobody who samples writes over or deletes anything here, and `ddpm runs prune` deletes only what has no record. So what
lies there stays what its record says, however many processes make the same piece, and a piece without a record, left by
a process that was killed, is as good as another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil

from job.exits import BadDataError, BadRequestError
from job.runs.pieces import BatchIndex, Drawing, Opening, PieceRecord, piece_entry, piece_name
from job.store import ObjectExistsError, ObjectMissingError, Store

DRAWING = "drawing.json"
RECORDS = "records"
GRID = "grid.png"
INDEX = "index.json"
PIECES_WANTED = 64
"""So many pieces, if they are of a useful size, let a dozen slices finish at about the same time."""
SMALLEST_PIECE_IMAGES = 16
LARGEST_PIECE_IMAGES = 256
"""What a process that is killed has drawn in vain is at most three of these: two on their way, one half drawn."""
MOST_PIECES = 100_000
READERS = 16
_SHA256 = r"^[0-9a-f]{64}$"


def piece_images(count: int) -> int:
    """Images of a piece: a function of `count` alone, so that a job may go on in other slices, batches or processes."""
    wanted = min(max(ceil(count / PIECES_WANTED), SMALLEST_PIECE_IMAGES), LARGEST_PIECE_IMAGES)
    return max(wanted, ceil(count / MOST_PIECES))


def record_key(number: int) -> str:
    """Where a piece's record lies; apart from the pieces, so that records are listed without a million images."""
    return f"{RECORDS}/{piece_name(number)}.json"


@dataclass(frozen=True)
class Batch:
    """A drawing and its folder in the bucket."""

    store: Store
    drawing: Drawing

    def check(self) -> None:
        """Returns if the folder is empty, or about this drawing.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        try:
            found = Opening.load(self.store, DRAWING)
        except ObjectMissingError:
            return
        self._check_same(found.drawing, DRAWING)

    def begin(self) -> None:
        """Claims the folder for this drawing.

        Raises:
            BadRequestError: it is about another; the message says in what they differ.
        """
        try:
            self.store.create(DRAWING, Opening(drawing=self.drawing).to_json())
        except ObjectExistsError:
            self.check()

    def committed(self) -> set[int]:
        """The numbers of the pieces that are there."""
        numbers = {record_key(number): number for number in range(self.drawing.pieces)}
        return {numbers[entry.key] for entry in self.store.list(RECORDS) if entry.key in numbers}

    def is_committed(self, number: int) -> bool:
        """Whether a piece is there by now."""
        return self.store.exists(record_key(number))

    def load(self, number: int) -> PieceRecord:
        """The record of a piece.

        Raises:
            BadDataError: it is rotten, or that of another piece.
            BadRequestError: it is about another drawing.
        """
        key, seeds = record_key(number), self.drawing.seeds(number)
        try:
            record = PieceRecord.load(self.store, key)
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes this piece again") from None
        self._check_same(record.drawing, key)
        if (record.number, record.first_seed, record.images) != (number, seeds[0], len(seeds)):
            raise BadDataError(f"{self.store.uri_of(key)} is about piece {record.number}: delete it and start again")
        return record

    def check_files(self, record: PieceRecord, sizes: Mapping[str, int]) -> None:
        """Returns if the files of a record are there, going by a listing: sizes in bytes by key.

        Raises:
            BadDataError: one is missing or of another size; the message says what to delete.
        """
        for file in record.files:
            if sizes.get(file.name) != file.bytes:
                what = "is missing" if file.name not in sizes else "is not as its record says"
                raise BadDataError(
                    f"{self.store.uri_of(file.name)} {what}: delete it, {record_key(record.number)} and {INDEX}, as "
                    "far as they are there, and the same command makes this piece again"
                )

    def load_all(
        self, numbers: Iterable[int], progress: Callable[[int], object] = lambda done: None
    ) -> list[PieceRecord]:
        """The records of some pieces, in order, many at a time; `progress` learns how many there are by now.

        Raises:
            BadDataError, BadRequestError: as `load`.
        """
        records: list[PieceRecord] = []
        with ThreadPoolExecutor(READERS) as pool:
            for record in pool.map(self.load, numbers):
                records.append(record)
                progress(len(records))
        return records

    def index(self) -> BatchIndex | None:
        """The index, if everything is there.

        Raises:
            BadDataError: it is rotten.
            BadRequestError: it is about another drawing.
        """
        try:
            index = BatchIndex.load(self.store, INDEX)
        except ObjectMissingError:
            return None
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes it again") from None
        self._check_same(index.drawing, INDEX)
        return index

    def check_whole(self, index: BatchIndex) -> None:
        """Returns if all that the index lists is there, by name and size; what is in it is for `ddpm runs verify`.

        Raises:
            BadDataError: something is missing or of another size; the message says what to delete.
        """
        sizes = {entry.key: entry.size_bytes for entry in self.store.list()}
        found: dict[str, list[int]] = {}
        for key, size_bytes in sizes.items():
            found.setdefault(key.partition("/")[0], []).append(size_bytes)
        expected = {
            piece.name: (1 if self.drawing.save == "shards" else piece.images, piece.bytes) for piece in index.pieces
        }
        wrong = [
            name for name, size in expected.items() if (len(found.get(name, ())), sum(found.get(name, ()))) != size
        ]
        if wrong:
            number = int(wrong[0].removeprefix("piece-")[:5])
            keys = [key for key in (INDEX, record_key(number)) if key in sizes]
            keys += [key for key in sizes if key.partition("/")[0] == wrong[0]]
            raise BadDataError(
                f"{self.store.uri}: {wrong[0]} is not what its index says ({len(wrong)} such): delete "
                f"{', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}, and the same command makes it again"
            )
        missing = [
            key for key in (DRAWING, GRID, *(record_key(n) for n in range(self.drawing.pieces))) if key not in sizes
        ]
        if missing:
            raise BadDataError(
                f"{self.store.uri_of(missing[0])} is missing ({len(missing)} such), though all images are there: "
                f"delete {INDEX} beside it, and the same command makes it again"
            )

    def commit_index(self, records: Sequence[PieceRecord]) -> None:
        """Says that everything is there; `records` are those of all pieces, in order."""
        index = BatchIndex(drawing=self.drawing, pieces=tuple(piece_entry(record) for record in records))
        self.store.create(INDEX, index.to_json())

    def describe(self, note: str) -> str:
        """A line for people about a whole batch."""
        drawing = self.drawing
        pieces = f"{drawing.pieces:,} piece{'s' * (drawing.pieces > 1)}"
        return f"{self.store.uri_of(INDEX)}  ({drawing.count:,} images in {pieces}; {note})"

    def _check_same(self, found: Drawing, key: str) -> None:
        theirs, ours = found.model_dump(), self.drawing.model_dump()
        differing = [
            f"{name} {theirs[name]!s:.12} and not {ours[name]!s:.12}" for name in ours if theirs[name] != ours[name]
        ]
        if differing:
            raise BadRequestError(
                f"{self.store.uri_of(key)} is about images of another drawing ({', '.join(differing)}): "
                f"delete {self.store.uri} to draw them anew, or draw others with --first-seed"
            )

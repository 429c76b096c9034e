"""Long work in numbered pieces, which processes and machines share, and which resumes wherever it was stopped.

    FOLDER/pieces/00012.json            the record of a piece, created once, after its files: the commit
           claims/00012/lease.json      the process that makes the piece now, where machines share the work

A process first makes the pieces of its own slice, then those that no machine has begun, then those whose machine died.
Records decide what is left to do. A claim only keeps two machines from making the same piece: one that is wrong costs
time and nothing else.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import Field

from job.coordination.lease import LEASE_KEY, RENEW_SECONDS, Lease, claim_version
from job.coordination.sealed import SHA256_PATTERN, Moment, NamedObject, Sealed, code_version, utc_now
from job.exits import BadDataError, BadRequestError, LostRunError, StoppedError
from job.processes.launcher import lost_peer
from job.progress import Progress
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError, Store

if TYPE_CHECKING:
    from job.processes.ranks import Ranks

T = TypeVar("T")

RECORDS, CLAIMS = "pieces", "claims"
TRANSFERS = 16
"""Objects that are read or written at a time."""
_HASHED_BYTES = 1 << 25
"""Larger files of pieces are not read again before the commit; the offset table of a million images is read."""
IF_NONE_RUNS = "if none of them runs any more, the same command makes the rest"
_POLL_SECONDS, _POLL_CLAIMS_SECONDS = 0.05, 1.0


@dataclass(frozen=True)
class Slice:
    """The share of one machine of several: every `count`-th piece, from `index` on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Parses `--slice I/N`; an empty text means one machine for all pieces.

        Raises:
            BadRequestError: the text is not a slice.
        """
        if not text:
            return WHOLE
        match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise BadRequestError(
                f"--slice {text!r}: slices are i/n with i from 0 to n-1, such as 0/4, 1/4, 2/4 and 3/4"
            )
        return cls(int(match[1]), int(match[2]))


WHOLE = Slice(0, 1)


class PieceRecord(Sealed):
    """The record of a committed piece."""

    fingerprint: str = Field(pattern=SHA256_PATTERN)
    """The SHA-256 of everything that decides the pieces."""
    number: int = Field(ge=0)
    files: tuple[NamedObject, ...]
    facts: dict[str, Any]
    """Results that the last step combines over all pieces."""
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    """A unique id: without it two processes that make a piece in the same second could both count it as theirs."""
    created: Moment
    code_version: str


class Made(NamedTuple):
    """A piece before its commit: the content or the local path of each file by its key, and facts for the record.

    A local file is deleted once it is in the bucket.
    """

    files: Mapping[str, bytes | Path]
    facts: Mapping[str, Any] = {}


Advance = Callable[[float], None]
"""Takes the newly finished amount of a piece, in the unit of its size."""
Make = Callable[[int, Advance], Made]
"""Makes the piece of a number."""


class OtherWorkError(BadRequestError):
    """The folder holds pieces of other work."""


class Pieces:
    """The pieces below a folder: the committed ones, the missing ones, and the protocol that makes them."""

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        sizes: Sequence[float],
        *,
        folder: str = "",
        share: Slice = WHOLE,
        result: str = "",
        equal_bytes: bool = False,
    ) -> None:
        """Prepares the work without any request.

        Args:
            store: the store to which the keys of files are relative.
            fingerprint: the SHA-256 of everything that decides the pieces.
            sizes: the size of each piece, such as its number of images; one for every piece.
            folder: the folder of the store with records and claims.
            share: the pieces that this machine makes first.
            result: the key of the object after which the records are deleted; empty if they stay.
            equal_bytes: whether every machine makes the same bytes, so that a different file under a key is an error.
                Otherwise a file that a killed process left is accepted.
        """
        self.store, self.fingerprint, self.sizes = store, fingerprint, sizes
        above = f"{folder}/" if folder else ""
        self._records_folder, self._claims_folder = f"{above}{RECORDS}", f"{above}{CLAIMS}"
        self._share, self._equal_bytes, self.result = share, equal_bytes, result

    def committed(self) -> set[int]:
        """Returns the numbers of the committed pieces, from a listing; all of them once the result exists."""
        there = {entry.key for entry in self.store.list(self._records_folder)}
        numbers = {number for number in range(len(self.sizes)) if self._record_key(number) in there}
        # Another machine may be deleting the records: it created the result before, so this looks for it after them.
        is_finished = len(numbers) < len(self.sizes) and self.is_finished()
        return {*range(len(self.sizes))} if is_finished else numbers

    def missing(self) -> list[int]:
        """Returns the numbers of the missing pieces, in order."""
        return sorted({*range(len(self.sizes))} - self.committed())

    def records(self, numbers: Iterable[int] | None = None, stop: Stop = NEVER) -> list[PieceRecord]:
        """Reads the records of these pieces, or of all.

        Raises:
            ObjectMissingError: a record is missing.
            BadDataError: a record is damaged; after its deletion the piece is made again.
            OtherWorkError: a record belongs to other work.
        """
        records = list[PieceRecord]()
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for record in pool.map(self._record, range(len(self.sizes)) if numbers is None else numbers):
                stop.check("while reading the records of pieces")
                records.append(record)
        return records

    def whole_records(self, stop: Stop) -> list[PieceRecord]:
        """Reads all records for the commit of the work, and compares the files: the sizes of all, and hashes of tables.

        Raises:
            BadDataError: a file is missing or damaged; its piece is deleted, and the same command makes it again.
        """
        records = self.records(stop=stop)
        sizes = {entry.key: entry.size_bytes for entry in self.store.list()}

        def check(record: PieceRecord) -> None:
            for file in record.files:
                try:
                    if sizes.get(file.key) != file.size_bytes:
                        raise BadDataError(f"{self.store.uri_of(file.key)} is not as it was made, or is gone")
                    # A reader verifies each large file before use; here that would take as long as making it.
                    if file.size_bytes <= _HASHED_BYTES:
                        file.read(self.store)
                except BadDataError as error:
                    self.forget(record)
                    raise BadDataError(f"{error}: the same command makes it again") from None

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(check, records))
        return records

    def make_missing(
        self, make: Make, title: str, *, unit: str = "images", stop: Stop = NEVER, ranks: Ranks | None = None
    ) -> float:
        """Makes and commits the missing pieces of this machine's slice, then those of other machines. Collective.

        A thread commits each piece while the next one is made.

        Args:
            make: makes a piece, and checks `stop` now and then.
            title: the title of the progress bar.
            unit: the unit of the sizes.
            stop: ends the wait for a commit.
            ranks: the processes of this machine; None for a single one.

        Returns:
            The amount that the processes of this machine have made and committed.

        Raises:
            OtherWorkError: the folder holds pieces of other work.
            StoppedError: a stop was requested; whole pieces are saved.
        """
        rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        committed = _on_main(ranks, self._checked_committed)
        own = range(self._share.index, len(self.sizes), self._share.count)
        missing = [number for number in own if number not in committed]
        to_make = sum(self.sizes[number] for number in missing)
        there, done = sum(self.sizes[number] for number in own) - to_make, 0.0
        committer, made = _Committer(self, stop), set[int]()

        def advance(more: float) -> None:
            nonlocal done
            done += more
            # The other processes have made about as much; thirds and the like add up to less than the whole.
            bar.update(round(there + min(to_make, done * world_size), 6))

        try:
            with Progress(title, total=round(there + to_make), unit=unit, start=round(there)) as bar:
                try:
                    for number in self._shared_out(missing[rank::world_size], made, rank, world_size, stop):
                        with ExitStack() as claim:
                            if self._takes(number, claim, stop):
                                made.add(number)
                                committer.submit(number, make(number, advance), claim.pop_all())
                finally:
                    committer.wait()
                total = ranks.sum(round(committer.committed))[0] if ranks else committer.committed
                _on_main(ranks, self._clear_claims)
                return total
        except (StoppedError, RuntimeError) as error:
            # A stopped process must not wait for the others, whose pieces may take long: its end ends them.
            if isinstance(error, RuntimeError) and not (stop() and lost_peer(error)):
                raise
            raise StoppedError(
                f"stopped by {stop.reason} while {title}; all whole pieces are saved, and the same command goes on "
                "from there"
            ) from None

    def commit(self, number: int, made: Made) -> bool:
        """Uploads the files of a piece and creates its record; returns whether this process was first.

        Raises:
            ObjectExistsError: a key holds a different file, though every machine makes the same bytes.
        """
        with ThreadPoolExecutor(TRANSFERS) as pool:
            stored = partial(_stored, self.store, self._equal_bytes)
            files = tuple(pool.map(stored, made.files, made.files.values()))
        record = PieceRecord(
            fingerprint=self.fingerprint,
            number=number,
            files=files,
            facts=dict(made.facts),
            attempt=uuid.uuid4().hex,
            created=utc_now(),
            code_version=code_version(),
        )
        try:
            self.store.create(self._record_key(number), record.to_json())
        except ObjectExistsError:
            return False
        return True

    def forget(self, record: PieceRecord) -> None:
        """Deletes a piece with damaged files, so that it is made again; the record goes first."""
        for key in (self._record_key(record.number), *(file.key for file in record.files)):
            self.store.delete(key)

    def clear(self) -> None:
        """Deletes the records after the work, if an index now names the files."""
        _delete_all(self.store, self._records_folder)

    def _clear_claims(self) -> None:
        # Every machine does so at its end: the first may finish the work while another takes or releases a claim.
        if not self.missing():
            _delete_all(self.store, self._claims_folder)

    def _record_key(self, number: int) -> str:
        return f"{self._records_folder}/{number:05d}.json"

    def _claim(self, number: int) -> Store:
        return self.store.sub(f"{self._claims_folder}/{number:05d}")

    def _record(self, number: int) -> PieceRecord:
        key = self._record_key(number)
        try:
            record = PieceRecord.load(self.store, key)
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes the piece again") from None
        if (record.fingerprint, record.number) != (self.fingerprint, number):
            raise OtherWorkError(f"{self.store.uri_of(key)} is of other work: delete it all, or choose another name")
        return record

    def _checked_committed(self) -> set[int]:
        """Returns the committed pieces; raises `OtherWorkError` if the first of them belongs to other work."""
        committed = self.committed()
        # Without a record: another machine has created the result, and deletes them.
        with suppress(ObjectMissingError):
            self.records(sorted(committed)[:1])
        return committed

    def _shared_out(self, own: list[int], made: set[int], rank: int, world_size: int, stop: Stop) -> Iterator[int]:
        """Yields this process's pieces, then those that no machine has begun, then those whose machine died."""
        yield from own
        if self._share.count == 1:
            return
        claimed = set(self.store.folders(self._claims_folder))
        free = [number for number in self.missing() if f"{number:05d}" not in claimed]
        # Busy machines work from the front and other idle ones begin elsewhere: from the back, few claims collide.
        first = len(free) * self._share.index // self._share.count
        for number in [*free[first:], *free[:first]][::-1][rank::world_size]:
            if not self._claim(number).exists(LEASE_KEY):
                yield number
        # The last own piece may not be committed yet: this process must not wait for itself.
        idle = {number: claim_version(self._claim(number)) for number in self.missing() if number not in made}
        until = time.monotonic() + 2 * RENEW_SECONDS
        while idle and (left := until - time.monotonic()) > 0:
            if stop.sleep(min(_POLL_CLAIMS_SECONDS, left)):
                return
            idle = {number: idle[number] for number in self.missing() if number in idle}
        yield from (number for number, version in idle.items() if claim_version(self._claim(number)) == version)

    def _takes(self, number: int, claim: ExitStack, stop: Stop) -> bool:
        """Returns whether this process makes a piece now; if machines share the work, it then holds the claim."""
        if self._share.count > 1:
            if self._is_made(number):
                return False
            try:
                lease = Lease.take(self._claim(number), 0, 0.0, stop, lambda text: None)
            except LostRunError:
                # A machine that is alive makes it.
                return False
            claim.callback(lease.close)
        # Another process may have made it since it was listed.
        return not self._is_made(number)

    def _is_made(self, number: int) -> bool:
        return self.store.exists(self._record_key(number)) or self.is_finished()

    def is_finished(self) -> bool:
        """Returns whether the result exists, after which records are deleted."""
        return bool(self.result) and self.store.exists(self.result)


def _on_main(ranks: Ranks | None, work: Callable[[], T]) -> T:
    return ranks.on_main(work) if ranks else work()


def _stored(store: Store, equal_bytes: bool, key: str, content: bytes | Path) -> NamedObject:
    named = NamedObject.of(key, content)
    try:
        if isinstance(content, Path):
            store.move(content, key)
        else:
            store.create(key, content)
    except ObjectExistsError:
        if equal_bytes:
            raise
        named = NamedObject.of(key, store.read(key).data)
    return named


def _delete_all(store: Store, folder: str) -> None:
    for entry in store.list(folder):
        store.delete(entry.key)


class _Committer:
    """Commits pieces in a thread, one while the next is made."""

    def __init__(self, pieces: Pieces, stop: Stop) -> None:
        self.committed = 0.0
        """How much this process has committed."""
        self._pieces, self._stop = pieces, stop
        self._pool = ThreadPoolExecutor(1, "piece-writer")
        self._pending: Future[None] | None = None

    def submit(self, number: int, made: Made, claim: ExitStack) -> None:
        """Begins a commit after the previous one; the claim is released after it."""
        self.wait()
        self._pending = self._pool.submit(self._commit, number, made, claim)

    def wait(self) -> None:
        """Waits for the last commit.

        Raises:
            StoppedError: a stop request leaves no time for it.
            JobError: the commit failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        while not wait([pending], _POLL_SECONDS).done:
            if self._stop() and self._stop.seconds_left_to_save() <= 0:
                raise StoppedError("stopped before the last piece was in the bucket")
        pending.result()

    def _commit(self, number: int, made: Made, claim: ExitStack) -> None:
        with claim:
            if self._pieces.commit(number, made):
                self.committed += self._pieces.sizes[number]

"""A dataset on its way into the bucket: shards, a journal that vouches for each, and at last the index that commits.

An attempt may be killed at any point, and two may run at once. Objects are created once; what is there already and is
the same counts as written, so that attempts with equal parameters do each other's work. What is there and differs was
left by an attempt with other parameters: it goes, journal first, unless a dataset has been committed in the meantime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from job.exits import BadRequestError
from job.shards import INDEX, OFFSETS_DTYPE, DatasetIndex, Shard, shard_name
from job.store import ObjectExistsError, ObjectMissingError, Store

PACKING = "packing"
REJECTS = "rejects.jsonl"
_PARAMETERS = f"{PACKING}/parameters.json"


class Reject(BaseModel):
    """A line of `rejects.jsonl`: an image that was left out, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.reason}"


class PackedShard(BaseModel):
    """The journal's object for a shard: it is in the bucket whole, and this is what went into it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters_sha256: str
    shard: Shard
    read_images: int
    """Images of the source that were read up to the end of this shard, rejected ones included."""
    source_sha256: str
    """Over the names and contents of these."""
    rejects: tuple[Reject, ...]
    """Those met since the shard before."""
    is_last: bool
    """Whether it ends because the source did, and not because it was full."""

    def to_json(self) -> bytes:
        """Its canonical bytes."""
        return (self.model_dump_json(indent=1) + "\n").encode()


class Journal:
    """The objects of one dataset that is being packed with certain parameters."""

    def __init__(self, dataset: Store, parameters: dict[str, Any]) -> None:
        """Leaves a note of the parameters in the bucket, so that one which is missing or read-only shows at once."""
        self.dataset = dataset
        text = json.dumps(parameters, indent=1, sort_keys=True).encode()
        self.parameters_sha256 = hashlib.sha256(text).hexdigest()
        dataset.put(_PARAMETERS, text)

    def packed(self, source_images: int) -> list[PackedShard]:
        """The shards that are there and may be reused, if the source still has what went into them; forgets others."""
        sizes = {entry.key: entry.size_bytes for entry in self.dataset.list()}
        packed: list[PackedShard] = []
        for number in count():
            entry = self._entry(number) if _key(shard_name(number)) in sizes else None
            if entry is None or (entry.is_last and entry.read_images != source_images):
                break
            shard = entry.shard
            if (sizes.get(shard.name), sizes.get(shard.offsets_name)) != (shard.bytes, _offsets_bytes(shard)):
                break
            packed.append(entry)
        kept = {_PARAMETERS, *(_key(entry.shard.name) for entry in packed)}
        # Only of what was listed before: an equal attempt may have added to the journal since.
        for key in sizes:
            if key.startswith(f"{PACKING}/") and key not in kept:
                self.dataset.delete(key)
        return packed

    def forget(self, packed: Iterable[PackedShard]) -> None:
        """Vouches for these shards no longer."""
        for entry in packed:
            self.dataset.delete(_key(entry.shard.name))

    def add(self, entry: PackedShard, tar: Path, offsets: bytes) -> None:
        """Uploads a finished shard, deletes the local file, and then vouches for it."""
        shard = entry.shard
        self._write(shard.name, lambda: self.dataset.upload(tar, shard.name), _key(shard.name))
        self._write(shard.offsets_name, lambda: self.dataset.create(shard.offsets_name, offsets), _key(shard.name))
        self._write(_key(shard.name), lambda: self.dataset.create(_key(shard.name), entry.to_json()))
        tar.unlink()

    def commit(self, index: DatasetIndex, packed: Sequence[PackedShard], rejects: Sequence[Reject]) -> None:
        """Creates the index, which makes the dataset exist, and clears away what does not belong to it.

        Raises:
            BadRequestError: somebody else packed something different here at the same time.
        """
        if rejects:
            lines = "".join(f"{reject.model_dump_json()}\n" for reject in rejects).encode()
            self._write(REJECTS, lambda: self.dataset.create(REJECTS, lines))
        intact = all(self._entry_bytes(entry.shard.name) == entry.to_json() for entry in packed)
        # An equal attempt that was faster has cleared the journal away, and created the same index.
        if not intact and not self.dataset.exists(INDEX):
            raise BadRequestError(
                f"{self.dataset.uri} is being packed by another process with other images or parameters: "
                "stop one of them, and type this command again"
            )
        try:
            self.dataset.create(INDEX, index.to_json())
        except ObjectExistsError:
            raise self._was_packed_otherwise() from None
        belonging = {INDEX, *([REJECTS] if rejects else [])}
        for shard in index.shards:
            belonging |= {shard.name, shard.offsets_name}
        for there in list(self.dataset.list()):
            if there.key not in belonging:
                self.dataset.delete(there.key)

    def _write(self, key: str, write: Callable[[], object], *vouching: str) -> None:
        try:
            write()
        except ObjectExistsError:
            if self.dataset.exists(INDEX):
                raise self._was_packed_otherwise() from None
            for stale in (*vouching, key):
                self.dataset.delete(stale)
            write()

    def _was_packed_otherwise(self) -> BadRequestError:
        return BadRequestError(
            f"{self.dataset.uri} was packed by another process meanwhile, from other images or with other parameters: "
            "use that dataset, or choose another name"
        )

    def _entry(self, number: int) -> PackedShard | None:
        try:
            entry = PackedShard.model_validate_json(self._entry_bytes(shard_name(number)) or b"")
        except ValidationError:
            return None
        matches = entry.parameters_sha256 == self.parameters_sha256 and entry.shard.name == shard_name(number)
        return entry if matches else None

    def _entry_bytes(self, shard: str) -> bytes | None:
        try:
            return self.dataset.read(_key(shard)).data
        except ObjectMissingError:
            return None


def _key(shard: str) -> str:
    return f"{PACKING}/{shard.removesuffix('.tar')}.json"


def _offsets_bytes(shard: Shard) -> int:
    return shard.images * OFFSETS_DTYPE.itemsize

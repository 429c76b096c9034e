"""A dataset on its way into the bucket: shards, a journal that vouches for each, and at last the index that commits.

An attempt may be killed at any point, and two may run at once. Shards are created once; one that is there and is the
same counts as written, so that attempts with equal parameters do each other's work. One that differs was left by an
attempt with others, and is replaced in three steps: say so in the journal, see that there is no index, delete. Who
commits creates the index, and looks at the journal afterwards. So one of the two always sees the other, and gives way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from job.exits import BadRequestError
from job.shards import INDEX, OFFSETS_DTYPE, DatasetIndex, Shard, shard_name
from job.store import ObjectExistsError, ObjectMissingError, Store

PACKING = "packing"
REJECTS = "rejects.jsonl"
_PARAMETERS = f"{PACKING}/parameters.json"
_REPLACED = b"{}\n"
"""In place of a journal entry: its shard is about to be replaced."""


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
        """The shards from the first on that are there and may be reused, if the source still has what is in them."""
        sizes = {entry.key: entry.size_bytes for entry in self.dataset.list()}
        packed: list[PackedShard] = []
        while True:
            entry = self._entry(len(packed))
            if entry is None or (entry.is_last and entry.read_images != source_images):
                return packed
            shard = entry.shard
            if (sizes.get(shard.name), sizes.get(shard.offsets_name)) != (shard.bytes, _offsets_bytes(shard)):
                return packed
            packed.append(entry)

    def add(self, entry: PackedShard, tar: Path, offsets: bytes) -> None:
        """Uploads a finished shard, vouches for it, and deletes the local file."""
        shard = entry.shard
        self._create(shard.name, lambda: self.dataset.upload(tar, shard.name), shard)
        self._create(shard.offsets_name, lambda: self.dataset.create(shard.offsets_name, offsets), shard)
        self.dataset.put(_key(shard.name), entry.to_json())
        tar.unlink()

    def commit(self, index: DatasetIndex, packed: Sequence[PackedShard], rejects: Sequence[Reject]) -> None:
        """Creates the index, which makes the dataset exist, and clears away what does not belong to it.

        Raises:
            BadRequestError: somebody else is packing, or has packed, something different here at the same time.
        """
        vouching = [self._read(_key(entry.shard.name)) for entry in packed]
        # An equal attempt that was faster has cleared the journal away, and its index is the same.
        if vouching != [entry.to_json() for entry in packed] and not self.dataset.exists(INDEX):
            raise self._is_packed_otherwise()
        if rejects:
            self.dataset.put(REJECTS, "".join(f"{reject.model_dump_json()}\n" for reject in rejects).encode())
        try:
            self.dataset.create(INDEX, index.to_json())
        except ObjectExistsError:
            raise self._was_packed_otherwise() from None
        if any(self._read(_key(entry.shard.name)) not in (entry.to_json(), None) for entry in packed):
            self.dataset.delete(INDEX)
            raise self._is_packed_otherwise()
        belonging = {INDEX, *([REJECTS] if rejects else [])}
        for shard in index.shards:
            belonging |= {shard.name, shard.offsets_name}
        for there in list(self.dataset.list()):
            if there.key not in belonging:
                self.dataset.delete(there.key)

    def _create(self, key: str, write: Callable[[], object], shard: Shard) -> None:
        try:
            write()
        except ObjectExistsError:
            self.dataset.put(_key(shard.name), _REPLACED)
            if self.dataset.exists(INDEX):
                raise self._was_packed_otherwise() from None
            self.dataset.delete(key)
            write()

    def _is_packed_otherwise(self) -> BadRequestError:
        return BadRequestError(
            f"{self.dataset.uri} is being packed by another process from other images or with other parameters: "
            "stop one of them, and type this command again"
        )

    def _was_packed_otherwise(self) -> BadRequestError:
        return BadRequestError(
            f"{self.dataset.uri} was packed by another process meanwhile, from other images or with other parameters: "
            "use that dataset, or choose another name"
        )

    def _entry(self, number: int) -> PackedShard | None:
        try:
            entry = PackedShard.model_validate_json(self._read(_key(shard_name(number))) or b"")
        except ValidationError:
            return None
        matches = entry.parameters_sha256 == self.parameters_sha256 and entry.shard.name == shard_name(number)
        return entry if matches else None

    def _read(self, key: str) -> bytes | None:
        try:
            return self.dataset.read(key).data
        except ObjectMissingError:
            return None


def _key(shard: str) -> str:
    return f"{PACKING}/{shard.removesuffix('.tar')}.json"


def _offsets_bytes(shard: Shard) -> int:
    return shard.images * OFFSETS_DTYPE.itemsize

"""A dataset on its way into the bucket: shards, a journal that vouches for each, and at last the index that commits.

An attempt may be killed at any point, and several may run at once. Objects are created, never written over, and one
that is there and is the same counts as written, so that attempts with equal parameters do each other's work. Of others
the last to begin takes over: it writes its parameters down, sees that there is no index, and deletes what it finds. Who
commits creates the index and then reads the parameters: one of the two always sees the other, and gives way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.data.shards import INDEX, OFFSETS_DTYPE, DatasetIndex, Shard, shard_name
from job.exits import BadDataError, BadRequestError
from job.sealed import Sealed
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


def rejects_lines(rejects: Iterable[Reject]) -> bytes:
    """The bytes of `rejects.jsonl`."""
    return "".join(f"{reject.model_dump_json()}\n" for reject in rejects).encode()


class PackedShard(Sealed):
    """The journal's object for a shard: it is in the bucket whole, and this is what went into it."""

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


class Journal:
    """The objects of one dataset that is being packed with certain parameters."""

    def __init__(self, dataset: Store, parameters: dict[str, Any]) -> None:
        """Takes over. Its first write shows at once whether the bucket is there and can be written to.

        Raises:
            BadRequestError: the dataset was completed in this moment.
        """
        self.dataset = dataset
        self._parameters = json.dumps(parameters, indent=1, sort_keys=True).encode()
        self.parameters_sha256 = hashlib.sha256(self._parameters).hexdigest()
        try:
            dataset.create(_PARAMETERS, self._parameters)
        except ObjectExistsError:
            dataset.put(_PARAMETERS, self._parameters)
            self._clear(key for key in self._sizes() if key != _PARAMETERS)

    def packed(self, source_images: int) -> list[PackedShard]:
        """The shards from the first on that are there and may be reused, if the source still has what is in them."""
        sizes = self._sizes()
        packed: list[PackedShard] = []
        while True:
            key = _key(shard_name(len(packed)))
            try:
                entry = PackedShard.from_json(self._read(key), self.dataset.uri_of(key))
            except BadDataError:
                return packed
            is_of_this = entry.parameters_sha256 == self.parameters_sha256 and _are_there(entry.shard, sizes)
            if not is_of_this or (entry.is_last and entry.read_images != source_images):
                return packed
            packed.append(entry)

    def add(self, entry: PackedShard, tar: Path | None, offsets: bytes) -> None:
        """Uploads a finished shard, vouches for it, and deletes the local file; there is none for a foreign shard.

        Raises:
            BadRequestError: somebody else is packing, or has packed, something different here at the same time.
        """
        try:
            self._create(entry, tar, offsets)
        except ObjectExistsError:
            if not self._is_committed(entry.shard):
                own = [entry.shard.name] if tar else []
                self._clear([_key(entry.shard.name), *own, entry.shard.offsets_name])
                try:
                    self._create(entry, tar, offsets)
                except ObjectExistsError:
                    raise self._is_packed_otherwise() from None
        # Whoever has lost the dataset to others learns it here, and not after hours.
        if not self._is_in_charge():
            raise self._is_packed_otherwise()
        if tar is not None:
            tar.unlink()

    def commit(self, index: DatasetIndex, packed: Sequence[PackedShard], rejects: Sequence[Reject]) -> None:
        """Creates the index, which makes the dataset exist, and clears away what does not belong to it.

        Raises:
            BadRequestError: somebody else is packing, or has packed, something different here at the same time.
        """
        # An equal attempt that was faster has cleared the journal away, and its index is the same.
        if not self._is_intact(packed, vouched=True) and not self.dataset.exists(INDEX):
            raise self._is_packed_otherwise()
        if rejects:
            self.dataset.put(REJECTS, rejects_lines(rejects))
        try:
            self.dataset.create(INDEX, index.to_json())
        except ObjectExistsError:
            raise self._was_packed_otherwise() from None
        if not self._is_intact(packed, vouched=False):
            self.dataset.delete(INDEX)
            raise self._is_packed_otherwise()
        belonging = {INDEX, *([REJECTS] if rejects else [])}
        for shard in index.shards:
            belonging |= {shard.name, shard.offsets_name}
        for key in self._sizes().keys() - belonging:
            self.dataset.delete(key)

    def _create(self, entry: PackedShard, tar: Path | None, offsets: bytes) -> None:
        if tar is not None:
            self.dataset.upload(tar, entry.shard.name)
        self.dataset.create(entry.shard.offsets_name, offsets)
        self.dataset.create(_key(entry.shard.name), entry.to_json())

    def _clear(self, keys: Iterable[str]) -> None:
        """Deletes what others have left, or the same parameters made of a source that has changed."""
        if not self._is_in_charge():
            raise self._is_packed_otherwise()
        if self.dataset.exists(INDEX):
            raise self._was_packed_otherwise()
        # In key order packing/ comes before shard-: the journal must never vouch for what is gone.
        for key in sorted(keys):
            self.dataset.delete(key)

    def _is_in_charge(self) -> bool:
        """Whether nobody with other parameters has taken over; an equal attempt may have committed and cleared up."""
        return self._read(_PARAMETERS) in (self._parameters, b"")

    def _is_committed(self, shard: Shard) -> bool:
        try:
            return shard in DatasetIndex.from_json(self._read(INDEX), self.dataset.uri_of(INDEX)).shards
        except BadDataError:
            return False

    def _is_intact(self, packed: Sequence[PackedShard], vouched: bool) -> bool:
        """Whether all shards are there and vouched for, or at least not otherwise, and nobody has taken over."""
        sizes = self._sizes()
        return self._is_in_charge() and all(
            _are_there(entry.shard, sizes)
            and self._read(_key(entry.shard.name)) in (entry.to_json(), *([] if vouched else [b""]))
            for entry in packed
        )

    def _sizes(self) -> dict[str, int]:
        return {entry.key: entry.size_bytes for entry in self.dataset.list()}

    def _read(self, key: str) -> bytes:
        try:
            return self.dataset.read(key).data
        except ObjectMissingError:
            return b""

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


def _key(shard: str) -> str:
    """Of the journal entry that vouches for a shard."""
    return f"{PACKING}/{shard.removesuffix('.tar')}.json"


def _are_there(shard: Shard, sizes: dict[str, int]) -> bool:
    if sizes.get(shard.offsets_name) != shard.images * OFFSETS_DTYPE.itemsize:
        return False
    return bool(shard.uri) or sizes.get(shard.name) == shard.bytes

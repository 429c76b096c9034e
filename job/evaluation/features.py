"""Features of many images in a bucket, in pieces that are committed one by one: who is stopped loses at most a piece.

A piece is one safetensors object, created once. It says itself what it is about and what its content hashes to, so that
it needs no record: what is damaged, or about other images, is made again.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from job.exits import BadDataError
from job.runs.layout import ObjectKind
from job.store import ObjectExistsError, Store

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[str, "Tensor"]
"""`features` [n, D], and `logits` [n, classes] of networks that have them; float32."""
READS = 8
"""Pieces on their way at a time."""


@dataclass(frozen=True)
class FeatureFolder:
    """A folder with features.

    Attributes:
        store: of the folder.
        fingerprint: SHA-256 of all that decides the features.
        count: images.
        piece_images: images of a piece.
    """

    store: Store
    fingerprint: str
    count: int
    piece_images: int

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return ceil(self.count / self.piece_images)

    def numbers(self, piece: int) -> range:
        """The images of a piece, of `count`."""
        return range(piece * self.piece_images, min((piece + 1) * self.piece_images, self.count))

    def committed(self) -> set[int]:
        """The numbers of the pieces that are there."""
        there = {entry.key for entry in self.store.list()}
        return {piece for piece in range(self.pieces) if _key(piece) in there}

    def commit(self, piece: int, named: Named) -> None:
        """Creates a piece; one that is there already was made of the same images by somebody else."""
        from safetensors.torch import save

        said = {"fingerprint": self.fingerprint, "sha256": _digest(named)}
        with suppress(ObjectExistsError):
            self.store.create(_key(piece), save(named, said))

    def load(self) -> Named:
        """All features, in order; damaged pieces are deleted.

        Raises:
            BadDataError: a piece was damaged, or about other images; the same command makes it again.
            ObjectMissingError: it is gone.
        """
        import torch

        with ThreadPoolExecutor(READS) as pool:
            parts = list(pool.map(self._load, range(self.pieces)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def delete(self) -> None:
        """Removes the pieces."""
        for piece in self.committed():
            self.store.delete(_key(piece))

    def _load(self, piece: int) -> Named:
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.store.read(_key(piece)).data
        try:
            named = load(data)
            is_ours = _said(data) == {"fingerprint": self.fingerprint, "sha256": _digest(named)}
            is_ours &= all(bool(tensor.isfinite().all()) for tensor in named.values())
        except (SafetensorError, KeyError, ValueError, AttributeError):
            is_ours = False
        if not is_ours or len(named["features"]) != len(self.numbers(piece)):
            self.store.delete(_key(piece))
            raise BadDataError(f"{self.store.uri_of(_key(piece))} was damaged: the same command makes it again")
        return named


def _said(data: bytes) -> dict[str, str]:
    """What a safetensors object says beside its tensors."""
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"])


def _key(piece: int) -> str:
    return ObjectKind.FEATURES.value.rpartition("/")[2].format(piece=piece)


def _digest(named: Named) -> str:
    digest = hashlib.sha256()
    for name in sorted(named):
        digest.update(name.encode() + named[name].contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Features of many images in a bucket, one safetensors object for each piece of work (`job.pieces`)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.exits import BadDataError
from job.pieces import TRANSFERS, WHOLE, Made, PieceRecord, Pieces, Slice
from job.runs.layout import ObjectKind
from job.store import ObjectMissingError, Store

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[str, "Tensor"]
"""`features` [n, D], and `logits` [n, classes] of networks that have them; float32."""


@dataclass(frozen=True)
class FeatureFolder:
    """A folder with features.

    Attributes:
        store: the folder.
        fingerprint: the SHA-256 of everything that decides the features.
        count: the number of images.
        piece_images: the number of images in a piece.
        share: the pieces that this machine makes first.
        result: the key of the scores after which the features are deleted; empty if they stay.
    """

    store: Store
    fingerprint: str
    count: int
    piece_images: int
    share: Slice = WHOLE
    result: str = ""

    @property
    def pieces(self) -> Pieces:
        """The pieces of work."""
        sizes = [len(self.numbers(piece)) for piece in range(-(-self.count // self.piece_images))]
        return Pieces(self.store, self.fingerprint, sizes, share=self.share, result=self.result)

    def numbers(self, piece: int) -> range:
        """Returns the images of a piece, of `count`."""
        return range(piece * self.piece_images, min((piece + 1) * self.piece_images, self.count))

    def made(self, piece: int, named: Named) -> Made:
        """Returns the file of a piece."""
        from safetensors.torch import save

        return Made({ObjectKind.FEATURES.value.rpartition("/")[2].format(piece=piece): save(named)})

    def load(self) -> Named:
        """Returns all features, in order; deletes damaged pieces.

        Raises:
            BadDataError: a piece was damaged; the same command makes it again.
            ObjectMissingError: a record or a file is gone, since the result exists.
        """
        import torch

        pieces = self.pieces
        with ThreadPoolExecutor(TRANSFERS) as pool:
            parts = list(pool.map(lambda record: self._load(pieces, record), pieces.records()))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def delete(self) -> None:
        """Deletes all but the result."""
        for entry in self.store.list():
            if entry.key != self.result:
                self.store.delete(entry.key)

    def _load(self, pieces: Pieces, record: PieceRecord) -> Named:
        from safetensors import SafetensorError
        from safetensors.torch import load

        (file,) = record.files
        try:
            named = load(file.read(self.store))
            is_whole = len(named["features"]) == len(self.numbers(record.number))
            is_whole &= all(bool(tensor.isfinite().all()) for tensor in named.values())
        except (BadDataError, SafetensorError, KeyError, ValueError):
            is_whole = False
        if not is_whole:
            # An equal evaluation that was faster has deleted the features, and a record is read before its file.
            if self.result and self.store.exists(self.result):
                raise ObjectMissingError(f"{self.store.uri_of(file.key)} was deleted, since it is scored")
            pieces.forget(record)
            raise BadDataError(f"{self.store.uri_of(file.key)} was damaged: the same command makes it again")
        return named

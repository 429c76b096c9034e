"""Packing: images in, a dataset in the bucket out, whoever is killed on the way.

The same command goes on where an attempt was interrupted: it reads the source from its beginning, for only that tells
whether it is still the same, but decodes and uploads nothing that is in the bucket already. What comes out depends on
the source and the parameters alone: not on threads, interruptions, or how often it was tried.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from job.data.images import Recipe, RejectedImageError, codec_versions, prepare
from job.data.journal import Journal, PackedShard, Reject, rejects_lines
from job.data.members import Source, in_order
from job.data.shards import INDEX, SHARD_BYTES, DatasetIndex, ShardWriter, dataset_key, load_index, shard_name
from job.data.sources import Survey, open_source, survey
from job.exits import BadDataError, BadRequestError
from job.stop import NEVER, Stop
from job.store import Store, open_store
from job.store.files import os_errors
from job.store.scratch import scratch_folder

_NAMED_REJECTS = 3
_IMAGES_PER_THREAD = 16
_SHARDS_IN_UPLOAD = 2
_log = logging.getLogger(__name__)


def pack(
    bucket: Store,
    source: str,
    name: str,
    *,
    size: int,
    crop: str = "center",
    resize_filter: str = "lanczos",
    channels: int | None = None,
    classes: bool | None = None,
    licence: str = "",
    max_bad: int = 100,
    min_side: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int | None], None] | None = None,
    stop: Stop = NEVER,
    threads: int | None = None,
    opened: Callable[[str], Store] = open_store,
) -> DatasetIndex:
    """Packs `source` into `bucket/datasets/NAME-SIZE`, or goes on where an earlier attempt was interrupted.

    Args:
        bucket: where the dataset goes.
        source: a local path or a URI, see `open_source`.
        name: of the dataset.
        size: height and width of the packed images in pixels.
        crop: see `Recipe`.
        resize_filter: see `Recipe`.
        channels: 3 or 1; None takes what the source has: 1 for MNIST's files, else 3.
        classes: see `survey`.
        licence: a note to keep with the dataset.
        max_bad: how many images may be rejected.
        min_side: reject images with a shorter side under this many pixels; None is half of `size`.
        shard_bytes: a shard is closed when it has reached this size.
        progress: called with the number of images read so far and in all.
        stop: asked at each image.
        threads: that decode and encode; None is one per CPU.
        opened: opens the source's bucket, if it lies in one.

    Returns:
        The index as it lies in the bucket.

    Raises:
        BadRequestError: a parameter that means nothing, or the dataset is there already.
        MissingInputError: there is no source.
        BadDataError: it is unsafe, damaged or empty, or more than `max_bad` of its images cannot be used.
        StoppedError: `stop` said so.
        DiskFullError: there is no space for shards on their way to the bucket.
    """
    recipe = Recipe(
        size, crop, resize_filter, 3 if channels is None else channels, size // 2 if min_side is None else min_side
    )
    key = dataset_key(name, size)
    dataset = bucket.sub(key)
    if dataset.exists(INDEX):
        there = load_index(bucket, key)
        raise BadRequestError(
            f"{dataset.uri} is there already: {there.images} images of {there.source}, crop {there.crop}. "
            f"Choose another name, or delete it first: ddpm data delete {name} --size {size} "
            f"--bucket {shlex.quote(bucket.uri)}"
        )
    images = open_source(source, opened, bucket.uri)
    if images.note:
        _log.warning(images.note)
    if channels is None:
        recipe = replace(recipe, channels=images.channels)

    def checked(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            stop.check(f"while packing {images.where}")
            yield name

    surveyed = survey(checked(images.names()), images.where, classes)
    if surveyed.note:
        _log.warning(surveyed.note)

    parameters = {**asdict(recipe), "shard_bytes": shard_bytes, "codecs": codec_versions()}
    parameters |= {"classes": surveyed.classes, "class_depth": surveyed.depth}
    journal = Journal(dataset, parameters)
    reusable = journal.packed(surveyed.images)
    while True:
        attempt = _Pass(images, surveyed, recipe, journal, reusable, shard_bytes, max_bad)
        try:
            attempt.run(threads or os.cpu_count() or 1, stop, progress)
            break
        except _SourceChangedError:
            same = len(attempt.packed)
            _log.warning(f"{images.where} has changed: shard {same} and those behind it are packed anew")
            reusable = reusable[:same]

    index = DatasetIndex(
        name=name,
        size=size,
        channels=recipe.channels,
        classes=surveyed.classes,
        crop=crop,
        resize_filter=resize_filter,
        licence=licence,
        source=images.name,
        source_sha256=attempt.source_sha256.hexdigest(),
        rejected_images=len(attempt.rejects),
        rejects_sha256=hashlib.sha256(rejects_lines(attempt.rejects)).hexdigest() if attempt.rejects else "",
        shards=tuple(entry.shard for entry in attempt.packed),
    )
    journal.commit(index, attempt.packed, attempt.rejects)
    return DatasetIndex.from_json(index.to_json(), dataset.uri_of(INDEX))


class _SourceChangedError(Exception):
    """The source no longer has what went into a shard that was to be reused."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One image of the source: its hash, and its PNG or why it has none; neither in a shard that is reused."""

    name: str
    sha256: bytes
    png: bytes = b""
    reason: str = ""


class _Pass:
    """One reading of the source, from its beginning to its end."""

    def __init__(
        self,
        source: Source,
        surveyed: Survey,
        recipe: Recipe,
        journal: Journal,
        reusable: list[PackedShard],
        shard_bytes: int,
        max_bad: int,
    ) -> None:
        self._source, self._survey, self._recipe = source, surveyed, recipe
        self._journal, self._reusable = journal, reusable
        self._shard_bytes, self._max_bad = shard_bytes, max_bad
        self._writer: ShardWriter | None = None
        self._read_images = 0
        self.packed: list[PackedShard] = []
        self.rejects: list[Reject] = []
        self.source_sha256 = hashlib.sha256()

    def run(self, threads: int, stop: Stop, progress: Callable[[int, int | None], None] | None) -> None:
        """Fills `packed`, `rejects` and `source_sha256`; all shards are in the bucket when it returns.

        Raises:
            _SourceChangedError: `packed` holds the reusable shards that are still right.
        """
        with (
            scratch_folder("pack") as folder,
            ThreadPoolExecutor(threads) as workers,
            _Uploads(self._journal) as uploads,
        ):
            entries = enumerate(self._source.entries())
            for image in in_order(workers, self._prepare, entries, window=_IMAGES_PER_THREAD * threads):
                stop.check(f"while packing {self._source.where}")
                self._read_images += 1
                _add(self.source_sha256, image)
                if len(self.packed) < len(self._reusable):
                    self._reuse()
                else:
                    with os_errors(folder):
                        self._take(image, folder)
                    if self._writer and self._writer.bytes >= self._shard_bytes:
                        self._close(uploads, is_last=False)
                if progress is not None:
                    progress(self._read_images, self._survey.images)
            if len(self.packed) < len(self._reusable):
                raise _SourceChangedError
            if self._writer:
                self._close(uploads, is_last=True)
            uploads.finish()
        if not self.packed:
            raise BadDataError(f"{self._source.where}: none of its images can be used: {self._first_rejects()}")

    def _prepare(self, entry: tuple[int, tuple[str, bytes]]) -> _Prepared:
        number, (name, content) = entry
        sha256 = hashlib.sha256(content).digest()
        if self._reusable and number < self._reusable[-1].read_images:
            return _Prepared(name, sha256)
        try:
            return _Prepared(name, sha256, png=prepare(content, self._recipe))
        except RejectedImageError as error:
            return _Prepared(name, sha256, reason=str(error))

    def _reuse(self) -> None:
        entry = self._reusable[len(self.packed)]
        if self._read_images == entry.read_images:
            if self.source_sha256.hexdigest() != entry.source_sha256:
                raise _SourceChangedError
            self.packed.append(entry)
            self._reject(*entry.rejects)

    def _take(self, image: _Prepared, folder: Path) -> None:
        if image.reason:
            self._reject(Reject(name=image.name, reason=image.reason))
            return
        if self._writer is None:
            self._writer = ShardWriter(folder / shard_name(len(self.packed)))
        key = f"{self._read_images - 1 - len(self.rejects):09d}"
        self._writer.add(key, image.png, self._survey.label(image.name))

    def _reject(self, *rejects: Reject) -> None:
        self.rejects += rejects
        if len(self.rejects) > self._max_bad:
            raise BadDataError(
                f"{self._source.where}: more than --max-bad={self._max_bad} images cannot be used: "
                f"{self._first_rejects()}: see to them, or allow more"
            )

    def _first_rejects(self) -> str:
        more = len(self.rejects) - _NAMED_REJECTS
        return "; ".join(map(str, self.rejects[:_NAMED_REJECTS])) + (f"; and {more} more" if more > 0 else "")

    def _close(self, uploads: _Uploads, is_last: bool) -> None:
        assert self._writer is not None
        with os_errors(self._writer.path):
            shard, offsets = self._writer.finish()
        entry = PackedShard(
            parameters_sha256=self._journal.parameters_sha256,
            shard=shard,
            read_images=self._read_images,
            source_sha256=self.source_sha256.hexdigest(),
            rejects=tuple(self.rejects[sum(len(before.rejects) for before in self.packed) :]),
            is_last=is_last,
        )
        self.packed.append(entry)
        uploads.add(entry, self._writer.path, offsets)
        self._writer = None


class _Uploads(ThreadPoolExecutor):
    """Uploads shards one after the other while the next are packed, and holds packing up when it cannot follow."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(max_workers=1)
        self._journal = journal
        self._pending: deque[Future[None]] = deque()

    def add(self, entry: PackedShard, tar: Path, offsets: bytes) -> None:
        while self._pending and (len(self._pending) == _SHARDS_IN_UPLOAD or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self.submit(self._journal.add, entry, tar, offsets))

    def finish(self) -> None:
        while self._pending:
            self._pending.popleft().result()


def _add(source_sha256: hashlib._Hash, image: _Prepared) -> None:
    """The length keeps names and contents apart, whatever they are."""
    name = image.name.encode()
    source_sha256.update(b"%d:%b%b" % (len(name), name, image.sha256))

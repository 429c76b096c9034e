"""Indexing: tars that are there already become a dataset without being copied.

The dataset's folder gets an index and the offset tables; the tars stay where they are, whoever owns them. Each is read
once, to hash it and to find its images, every one of which is decoded: those that cannot be used are left out for good,
as in packing. What training sees is what packing the same images would have given: crop and filter apply at each
reading.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import google_crc32c
import numpy as np

from job.data.images import Recipe, RejectedImageError, codec_versions, prepared_pixels
from job.data.journal import Journal, PackedShard, Reject, rejects_lines
from job.data.members import SUFFIXES, in_order
from job.data.places import split_uri
from job.data.shards import INDEX, OFFSETS_DTYPE, DatasetIndex, Shard, dataset_key, load_index, shard_name
from job.data.tar_samples import Sample, SampledTar
from job.data.tar_uris import TarUri, find_tars
from job.exits import BadDataError, BadRequestError
from job.stop import NEVER, Stop
from job.store import Store, is_remote, open_store

_log = logging.getLogger(__name__)
_NAMED_REJECTS = 3
_IMAGES_PER_THREAD = 16


def index_tars(
    bucket: Store,
    words: Sequence[str],
    name: str,
    *,
    size: int,
    crop: str = "center",
    resize_filter: str = "lanczos",
    channels: int = 3,
    classes: bool | None = None,
    licence: str = "",
    max_bad: int = 100,
    min_side: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    stop: Stop = NEVER,
    threads: int | None = None,
    opened: Callable[[str], Store] = open_store,
) -> DatasetIndex:
    """Makes the tars that `words` name the dataset `bucket/datasets/NAME-SIZE`, or goes on where it was interrupted.

    Args:
        bucket: where index and tables go.
        words: URIs, patterns or folders, see `find_tars`.
        name: of the dataset.
        size: height and width of the images in pixels, as they will be read.
        crop: see `Recipe`.
        resize_filter: see `Recipe`.
        channels: 3 or 1.
        classes: True if each image must have a `.cls`, False to ignore them; None: whether the first image has one.
        licence: a note to keep with the dataset.
        max_bad: how many images may be rejected.
        min_side: reject images with a shorter side under this many pixels; None is half of `size`.
        progress: called with the bytes read so far and in all, and the images found.
        stop: asked at each image.
        threads: that decode; None is one per CPU.
        opened: opens the store of a tar's folder.

    Returns:
        The index as it lies in the bucket.

    Raises:
        BadRequestError: a parameter that means nothing, or the dataset is there already.
        MissingInputError: there are no such tars.
        BadDataError: one is unsafe or damaged, there are no images, more than `max_bad` of them cannot be used, or
            a class has a number that is larger than there are images.
        StoppedError: `stop` said so.
    """
    recipe = Recipe(size, crop, resize_filter, channels, size // 2 if min_side is None else min_side)
    key = dataset_key(name, size)
    dataset = bucket.sub(key)
    if dataset.exists(INDEX):
        there = load_index(bucket, key)
        raise BadRequestError(
            f"{dataset.uri} is there already: {there.images} images of {there.source}, crop {there.crop}. "
            f"Choose another name, or delete it first: ddpm data delete {name} --size {size} --bucket {bucket.uri}"
        )
    tars = find_tars(words, opened)
    if is_remote(bucket.uri) and (here := next((tar.uri for tar in tars if not is_remote(tar.uri)), "")):
        _log.warning(f"{here} is a file of this machine: jobs on others will find the dataset in {bucket.uri}, not it")
    has_classes = _first_has_a_class(tars) if classes is None else classes
    parameters = {**asdict(recipe), "codecs": codec_versions(), "has_classes": has_classes}
    parameters |= {"tars": [[tar.uri, tar.bytes] for tar in tars]}
    journal = Journal(dataset, parameters)
    threads = threads or os.cpu_count() or 1
    report = progress or (lambda done, total, images: None)
    indexing = _Indexing(tars, recipe, journal, has_classes, max_bad, _IMAGES_PER_THREAD * threads, report)
    with ThreadPoolExecutor(threads) as workers:
        indexing.run(workers, stop)

    index = DatasetIndex(
        name=name,
        size=size,
        channels=channels,
        classes=tuple(map(str, range(indexing.highest_label + 1))),
        crop=crop,
        resize_filter=resize_filter,
        licence=licence,
        source=_described(tars),
        source_sha256=indexing.source_sha256(),
        rejected_images=len(indexing.rejects),
        rejects_sha256=hashlib.sha256(rejects_lines(indexing.rejects)).hexdigest() if indexing.rejects else "",
        codecs=codec_versions(),
        shards=tuple(entry.shard for entry in indexing.indexed),
    )
    journal.commit(index, indexing.indexed, indexing.rejects)
    return load_index(bucket, key)


@dataclass(frozen=True, slots=True)
class _Checked:
    """One image: its record of the offset table, or why it has none."""

    name: str
    record: tuple[int, int, int, int]
    reason: str = ""


class _Indexing:
    """One pass over the tars that the journal does not vouch for yet."""

    def __init__(
        self,
        tars: Sequence[TarUri],
        recipe: Recipe,
        journal: Journal,
        has_classes: bool,
        max_bad: int,
        window: int,
        progress: Callable[[int, int, int], None],
    ) -> None:
        self._window = window
        self._tars, self._recipe, self._journal = tars, recipe, journal
        self._has_classes, self._max_bad, self._progress = has_classes, max_bad, progress
        self._total_bytes = sum(tar.bytes for tar in tars)
        self.indexed: list[PackedShard] = []
        self.rejects: list[Reject] = []
        self.highest_label = -1

    def run(self, workers: ThreadPoolExecutor, stop: Stop) -> None:
        """Fills `indexed` and `rejects`; all tables are in the bucket when it returns."""
        # Nothing is known of how many images there are: no journal entry is the last.
        for entry in self._journal.packed(source_images=-1):
            self._add(entry, self._vouched_table(entry.shard))
            self._reject(*entry.rejects)
        places = {tar.uri: number for number, tar in enumerate(self._tars)}
        done_tars = places[self.indexed[-1].shard.uri] + 1 if self.indexed else 0
        done_bytes = sum(tar.bytes for tar in self._tars[:done_tars])
        for tar in self._tars[done_tars:]:
            self._index(tar, workers, stop, done_bytes)
            done_bytes += tar.bytes
        where = _described(self._tars)
        if not self.indexed and not self.rejects:
            raise BadDataError(f"{where}: there are no images in it: no name ends in {', '.join(sorted(SUFFIXES))}")
        if not self.indexed:
            raise BadDataError(f"{where}: none of their images can be used: {self._first_rejects()}")
        images = sum(entry.shard.images for entry in self.indexed)
        # One mistyped number would give the network a hundred thousand classes.
        if self.highest_label >= images:
            raise BadDataError(
                f"{where}: a .cls says class {self.highest_label:,}, of {images:,} images: classes are numbered from "
                "0 without large gaps; mend it, or index with --no-classes"
            )

    def source_sha256(self) -> str:
        """Over the tars in their order."""
        return hashlib.sha256("".join(entry.shard.sha256 for entry in self.indexed).encode()).hexdigest()

    def _index(self, tar: TarUri, workers: ThreadPoolExecutor, stop: Stop, done_bytes: int) -> None:
        source = SampledTar(tar)
        records: list[tuple[int, int, int, int]] = []
        for checked in in_order(workers, self._check, source.samples(), window=self._window):
            stop.check(f"while indexing {_described(self._tars)}")
            if checked.reason:
                self._reject(Reject(name=f"{split_uri(tar.uri)[1]}/{checked.name}", reason=checked.reason))
            else:
                records.append(checked.record)
            images = sum(entry.shard.images for entry in self.indexed) + len(records)
            self._progress(done_bytes + source.bytes, self._total_bytes, images)
        # A tar without one good image is no shard; what was rejected in it is told with the next one.
        if not records:
            return
        table = np.array(records, OFFSETS_DTYPE)
        shard = Shard(
            name=shard_name(len(self.indexed)),
            bytes=source.bytes,
            sha256=source.sha256,
            crc32c=source.crc32c,
            images=len(records),
            offsets_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
            uri=tar.uri,
        )
        entry = PackedShard(
            parameters_sha256=self._journal.parameters_sha256,
            shard=shard,
            read_images=sum(entry.shard.images for entry in self.indexed) + len(records) + len(self.rejects),
            source_sha256=shard.sha256,
            rejects=tuple(self.rejects[sum(len(before.rejects) for before in self.indexed) :]),
            is_last=False,
        )
        self._journal.add(entry, None, table.tobytes())
        self._add(entry, table)

    def _check(self, sample: Sample) -> _Checked:
        label = sample.label if self._has_classes else -1
        record = (sample.offset, len(sample.content), label, google_crc32c.value(sample.content))
        if self._has_classes and label < 0:
            return _Checked(sample.name, record, "has no class: a .cls with a number beside it")
        try:
            prepared_pixels(sample.content, self._recipe)
        except RejectedImageError as error:
            return _Checked(sample.name, record, str(error))
        return _Checked(sample.name, record)

    def _add(self, entry: PackedShard, table: np.ndarray) -> None:
        self.indexed.append(entry)
        self.highest_label = max(self.highest_label, int(table["label"].max()))

    def _vouched_table(self, shard: Shard) -> np.ndarray:
        table = self._journal.dataset.read(shard.offsets_name).data
        if hashlib.sha256(table).hexdigest() != shard.offsets_sha256:
            where = self._journal.dataset.uri_of(shard.offsets_name)
            raise BadDataError(f"{where} is rotten: delete it, and type this command again")
        return np.frombuffer(table, OFFSETS_DTYPE)

    def _reject(self, *rejects: Reject) -> None:
        self.rejects += rejects
        if len(self.rejects) > self._max_bad:
            raise BadDataError(
                f"{_described(self._tars)}: more than --max-bad={self._max_bad} images cannot be used: "
                f"{self._first_rejects()}: see to them, or allow more"
            )

    def _first_rejects(self) -> str:
        more = len(self.rejects) - _NAMED_REJECTS
        return "; ".join(map(str, self.rejects[:_NAMED_REJECTS])) + (f"; and {more} more" if more > 0 else "")


def _first_has_a_class(tars: Sequence[TarUri]) -> bool:
    for tar in tars:
        for sample in SampledTar(tar).samples():
            return sample.label >= 0
    return False


def _described(tars: Sequence[TarUri]) -> str:
    if len(tars) == 1:
        return tars[0].uri
    return f"{tars[0].uri} and {len(tars) - 1} more"

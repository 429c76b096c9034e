"""Packing: images in, a dataset in the bucket out, whoever is killed on the way.

A folder or an archive is copied into shards. Tars that are to stay in place are read once, to hash them and to find
their images; then the index names them, and what training sees is what copying the same images would have given: crop
and filter apply at each reading. Either way every image is decoded, and those that cannot be used are left out.

The same command goes on where an attempt was interrupted. It reads a source from its beginning, for only that tells
whether it is still the same, but decodes and uploads nothing that is in the bucket already. What comes out depends on
the source and the parameters alone: not on threads, interruptions, or how often it was tried. So all objects are
created once, never written over, and one that is there and is the same counts as written: attempts at the same dataset
do each other's work, and whoever finds something else in its place gives way.

What vouches for a shard until the index does is an entry in the folder `packing`, written after it.
"""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import google_crc32c

from job.config import PackConfig, pack_config
from job.data import shards
from job.data.ahead import in_order
from job.data.foreign_tars import find_tars
from job.data.images import Recipe, RejectedImageError, codec_versions, encode_png, prepare
from job.data.sources import BAD_CLASS, SPLITS, Sample, open_source
from job.data.survey import no_images, survey
from job.exits import BadDataError, BadRequestError
from job.sealed import Sealed
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError, Store
from job.store.files import os_errors, scratch_folder

Reject = dict[str, str]
"""A line of `rejects.jsonl`: the `name` of an image that was left out, and the `reason`."""

MOST_HELD_OUT = 0.5
_NAMED_REJECTS = 3
_IMAGES_PER_THREAD = 16


@dataclass(frozen=True)
class PackRequest:
    """What is to become a dataset, and how; empty options follow the preset of the dataset's name, if there is one.

    Attributes:
        source: a local path or a URI, see `open_source`.
        name: of the dataset.
        size: height and width of the images in pixels.
        crop: see `Recipe`.
        resize_filter: see `Recipe`.
        channels: 3 or 1; None takes what the source has: 1 for MNIST's files, else 3.
        classes: True if there must be classes, False for none; None: if each image lies in one of several folders, or,
            of tars, if the first image has a `.cls`.
        licence: a note to keep with the dataset.
        max_bad: how many images may be rejected.
        min_side: reject images with a shorter side under this many pixels; None is half of `size`.
        split: pack only what lies in this folder of those that divide the source, such as `train`.
        hold_out: the share of the images that become a dataset of their own, which no run learns from, such as `5%`.
        held: whether this is the part that is held out.
        tars: instead of `source`: tars that stay where they are, as URIs, patterns or folders, see `find_tars`.
    """

    source: str
    name: str
    size: int | None = None
    crop: str = ""
    resize_filter: str = ""
    channels: int | None = None
    classes: bool | None = None
    licence: str = ""
    max_bad: int = 100
    min_side: int | None = None
    split: str = ""
    hold_out: str = ""
    held: bool = False
    tars: tuple[str, ...] = ()

    def check(self) -> PackRequest:
        """Returns the request with size, crop, filter and licence filled in.

        Raises:
            BadRequestError: a value that means nothing, or no size and no preset to take it from.
        """
        shards.validated_dataset_name(self.name)
        if self.split not in ("", *SPLITS):
            raise BadRequestError(f"--split {self.split!r}: it is one of {', '.join(sorted(SPLITS))}")
        if self.share > MOST_HELD_OUT:
            raise BadRequestError(f"--hold-out {self.hold_out}: at most {MOST_HELD_OUT:.0%}, such as 5%")
        preset = pack_config(self.name) or (PackConfig(size=self.size) if self.size else None)
        if preset is None:
            raise BadRequestError(f"--size is needed: {self.name!r} has no preset to take it from (try --size 64)")
        follow = ("size", "crop", "resize_filter", "licence")
        checked = replace(self, **{option: getattr(self, option) or getattr(preset, option) for option in follow})
        checked.recipe(channels=3)
        return checked

    @property
    def share(self) -> float:
        """Of what is held out; 0 for nothing.

        Raises:
            BadRequestError: `hold_out` is none.
        """
        match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*", self.hold_out)
        if self.hold_out and not match:
            raise BadRequestError(f"--hold-out {self.hold_out!r}: use a share such as 5% or 0.5%")
        return float(match[1]) / 100 if match else 0.0

    @property
    def held_out(self) -> str:
        """Name of the dataset of what is held out; empty if nothing is."""
        return f"{self.name}-held-out" if self.share and not self.held else ""

    def parts(self) -> list[PackRequest]:
        """What is packed one after the other, of a request that is checked: what is held out comes first."""
        return [*([replace(self, name=self.held_out, held=True).check()] if self.held_out else []), self]

    def recipe(self, channels: int) -> Recipe:
        """What is done to each image of a source with so many channels; of a request that is checked."""
        assert self.size is not None
        min_side = self.size // 2 if self.min_side is None else self.min_side
        return Recipe(self.size, self.crop, self.resize_filter, self.channels or channels, min_side)


def pack(
    bucket: Store,
    request: PackRequest,
    *,
    stop: Stop = NEVER,
    progress: Callable[[int, int, int], None] = lambda done, total, images: None,
    shard_bytes: int = shards.SHARD_BYTES,
) -> shards.DatasetIndex:
    """Makes `bucket/datasets/NAME-SIZE`, or goes on where an earlier attempt was interrupted.

    Args:
        bucket: where the dataset goes; a source in another bucket is opened with the same patience.
        request: what is packed.
        stop: asked at each image.
        progress: called with how much was read and is to be read (images, or bytes of `tars`), and the images so far.
        shard_bytes: a shard is closed when it has reached this size.

    Returns:
        The index as it lies in the bucket.

    Raises:
        BadRequestError: a parameter that means nothing, or something else lies there already.
        MissingInputError: there is no source.
        BadDataError: it is unsafe, damaged or empty, or more than `max_bad` of its images cannot be used, or classes
            have numbers that are larger than there are images.
        StoppedError: `stop` said so.
        DiskFullError: there is no space for shards on their way to the bucket.
        NoPermissionError: the credentials do not allow to write, or to read.
    """
    request = request.check()
    assert request.size is not None
    key = shards.dataset_key(request.name, request.size)
    check_free(bucket, request)
    with scratch_folder("pack") as folder, ThreadPoolExecutor(1, "upload") as uploader:
        way = _InPlace if request.tars else _Copying
        packing = way(bucket, key, request, folder, stop, progress, shard_bytes)
        packing.dataset.check_writable(f"{shards.PACKING}/{uuid.uuid4().hex}")
        try:
            # Each shard is uploaded while the next is packed, which waits when that cannot follow: none is begun behind
            # one that found another's in its place, so of two attempts at different things one goes on.
            upload: Future[object] = uploader.submit(bool)
            for entry in packing.made():
                upload.result()
                upload = uploader.submit(packing.add, entry)
            upload.result()
            packing.commit()
        except ObjectExistsError:
            raise packing.is_otherwise() from None
    return shards.load_index(bucket, key)


def check_free(bucket: Store, request: PackRequest) -> None:
    """Returns if there is no such dataset yet.

    Raises:
        BadRequestError: there is.
    """
    assert request.size is not None
    key = shards.dataset_key(request.name, request.size)
    if bucket.exists(f"{key}/{shards.INDEX}"):
        there = shards.load_index(bucket, key)
        raise BadRequestError(
            f"{bucket.uri}/{key} is there already: {there.images:,} images of {there.source}, crop {there.crop}. "
            f"Choose another name, or delete it first: {shards.deleting(bucket, key)}"
        )


def is_whole(bucket: Store, held: PackRequest) -> bool:
    """Whether what is held out is there, from an attempt that was interrupted before all of the rest was.

    Raises:
        BadRequestError: another share was held out.
    """
    assert held.size is not None
    key = shards.dataset_key(held.name, held.size)
    if not bucket.exists(f"{key}/{shards.INDEX}"):
        return False
    if (there := shards.load_index(bucket, key)).hold_out != held.share:
        raise BadRequestError(
            f"{bucket.uri}/{key} holds {there.hold_out:.3%} out, and not {held.share:.3%}: images of one would be "
            f"learnt by the other. Choose another name, or delete it first: {shards.deleting(bucket, key)}"
        )
    return True


class PackedShard(Sealed):
    """The entry of a shard: it is in the bucket whole, and this is what went into it."""

    parameters_sha256: str
    shard: shards.Shard
    rejects: tuple[Reject, ...]
    """Those met since the shard before."""
    read: int
    """Images (of a source that is copied, with rejected ones) or tars that were read up to the end of this shard."""
    source_sha256: str = ""
    """Of a source that is copied: over the names and contents of these."""
    highest_label: int = -1
    """Of tars that stay in place: the largest number of a class in this one."""


@dataclass(slots=True)
class _Checked:
    """A sample that was decoded: why it is left out, or what is copied of it; and the hash of what is copied from."""

    sample: Sample
    reason: str = ""
    png: bytes = b""
    sha256: bytes = b""


@dataclass
class _Packing(abc.ABC):
    """One reading of what is packed, from its beginning to its end; the two ways to do it are below."""

    bucket: Store
    key: str
    request: PackRequest
    folder: Path
    """Where finished shards lie on their way to the bucket."""
    stop: Stop
    progress: Callable[[int, int, int], None]
    shard_bytes: int
    packed: list[PackedShard] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    where: str = ""
    """What is packed, for messages."""
    source: str = ""
    source_sha256: str = ""
    classes: tuple[str, ...] = ()
    has_classes: bool = False
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = self.request.recipe(channels=3)
        self.dataset = self.bucket.sub(self.key)
        parameters = {**self._survey(), **asdict(self.recipe), "codecs": codec_versions()}
        self.parameters_sha256 = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()

    @abc.abstractmethod
    def _survey(self) -> dict[str, Any]:
        """Looks at what is packed, without decoding it, and returns what else decides about the shards."""

    @abc.abstractmethod
    def made(self) -> Iterator[PackedShard]:
        """Makes the shards that are not vouched for; once they are exhausted, `commit` knows all."""

    @property
    def images(self) -> int:
        """In finished shards."""
        return sum(entry.shard.images for entry in self.packed)

    def add(self, entry: PackedShard) -> None:
        """Uploads a finished shard and vouches for it.

        Raises:
            ObjectExistsError: something else lies in its place.
        """
        for path in (self.folder / entry.shard.name, self.folder / entry.shard.offsets_name):
            # A tar that is to stay where it is has no copy here.
            if path.exists():
                self.dataset.upload(path, path.name)
                path.unlink()
        self.dataset.create(_entry_key(entry.shard.name), entry.to_json())

    def commit(self) -> None:
        """Creates the index, which makes the dataset exist, and clears the entries away.

        Raises:
            BadDataError: there are no images, or none that can be used.
            ObjectExistsError: something else lies in its place.
        """
        if not self.packed:
            none_usable = BadDataError(f"{self.where}: none of its images can be used: {self._first_rejects()}")
            raise none_usable if self.rejects else no_images(self.where)
        # Somebody may have deleted it all, and packed something else since.
        first = self.packed[0]
        try:
            is_ours = self.dataset.read(_entry_key(first.shard.name)).data == first.to_json()
        except ObjectMissingError:
            # An equal attempt that was faster has cleared the entries away.
            is_ours = self.dataset.exists(shards.INDEX)
        if not is_ours:
            raise self.is_otherwise()
        rejects = "".join(f"{json.dumps(reject)}\n" for reject in self.rejects).encode()
        index = shards.DatasetIndex(
            name=self.request.name,
            size=self.recipe.size,
            channels=self.recipe.channels,
            classes=self.classes,
            crop=self.recipe.crop,
            resize_filter=self.recipe.resize_filter,
            licence=self.request.licence,
            source=self.source,
            source_sha256=self.source_sha256,
            held_out=self.request.held_out,
            hold_out=self.request.share,
            codecs=codec_versions(),
            rejected_images=len(self.rejects),
            skipped=self.skipped,
            rejects_sha256=hashlib.sha256(rejects).hexdigest() if rejects else "",
            shards=tuple(entry.shard for entry in self.packed),
        )
        if rejects:
            self.dataset.create(shards.REJECTS, rejects)
        self.dataset.create(shards.INDEX, index.to_json())
        for entry in self.dataset.list(shards.PACKING):
            self.dataset.delete(entry.key)

    def _reused(self) -> Iterator[PackedShard]:
        """The shards that are there, from the first one on; each counts as packed when the next one is asked for."""
        for number in count():
            try:
                entry = PackedShard.load(self.dataset, _entry_key(shards.shard_name(number)))
            except (ObjectMissingError, BadDataError):
                return
            if entry.parameters_sha256 != self.parameters_sha256:
                raise self.is_otherwise()
            yield entry
            self.packed.append(entry)
            self._reject(*entry.rejects)

    def is_otherwise(self) -> BadRequestError:
        """The error that something else lies here."""
        return BadRequestError(
            f"{self.dataset.uri} holds what was begun from other images than {self.where} has now, or with other "
            "parameters, or is packed by another process, or was deleted meanwhile: choose another name, or "
            f"{shards.deleting(self.bucket, self.key)} and type this command again"
        )

    def _check(self, sample: Sample) -> _Checked:
        checked, copies = _Checked(sample), not self.request.tars
        if copies:
            checked.sha256 = hashlib.sha256(sample.content).digest()
        try:
            if self.has_classes and sample.label < 0:
                what = "a .cls that is no number from 0 to 99999" if sample.label == BAD_CLASS else "no .cls beside it"
                raise RejectedImageError(f"has {what}; --no-classes leaves classes out")
            pixels = prepare(sample.content, self.recipe)
            checked.png = encode_png(pixels) if copies else b""
        except RejectedImageError as error:
            checked.reason = str(error)
        return checked

    def _check_stop(self) -> None:
        then = "the same command goes on behind the last shard that is full, or begins again before the first"
        self.stop.check(f"while packing {self.dataset.uri}", then)

    def _checked(self, samples: Iterable[Sample]) -> Iterator[_Checked]:
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as workers:
            for checked in in_order(workers, self._check, samples, _IMAGES_PER_THREAD * threads, self._check_stop):
                if checked.reason:
                    self._reject({"name": checked.sample.name, "reason": checked.reason})
                yield checked

    def _reject(self, *rejects: Reject) -> None:
        self.rejects += rejects
        if len(self.rejects) > self.request.max_bad:
            raise BadDataError(
                f"{self.where}: more than --max-bad={self.request.max_bad} images cannot be used: "
                f"{self._first_rejects()}: see to them, or allow more"
            )

    def _first_rejects(self) -> str:
        more = len(self.rejects) - _NAMED_REJECTS
        named = "; ".join(f"{reject['name']!r} {reject['reason']}" for reject in self.rejects[:_NAMED_REJECTS])
        return f"{named}; and {more} more" if more > 0 else named

    def _finished(self, shard: shards.Shard, offsets: bytes, **read: Any) -> PackedShard:
        with os_errors(self.folder):
            (self.folder / shard.offsets_name).write_bytes(offsets)
        told = sum(len(before.rejects) for before in self.packed)
        rejects = tuple(self.rejects[told:])
        entry = PackedShard(parameters_sha256=self.parameters_sha256, shard=shard, rejects=rejects, **read)
        self.packed.append(entry)
        return entry


class _Copying(_Packing):
    """Images are decoded, prepared and written into shards as PNG."""

    def _survey(self) -> dict[str, Any]:
        self._source = open_source(self.request.source, self.bucket.uri, self.bucket.retry.elsewhere())
        if split := self.request.split:
            self._source = replace(self._source, split=split, where=f"{self._source.where}, split {split}")
        self.where, self.source = self._source.where, self._source.name
        self._found = survey(self._polled(self._source.names()), self.where, self.request.classes)
        if share := self.request.share:
            # Classes are those of all images, whichever part has none of some.
            self._source = replace(self._source, hold_out=share, held=self.request.held)
            images = sum(1 for _ in self._polled(self._source.names()))
            if not images:
                part = "all images" if not self.request.held else "no image"
                raise BadRequestError(f"--hold-out {share:.1%} of {self._found.images:,} images holds {part} out")
            self._found = replace(self._found, images=images)
        for remark in filter(None, (self._source.note, self._found.note)):
            logging.getLogger(__name__).warning(remark)
        self.skipped = dict(sorted(self._source.skipped.items()))
        self.recipe, self.classes = self.request.recipe(self._source.channels), self._found.classes
        self._read_images, self._sha256 = 0, hashlib.sha256()
        parts = (self.request.share, self.request.held)
        return {
            "shard_bytes": self.shard_bytes,
            "classes": self.classes,
            "class_depth": self._found.depth,
            "part": parts,
        }

    def made(self) -> Iterator[PackedShard]:
        entries = self._source.entries()
        for entry in self._reused():
            for name, content in islice(entries, entry.read - self._read_images):
                self._check_stop()
                self._read(name, hashlib.sha256(content).digest())
            # A shard that is not full was the last.
            is_last = entry.shard.bytes < self.shard_bytes
            if self._sha256.hexdigest() != entry.source_sha256 or (is_last and self._found.images > self._read_images):
                raise self.is_otherwise()
        writer: shards.ShardWriter | None = None
        samples = (Sample(name, content, self._found.label(name)) for name, content in entries)
        for checked in self._checked(samples):
            self._read(checked.sample.name, checked.sha256)
            if not checked.reason:
                with os_errors(self.folder):
                    writer = writer or shards.ShardWriter(self.folder / shards.shard_name(len(self.packed)))
                    key = f"{self._read_images - 1 - len(self.rejects):09d}"
                    writer.add(key, checked.png, checked.sample.label)
            if writer is not None and writer.digests.size_bytes >= self.shard_bytes:
                yield self._closed(writer)
                writer = None
        if writer is not None:
            yield self._closed(writer)
        self.source_sha256 = self._sha256.hexdigest()

    def _polled(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            self._check_stop()
            yield name

    def _read(self, name: str, content_sha256: bytes) -> None:
        """The length keeps names and contents apart, whatever they are."""
        self._sha256.update(b"%d:%b%b" % (len(name.encode()), name.encode(), content_sha256))
        self._read_images += 1
        self.progress(self._read_images, self._found.images, self._read_images - len(self.rejects))

    def _closed(self, writer: shards.ShardWriter) -> PackedShard:
        with os_errors(writer.path):
            finished = writer.finish()
        return self._finished(*finished, read=self._read_images, source_sha256=self._sha256.hexdigest())


class _InPlace(_Packing):
    """Tars are described where they lie, each as a shard."""

    def _survey(self) -> dict[str, Any]:
        self._tars = find_tars(self.request.tars, self.bucket.retry.elsewhere())
        first, others = self._tars[0].uri, len(self._tars) - 1
        self.where = self.source = f"{first} and {others} more" if others else first
        first_has_one = (sample.label != -1 for tar in self._tars for sample in tar.samples())
        self.has_classes = next(first_has_one, False) if self.request.classes is None else self.request.classes
        return {"has_classes": self.has_classes, "tars": [[tar.uri, tar.bytes] for tar in self._tars]}

    def made(self) -> Iterator[PackedShard]:
        done_tars = max((entry.read for entry in self._reused()), default=0)
        total_bytes, done_bytes = (sum(tar.bytes for tar in self._tars[:end]) for end in (None, done_tars))
        for number, tar in enumerate(self._tars[done_tars:], start=done_tars + 1):
            digests = shards.Digests()
            records: list[shards.Record] = []
            for checked in self._checked(tar.samples(digests)):
                if not checked.reason:
                    sample = checked.sample
                    label, checksum = sample.label if self.has_classes else -1, google_crc32c.value(sample.content)
                    records.append((sample.offset, len(sample.content), label, checksum))
                self.progress(done_bytes + digests.size_bytes, total_bytes, self.images + len(records))
            done_bytes += tar.bytes
            # A tar without one good image is no shard; what was rejected in it is told with the next one.
            if records:
                finished = digests.shard(shards.shard_name(len(self.packed)), records, tar.uri)
                yield self._finished(*finished, read=number, highest_label=max(label for _, _, label, _ in records))
        highest_label = max((entry.highest_label for entry in self.packed), default=-1)
        # One mistyped number would give the network a hundred thousand classes.
        if highest_label >= self.images and self.packed:
            raise BadDataError(
                f"{self.where}: a .cls says class {highest_label:,}, of {self.images:,} images: classes are numbered "
                "from 0 without large gaps; mend it, or index with --no-classes"
            )
        self.classes = tuple(map(str, range(highest_label + 1)))
        self.source_sha256 = hashlib.sha256("".join(entry.shard.sha256 for entry in self.packed).encode()).hexdigest()


def _entry_key(shard: str) -> str:
    return f"{shards.PACKING}/{shard.removesuffix('.tar')}.json"

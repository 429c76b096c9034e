"""Packing: images in, a dataset in the bucket out, however often it is interrupted.

A folder or an archive is copied into shards. Tars that stay in place are read once, to hash them and to find their
images; then the index names them, and training sees what a copy of the same images would have given: crop and filter
apply at each reading. Either way every image is decoded, and images that cannot be used are left out.

Each shard is a piece of work (`job.coordination.pieces`): so many images of the source, or one tar. The shards depend
on the source and the parameters alone, not on threads, interruptions or machines. The index, created once all pieces
are there, makes the dataset exist.
"""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any, cast

from job.coordination.pieces import RECORDS, Advance, Made, PieceRecord
from job.data import shards
from job.data.checks import preview_png
from job.data.codecs import codec_versions, encode, kind_of
from job.data.images import Recipe, RejectedImageError, UndecidedImageError, prepare, upright_size
from job.data.making import Packing, check_absent, existing_index, make_dataset
from job.data.pack_request import FIRST_IMAGES, PackRequest
from job.data.source import chosen_source, numbered, with_conditions
from job.data.source.archives import Sample, find_tars
from job.data.source.labels import split_labels
from job.data.source.members import Member, Source, split_in
from job.data.source.survey import (
    Vectors,
    condition_pairs,
    lacking_labels,
    no_images,
    path_stem,
    survey,
    vectors_in,
)
from job.exits import BadDataError, BadRequestError, StoppedError
from job.progress import some_of
from job.stop import NEVER, Stop, in_order
from job.store import Store
from job.store.files import os_errors, scratch_folder

_NAMED_REJECTS = 3
_IMAGES_PER_THREAD = 16
_PIXELS = "size", "channels", "bits", "crop", "resize_filter", "pixel_range"
"""Fields of a recipe, an index and a request that decide the pixels of packed images."""


def pack(
    bucket: Store, request: PackRequest, *, stop: Stop = NEVER, shard_images: int | None = None
) -> shards.DatasetIndex | None:
    """Makes `bucket/datasets/NAME-SIZE`, or resumes it.

    Args:
        bucket: where the dataset goes; a source in another bucket is opened with the same patience.
        request: what is packed.
        stop: asked at each image.
        shard_images: images of a shard; None: as many as have `shards.SHARD_PIXEL_BYTES` of pixels.

    Returns:
        The index as it lies in the bucket, or None while other machines are still making pieces.

    Raises:
        BadRequestError: a parameter that means nothing, or something else lies there already.
        MissingInputError: there is no source.
        BadDataError: it is unsafe, damaged or empty, or more than `max_bad` of its images cannot be used, or classes
            have numbers that are larger than there are images, or an image needs `channels` or `pixel_range`.
        StoppedError: `stop` said so.
        DiskFullError: there is no space for shards on their way to the bucket.
        NoPermissionError: the credentials do not allow to write, or to read.
    """
    request = request.check()
    check_absent(bucket, request.key, unless=request.slice or request.replaces)
    with scratch_folder("pack") as folder:
        kind = _InPlace if request.tars else _Copying
        packing = kind(bucket, request, folder, stop=stop, shard_images=shard_images)
        for remark in packing.remarks:
            logging.getLogger(__name__).warning(remark)
        part_key, share_held_out = request.parts()[0].key, request.hold_out_share
        there = existing_index(bucket, part_key) if request.held_out else None
        if there and not (there.hold_out == share_held_out and packing.is_of(there)):
            raise BadRequestError(
                f"{bucket.uri}/{part_key} holds {there.hold_out:.3%} out, and not {share_held_out:.3%} of what "
                f"{packing.where} has now with these parameters: images of one would be learnt by the other. Choose "
                f"another name, or delete it first: {shards.deleting(bucket, part_key)}"
            )
        if request.replaces and bucket.exists(f"{request.key}/{shards.INDEX}"):
            shards.delete(bucket.sub(request.key))
        return make_dataset(bucket, packing, request.slice, stop)


def is_source_of(bucket: Store, request: PackRequest, index: shards.DatasetIndex, stop: Stop = NEVER) -> bool:
    """Returns whether a request would make such a dataset, by names, sizes and labels; reads no images."""
    request = replace(request, **{option: getattr(request, option) or getattr(index, option) for option in _PIXELS})
    return _Copying(bucket, request.check(), Path(), stop=stop, shard_images=None).is_of(index)


class _Packing(Packing):
    """Images, and how they become shards.

    Attributes:
        of_index: the fields of the index that the source decides.
        recipe: how the images are converted.
        condition_recipe: how their conditions are converted, if there are any.
        remarks: what a person has to know before the dataset is made.
    """

    condition_recipe: Recipe | None = None

    def __init__(
        self, bucket: Store, request: PackRequest, folder: Path, *, stop: Stop, shard_images: int | None
    ) -> None:
        """Looks at the source without decoding it; finished shards lie in `folder` on their way to the bucket."""
        self._bucket, self._request, self._folder, self._stop = bucket, request, folder, stop
        self._shard_images, self._rejects = shard_images or 0, list[dict[str, str]]()
        self.key, self.title = request.key, f"packing {request.name}"
        self.held_out_key = request.parts()[0].key if request.held_out else ""
        self.of_index: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.recipe = request.recipe()
        with stop.at_once(f"while looking at what becomes {request.name}"):
            found = self._survey()
        parameters = {**found, **asdict(self.recipe), "codecs": codec_versions(), "size": self.recipe.size.stated}
        self.fingerprint = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()

    @abc.abstractmethod
    def _survey(self) -> dict[str, Any]:
        """Finds the pieces, and returns what else decides the shards."""

    def is_of(self, index: shards.DatasetIndex) -> bool:
        """Returns whether a dataset has the images, labels and pixels of this source, or of a part of it."""
        found = {"condition_filter": ""} | {name: getattr(self.recipe, name) for name in _PIXELS} | self.of_index
        decisive = (*_PIXELS, "listing_sha256", "classes", "condition_filter")
        return all(found[name] == getattr(index, name) for name in decisive)

    def _check_rejects(self) -> None:
        """Raises `BadDataError` if more than `max_bad` images are left out."""
        if len(self._rejects) > self._request.max_bad:
            are_small = any("--min-side" in reject["reason"] for reject in self._rejects)
            remedy = "pass a smaller --size or --min-side" if are_small else "see to them"
            raise BadDataError(
                f"{self.where}: more than --max-bad={self._request.max_bad} images cannot be used: "
                f"{self._first_rejects()}: {remedy}, or allow more with --max-bad"
            )

    def publish(self, dataset: Store, records: Sequence[PieceRecord]) -> None:
        """Creates the index; see `Packing`.

        Raises:
            BadDataError: there are no images, or none that can be used.
            ObjectExistsError: something else lies in its place.
        """
        facts = [record.facts for record in records]
        self._rejects = [reject for each in facts for reject in each["rejects"]]
        self._check_rejects()
        made = [shards.Shard.model_validate(each["shard"]) for each in facts if each["shard"]]
        if not made:
            for entry in dataset.list(RECORDS):
                dataset.delete(entry.key)
            unusable = BadDataError(f"{self.where}: none of its images can be used: {self._first_rejects()}")
            raise unusable if self._rejects else no_images(self.where)
        unused = self._decide_classes(facts)
        made = [shard for shard in made if shard.offsets_name not in unused]
        rejects = "".join(f"{json.dumps(reject)}\n" for reject in self._rejects).encode()
        index = shards.DatasetIndex(
            **{name: getattr(self.recipe, name) for name in _PIXELS},
            **self.of_index,
            name=self._request.name,
            licence=self._request.licence,
            held_out=self._request.held_out,
            hold_out=self._request.hold_out_share,
            codecs=codec_versions(),
            fingerprint=self.fingerprint,
            rejected_images=len(self._rejects),
            converted=dict(sorted(sum((Counter(each["converted"]) for each in facts), Counter[str]()).items())),
            rejects_sha256=hashlib.sha256(rejects).hexdigest() if rejects else "",
            shards=shards.Shards.of(made),
        )
        if rejects:
            dataset.create(shards.REJECTS, rejects)
        try:
            preview = preview_png(self._bucket, index, self._folder, self._stop)
            dataset.put(shards.PREVIEW, preview)
        except StoppedError:
            raise
        except Exception as error:
            # No picture is worth the shards.
            said = f"is missing: {error or type(error).__name__}; `ddpm data show {index.name}` makes it"
            logging.getLogger(__name__).warning(f"{dataset.uri_of(shards.PREVIEW)} {said}")
        dataset.create(shards.INDEX, index.to_json())
        for name in unused:
            dataset.delete(name)

    def _decide_classes(self, facts: list[dict[str, Any]]) -> set[str]:
        """Returns the offset tables of tars that are left out, since others have labels; none of a copied source."""
        return set()

    def _check(self, sample: Sample) -> tuple[Sample, list[bytes], Counter[str], str]:
        """Returns a sample, the files that are copied of it, how its pixels changed, and why it is left out, if so."""
        converted = Counter[str]()
        try:
            pixels = prepare(sample.content, self.recipe, converted)
            if converted["colour"] and not self._request.channels:
                raise UndecidedImageError(
                    f"is in colour, and the first {FIRST_IMAGES} are grey: add --channels 3, or 1"
                )
            if converted["8-bit"] and not self._request.bits:
                raise UndecidedImageError(f"has 8 bits, and the first {FIRST_IMAGES} have more: add --bits 16, or 8")
            if self.recipe.bits == 16 and not self.recipe.levels:
                raise UndecidedImageError(
                    f"is one of the first {FIRST_IMAGES}, which do not name one range: add --range LOW,HIGH, as 0,255"
                )
            if self._request.tars:
                return sample, [], converted, ""
            if self.condition_recipe is None:
                return sample, [encode(pixels)], converted, ""
            if sample.condition is None:
                raise RejectedImageError("has no condition")
            of = upright_size(sample.content)
            condition = prepare(sample.condition, self.condition_recipe, of=of)
            return sample, [encode(pixels), encode(condition)], converted, ""
        except UndecidedImageError as error:
            raise BadDataError(f"{self.where}: {sample.name!r} {error}") from None
        except RejectedImageError as error:
            return sample, [], Counter(), str(error)

    def _check_stop(self) -> None:
        self._stop.check(f"while packing {self._request.name}", "the same command goes on behind the last whole shard")

    def _checked(self, samples: Iterable[Sample], facts: dict[str, Any]) -> Iterator[tuple[Sample, list[bytes] | None]]:
        """Decodes samples in threads, in order, and yields what is copied of them; None of those that are left out.

        Adds these to `facts`, and what was converted.
        """
        facts |= {"rejects": [], "converted": Counter[str]()}
        window = _IMAGES_PER_THREAD * (threads := os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as workers:
            checks = in_order(workers, self._check, samples, window, self._check_stop)
            for sample, files, converted, reason in checks:
                facts["converted"].update(converted)
                if reason:
                    facts["rejects"].append({"name": sample.name, "reason": reason})
                    self._rejects += facts["rejects"][-1:]
                    self._check_rejects()
                yield sample, None if reason else files

    def _first_rejects(self) -> str:
        more = len(self._rejects) - _NAMED_REJECTS
        named = "; ".join(f"{reject['name']!r} {reject['reason']}" for reject in self._rejects[:_NAMED_REJECTS])
        return f"{named}; and {more} more" if more > 0 else named


class _Copying(_Packing):
    """Images are decoded, prepared and written into shards; a piece is so many images of the source."""

    _vectors = Vectors()
    _conditions: Source | None = None
    _paired: Set[str] = frozenset()

    def _survey(self) -> dict[str, Any]:
        request = self._request
        source = chosen_source(request, self._bucket, self._check_stop)
        self.where = source.where
        if request.condition:
            source, self._conditions = with_conditions(request, source, self._bucket)
            # A stream is read in order.
            source = replace(source, readers=min(source.readers, self._conditions.readers))
        self._source = source
        self._found = survey(source, request.classes, request.unlabelled == "drop", self._check_stop)
        table = source.table
        if (request.labels or table) and request.classes is not False and self._found.classes_from != "labels":
            others = f"; there are {some_of(source.choices)}" if source.choices else ""
            which = f"{request.labels[1:]!r}: a table is FILE:COLUMN{others}"
            which = f"in {table}: correct its paths, or use --no-classes" if table else which
            raise BadRequestError(f"{self.where}: none of its images has a label {which}")
        # Classes are those of all images, even where one part lacks some.
        share = request.hold_out_share
        if request.vector:
            columns = numbered(request, source, self._bucket)
            self._vectors = vectors_in(columns, self._found, self._check_stop)
        listing_sha256, of_conditions = self._vectors.sha256 or self._found.sha256, dict[str, Any]()
        if not (images := sum(1 for _ in self._chosen()) if share else self._found.images):
            part = "no image" if request.is_held_out else "all images"
            raise BadRequestError(f"--hold-out {share:.1%} of {self._found.images:,} images holds {part} out")
        self.remarks = [*filter(None, (source.note, *self._found.notes))]
        skipped = dict(sorted(source.skipped.items()))
        self.recipe = request.recipe(content for _, content in source.loaded(islice(source.images(), FIRST_IMAGES)))
        if found := self._conditions:
            pairs = condition_pairs(source, found, self._check_stop)
            first = (content for _, content in found.loaded(islice(found.images(), FIRST_IMAGES)))
            self._paired, self.condition_recipe = pairs.stems, request.condition_recipe(self.recipe, first)
            listing_sha256 = hashlib.sha256(f"{listing_sha256} {pairs.sha256}".encode()).hexdigest()
            of_conditions["condition_channels"] = self.condition_recipe.channels
            of_conditions["condition_filter"] = self.condition_recipe.resize_filter
            of_conditions["condition_range"] = self.condition_recipe.pixel_range
            of_conditions["condition_from"] = request.condition if request.condition[0] == ":" else found.name
            lonely = f", {pairs.lonely:,} images without a condition: named in the rejects" * bool(pairs.lonely)
            self.remarks.append(f"{self.where}: {len(pairs.stems):,} pairs{lonely}")
        self.of_index = {
            **of_conditions,
            "source": source.name,
            "listing_sha256": listing_sha256,
            "classes": self._found.classes,
            "classes_from": self._found.classes_from,
            "splits": self._found.splits,
            "unlabelled_images": self._found.unlabelled_images,
            "skipped": skipped,
            "vector_names": self._vectors.names,
            "vector_mean": self._vectors.mean,
            "vector_std": self._vectors.std,
        }
        self._members, self._next = self._chosen(), 0
        channels = self.recipe.channels + of_conditions.get("condition_channels", 0)
        shape_bytes = math.prod(self.recipe.size.shape) * channels * self.recipe.bits // 8
        self._shard_images = self._shard_images or max(1, shards.SHARD_PIXEL_BYTES // shape_bytes)
        self.sizes = [min(self._shard_images, images - first) for first in range(0, images, self._shard_images)]
        return {
            "shard_images": self._shard_images,
            "classes": self._found.classes,
            "classes_from": self._found.classes_from,
            "part": (share, request.is_held_out),
            "condition": asdict(self.condition_recipe) | {"size": ""} if self.condition_recipe else {},
            "images": listing_sha256,
        }

    def _chosen(self) -> Iterator[tuple[Member, int, int]]:
        """Yields the images of this part of the source with their classes, -1 without, and numbers in the source."""
        conditions = self._conditions.images() if self._conditions else iter(())
        for number, member in enumerate(self._source.images()):
            label, condition = self._found.label(number), None
            if (stem := path_stem(member.name)) in self._paired:
                condition = next(other for other in conditions if path_stem(other.name) == stem)
            if label is not None and self._request.takes(member.name):
                # Read together, while both can be read.
                yield replace(member, read=partial(_both, member, condition)), label, number

    def made(self, number: int, advance: Advance) -> Made:
        """Writes a shard; see `_Packing`."""
        first = number * self._shard_images
        numbers = range(first, first + int(self.sizes[number]))
        facts: dict[str, Any] = {"shard": None}
        read = 0
        writer: shards.ShardWriter | None = None
        kind, of_conditions = kind_of(self.recipe.channels), self.condition_recipe
        for image, (sample, files) in zip(numbers, self._checked(self._samples(numbers), facts), strict=False):
            if files is not None:
                with os_errors(self._folder):
                    writer = writer or shards.ShardWriter(self._folder / shards.shard_name(number))
                    condition = (kind_of(of_conditions.channels), files[1]) if of_conditions else None
                    writer.add(f"{image:09d}", files[0], sample.label, kind, sample.numbers, condition)
            read += 1
            advance(1)
        if read < len(numbers):
            raise BadDataError(f"{self.where} has changed while it was packed: type this command again")
        if writer is None:
            return Made({}, facts)
        with os_errors(self._folder):
            shard, offsets = writer.finish()
        return Made({shard.name: writer.path, shard.offsets_name: offsets}, facts | {"shard": shard.model_dump()})

    def _samples(self, numbers: range) -> Iterator[Sample]:
        if numbers.start < self._next:
            # The piece of another machine that gave it up: these are not in order.
            self._members, self._next = self._chosen(), 0
        chosen = islice(self._members, numbers.start - self._next, numbers.stop - self._next)
        self._next = numbers.stop
        members, labelled = tee(chosen)
        loaded = self._source.loaded(member for member, *_ in members)
        for (name, both), (_, label, number) in zip(loaded, labelled, strict=False):
            content, condition = cast("tuple[bytes, bytes | None]", both)
            yield Sample(name, content, label, numbers=self._vectors.of(number), condition=condition)


def _both(image: Member, condition: Member | None) -> Any:
    return image.read(), condition.read() if condition else None


class _InPlace(_Packing):
    """Tars are described where they lie; a piece is a tar."""

    unit = "MB"

    def _survey(self) -> dict[str, Any]:
        self._tars = find_tars(self._request.tars, self._bucket.retry.elsewhere())
        self.sizes = [tar.bytes / 1e6 for tar in self._tars]
        first, others = self._tars[0].uri, len(self._tars) - 1
        self.where = f"{first} and {others} more" if others else first
        self.of_index = {"source": self.where}
        splits = {split_in(tar.key.split("/")) for tar in self._tars} - {""}
        if len(splits) > 1:
            self.of_index["splits"] = tuple(sorted(splits))
            said = f"tars of {some_of(sorted(splits))} are indexed together; name those of one to index it"
            self.remarks = [f"{self.where}: {said}"]
        file, key = split_labels(self._request.labels)
        self._label_key = None if self._request.classes is False else key
        if file:
            raise BadRequestError(f"--labels {file}: tars in place have their labels beside the images: use :KEY")
        samples = (sample for tar in self._tars for sample in tar.samples(label_key=None))
        self.recipe = self._request.recipe(sample.content for sample in islice(samples, FIRST_IMAGES))
        tars = [[tar.uri, tar.bytes] for tar in self._tars]
        return {"label_key": self._label_key, "tars": tars}

    def made(self, number: int, advance: Advance) -> Made:
        """Hashes a tar and lists its images; see `_Packing`."""
        tar, digests = self._tars[number], shards.Digests()
        facts: dict[str, Any] = {"shard": None, "highest_label": -1}
        records, unlabelled, read_bytes = list[shards.Record](), list[str](), 0
        for sample, files in self._checked(tar.samples(digests, self._label_key), facts):
            if files is not None:
                if sample.label < 0:
                    unlabelled.append(sample.name)
                records.append((sample.offset, len(sample.content), sample.label, shards.image_hash(sample.content)))
            advance((digests.size_bytes - read_bytes) / 1e6)
            read_bytes = digests.size_bytes
        if 0 < len(unlabelled) < len(records):
            if self._request.unlabelled != "drop":
                raise lacking_labels(tar.uri, len(unlabelled), len(records), unlabelled)
            records = [record for record in records if record[2] >= 0]
        facts["unlabelled"] = [len(unlabelled), *unlabelled[:2]]
        if not records:
            return Made({}, facts)
        shard, offsets = digests.shard(shards.shard_name(number), records, tar.uri)
        facts |= {"shard": shard.model_dump(), "highest_label": max(record[2] for record in records)}
        return Made({shard.offsets_name: offsets}, facts)

    def _decide_classes(self, facts: list[dict[str, Any]]) -> set[str]:
        """Finds the classes, and checks what only all tars together tell; see `_Packing`."""
        highest_label = max(each["highest_label"] for each in facts)
        if highest_label < 0 and (self._request.classes or self._label_key):
            raise BadRequestError(f"{self.where}: none of its images has a label {self._label_key or 'beside it'}")
        images = sum(each["shard"]["images"] for each in facts if each["shard"])
        # One mistyped number would give the network a hundred thousand classes.
        if highest_label >= images:
            raise BadDataError(
                f"{self.where}: a label says class {highest_label:,}, of {images:,} images: classes are numbered "
                "from 0 without large gaps; mend it, or index with --no-classes"
            )
        if highest_label < 0:
            return set()
        unlabelled_images = sum(each["unlabelled"][0] for each in facts)
        self.of_index |= {"classes": tuple(map(str, range(highest_label + 1))), "classes_from": "labels"}
        self.of_index["unlabelled_images"] = unlabelled_images
        unused = [each for each in facts if each["shard"] and each["highest_label"] < 0]
        if unused and self._request.unlabelled != "drop":
            _, *examples = unused[0]["unlabelled"]
            raise lacking_labels(self.where, unlabelled_images, images, examples)
        return {shards.Shard.model_validate(each["shard"]).offsets_name for each in unused}

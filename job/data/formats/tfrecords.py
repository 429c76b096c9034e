"""TFRecord files of `tf.train.Example`: ImageNet's, those of TensorFlow Datasets, and the raw images of StyleGAN.

A record has its length, the masked CRC-32C of that, a protocol buffer, and the masked CRC-32C of that
(https://www.tensorflow.org/tutorials/load_data/tfrecord). An example is a map from names to features, and a feature is
a list of bytes, floats or integers. One of them is the image, encoded or as uint8 pixels, and another one the label.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from job.data import members
from job.data.archives import EXPANDS
from job.data.formats.image_bytes import START_BYTES, netpbm, netpbm_suffix, suffix_of
from job.data.labels import LABEL_KEYS, chosen_label, class_names, label_among, text_of
from job.data.members import Files, Member, RefusedError, Source, first_split, read_exactly, refused, unpacked
from job.exits import BadDataError, BadRequestError
from job.progress import some_of

_FILE = re.compile(r".*(?:\.tfrec(?:ords?)?(?:-\d+-of-\d+)?|-\d{5}-of-\d{5})(?:\.gz)?", re.IGNORECASE)
_RESOLUTION = re.compile(r"(.*-r)(\d\d)\.tfrecords")
"""StyleGAN's files of the same images at 4, 8, … pixels: r10 has 1,024."""

_IMAGES = ("image/encoded", "image", "image_raw", "img", "data")
_LABELS = (*LABEL_KEYS, "image/class/label")
_IS_LABEL = re.compile(r"(?:.*[/_])?(?:labels?|class|cls|target)(?:[/_].*)?", re.IGNORECASE)
_SHAPES = (("shape",), ("height", "width", "depth"), ("height", "width", "channels"))

_MASK = 0xA282EAD8
_MOST_FIELDS = 10_000
_MOST_VALUES = 100
_VARINT_BYTES = 10
_NAME_BYTES, _LABEL_BYTES = 400, 1 << 16
_CONVERT = "write its images into a folder, and pack that"
_DAMAGED = f"holds a record that is damaged, or not a tf.train.Example: {_CONVERT}"

_BYTES, _FLOATS, _INTEGERS = 1, 2, 3


class _Span(NamedTuple):
    """Where a part of a record lies in a stream."""

    start: int
    stop: int


class _Feature(NamedTuple):
    """The kind of a feature, which is its field's number, and its list of values."""

    kind: int
    values: _Span


@dataclass(frozen=True)
class _Layout:
    """The features that are read.

    Attributes:
        image: the name of the image's.
        shape: the names of those with the shape of raw images; empty for encoded images.
        suffix: of the images.
        label: the name of the label's; empty for none, None if a person wants none.
        others: the names of others that could be one.
    """

    image: str
    shape: tuple[str, ...]
    suffix: str
    label: str | None = ""
    others: tuple[str, ...] = ()


def tfrecord_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of one file or of all in a folder."""
    found = files.matching(_FILE)
    if not found:
        return None
    names, said = _highest(found)
    notes, layout = [said] if said else [], None
    for name in names:
        with members.refusing(f"{files.where}/{name}"), closing(files.open(name)) as raw:
            # A shard may be empty.
            if first := next(_records(raw), None):
                layout = _layout(f"{files.where}/{name}", *first, column)
                break
    if layout is None:
        raise BadDataError(f"{files.where}/{names[0]} holds no records: get it again")
    if layout.label and layout.others and column == "":
        notes.append(f"taking {layout.label} as the label; --labels :NAME takes another of {some_of(layout.others)}")
    if column is not None and any(name.endswith("-rxx.labels") for name in files.names):
        notes.append("its labels in the .labels are not read; --labels FILE names a table of labels")
    split, others = first_split(names)
    classes = _class_names(files, layout.label)
    listed = partial(_members, files, names, layout, classes)
    return Source(
        files.place,
        listed,
        classes=classes,
        note="; ".join(notes),
        split=split,
        other_splits=others,
        unchosen=tuple(f":{name}" for name in layout.others),
    )


def _highest(names: Sequence[str]) -> tuple[list[str], str]:
    """Returns the names without StyleGAN's files of lower resolutions, and a note if there are any."""
    levels: dict[str, list[str]] = {}
    for name in names:
        match = _RESOLUTION.fullmatch(name)
        levels.setdefault(match[1] if match else name, []).append(name)
    highest = [max(each) for each in levels.values()]
    others = "which have the same images at lower resolutions"
    return highest, f"packing {some_of(highest)} and not the others, {others}" if len(highest) < len(names) else ""


def _class_names(files: Files, label: str | None) -> tuple[str, ...]:
    """Returns the names that TensorFlow Datasets writes beside its files."""
    file = next((name for name in files.names if label and name.rpartition("/")[2] == f"{label}.labels.txt"), "")
    if not file:
        return ()
    with members.refusing(f"{files.where}/{file}"):
        # Its reader skips blank lines, too.
        return class_names([line for line in text_of(files.read(file)).split("\n") if line.strip()])


def _records(raw: BinaryIO) -> Iterator[tuple[BinaryIO, _Span]]:
    """Yields the stream and place of each record: of a local file its own stream, unread, else the checked record."""
    file, limit_bytes = unpacked(raw)
    # To go back in another stream means to read it from the beginning, or a range of it twice.
    is_local, position = isinstance(file, io.BufferedReader), 0
    while header := file.read(12):
        length, checksum = struct.unpack("<QI", header)
        if _masked_crc32c(header[:8]) != checksum:
            raise RefusedError("is damaged, or not a TFRecord file (a checksum differs): get it again")
        members.check_size(length)
        start, position = position + 12, position + 12 + length + 4
        if position > limit_bytes:
            raise RefusedError(EXPANDS)
        if is_local:
            yield file, _Span(start, start + length)
            file.seek(position)
        else:
            yield io.BytesIO(_content(file, length)), _Span(0, length)


def _content(file: BinaryIO, length: int) -> bytes:
    content = read_exactly(file, length)
    if read_exactly(file, 4) != struct.pack("<I", _masked_crc32c(content)):
        raise RefusedError("is damaged (a checksum differs): get it again")
    return content


def _masked_crc32c(content: bytes) -> int:
    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + _MASK) % 2**32


def _layout(where: str, stream: BinaryIO, record: _Span, column: str | None) -> _Layout:
    """Returns the layout of all records, as the first one has it."""
    features = _features(stream, record)
    layout = _image_layout(where, stream, features)
    if column is None:
        return replace(layout, label=None)
    rest = [name for name in features if name not in (layout.image, *layout.shape)]
    labels = [name for name in rest if _IS_LABEL.fullmatch(name)]
    if not labels and not column:
        return replace(layout, others=tuple(rest))
    # The first record may lack what a person chose.
    label = column or chosen_label(where, labels, "", _LABELS)
    others = labels if label in labels else rest
    return replace(layout, label=label, others=tuple(name for name in others if name != label))


def _image_layout(where: str, stream: BinaryIO, features: Mapping[str, _Feature]) -> _Layout:
    """Returns the layout without a label."""
    starts = dict[str, bytes]()
    for name, feature in features.items():
        if feature.kind == _BYTES and len(found := _spans(stream, feature)) == 1:
            stream.seek(found[0].start)
            starts[name] = stream.read(min(START_BYTES, found[0].stop - found[0].start))
    encoded = [name for name in starts if suffix_of(starts[name])]
    image = next((name for name in _IMAGES if name in encoded), encoded[0] if len(encoded) == 1 else "")
    if image:
        return _Layout(image, (), suffix_of(starts[image]))
    if encoded:
        raise BadRequestError(f"{where} has several images in a record: {some_of(encoded)}: {_CONVERT}")
    image = next((name for name in _IMAGES if name in starts), "")
    shape = next((names for names in _SHAPES if image and features.keys() >= {*names}), ())
    if not shape:
        said = f"but {some_of([*features])}" if features else "and is not a tf.train.Example"
        raise RefusedError(f"has no image such as a JPEG in image/encoded in its first record, {said}: {_CONVERT}")
    raw = _Layout(image, shape, "")
    return replace(raw, suffix=netpbm_suffix(_pixels(stream, features, raw).shape[2]))


def _members(files: Files, names: Sequence[str], layout: _Layout, classes: Sequence[str]) -> Iterator[Member]:
    """Yields the image of each record."""
    for name in names:
        with closing(files.open(name)) as raw:
            for number, (stream, record) in enumerate(_records(raw)):
                path = f"{name}/{number:08d}{layout.suffix}"
                features = _features(stream, record)
                if layout.image not in features:
                    raise refused(path, f"has no {layout.image}, but {some_of([*features])}: {_CONVERT}")
                later = layout.label == "" and next(filter(_IS_LABEL.fullmatch, features), None)
                if later:
                    raise refused(path, f"has {later}, which the first record lacks: use --labels :{later}")
                try:
                    label = label_among(classes, _value(stream, features.get(layout.label or "")))
                except RefusedError as error:
                    raise refused(path, str(error)) from None
                read = partial(_file, layout, stream, record)
                yield Member(path, read, size_bytes=record.stop - record.start, label=label)


def _file(layout: _Layout, stream: BinaryIO, record: _Span) -> bytes:
    """Returns the image of a record as a file."""
    if not isinstance(stream, io.BytesIO):
        stream.seek(record.start)
        stream, record = io.BytesIO(_content(stream, record.stop - record.start)), _Span(0, record.stop - record.start)
    features = _features(stream, record)
    return netpbm(_pixels(stream, features, layout)) if layout.shape else _image(stream, features[layout.image])


def _image(stream: BinaryIO, feature: _Feature) -> bytes:
    values = _spans(stream, feature)
    if feature.kind != _BYTES or len(values) != 1:
        raise RefusedError(f"does not have one image: {_CONVERT}")
    stream.seek(values[0].start)
    return read_exactly(stream, values[0].stop - values[0].start)


def _pixels(stream: BinaryIO, features: Mapping[str, _Feature], layout: _Layout) -> np.ndarray:
    """Returns a raw image as uint8 [height, width, channels]; StyleGAN has the channels first."""
    content = _image(stream, features[layout.image])
    lengths = (features[name] for name in layout.shape if name in features and features[name].kind == _INTEGERS)
    shape = [length for feature in lengths for length in _numbers(stream, feature)]
    if len(shape) == 2:
        shape.append(1)
    is_planar = layout.shape == ("shape",) and shape[0] in (1, 3)
    channels = shape[0 if is_planar else -1] if shape else 0
    if len(shape) != 3 or channels not in (1, 3) or min(shape) < 1 or math.prod(shape) != len(content):
        raise RefusedError(f"has {len(content):,} bytes of pixels, whose shape is {shape[:4]}: {_CONVERT}")
    pixels = np.frombuffer(content, np.uint8).reshape(shape)
    return pixels.transpose(1, 2, 0) if is_planar else pixels


def _value(stream: BinaryIO, feature: _Feature | None) -> object:
    """Returns the value of a label, of several all; None without one."""
    if feature is None:
        return None
    values: Sequence[Any] = (_spans if feature.kind == _BYTES else _numbers)(stream, feature)
    if len(values) > 1 or feature.kind != _BYTES:
        return values if len(values) > 1 else next(iter(values), None)
    if not values:
        return None
    start, stop = values[0]
    stream.seek(start)
    return text_of(read_exactly(stream, min(stop - start, _LABEL_BYTES)))


def _features(stream: BinaryIO, record: _Span) -> dict[str, _Feature]:
    """Returns the features of an example by name, without reading their values."""
    found: dict[str, _Feature] = {}
    for features in _messages(stream, record, 1):
        for entry in _messages(stream, features, 1):
            name, values = "", list[_Feature]()
            for key in _messages(stream, entry, 1):
                stream.seek(key.start)
                name = read_exactly(stream, min(key.stop - key.start, _NAME_BYTES)).decode(errors="replace")
            for feature in _messages(stream, entry, 2):
                values = [_Feature(number, span) for number, wire, span in _fields(stream, feature) if wire == 2]
            if values:
                found[name] = values[-1]
    return found


def _messages(stream: BinaryIO, message: _Span, wanted: int) -> Iterator[_Span]:
    return (span for number, wire, span in _fields(stream, message) if (number, wire) == (wanted, 2))


def _spans(stream: BinaryIO, feature: _Feature) -> list[_Span]:
    """Returns where the values of a list of bytes lie."""
    return list(_messages(stream, feature.values, 1))


def _numbers(stream: BinaryIO, feature: _Feature) -> list[Any]:
    """Returns the first values of a list of integers or floats, packed or not."""
    found = list[Any]()
    for _, wire, (start, stop) in _fields(stream, feature.values):
        stream.seek(start)
        content, at = stream.read(min(stop - start, _VARINT_BYTES * _MOST_VALUES)), 0
        if feature.kind == _FLOATS and wire in (2, 5):
            found += struct.unpack(f"<{len(content) // 4}f", content[: len(content) // 4 * 4])
        while feature.kind == _INTEGERS and wire in (0, 2) and at < len(content) and len(found) < _MOST_VALUES:
            value, at = _varint(content, at)
            found.append(value - 2**64 if value >= 2**63 else value)
    return found


def _fields(stream: BinaryIO, message: _Span) -> Iterator[tuple[int, int, _Span]]:
    """Yields the number, the wire type and the place of each field of a message."""
    position, count = message.start, 0
    while position < message.stop:
        stream.seek(position)
        # The key of a field and the length of its content.
        head = stream.read(2 * _VARINT_BYTES)
        key, at = _varint(head, 0)
        number, wire, size = key >> 3, key & 7, -1
        if wire == 2:
            size, at = _varint(head, at)
        elif wire == 0:
            size = _varint(head, at)[1] - at
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        start = position + at
        position, count = start + size, count + 1
        if size < 0 or position > message.stop or count > _MOST_FIELDS:
            raise RefusedError(_DAMAGED)
        yield number, wire, _Span(start, position)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns a number of seven bits a byte, the lowest first, of which the last byte has no eighth; and its end."""
    value = 0
    for shift, byte in enumerate(content[at : at + _VARINT_BYTES]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value % 2**64, at + shift + 1
    raise RefusedError(_DAMAGED)

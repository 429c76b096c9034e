"""TFRecord files of `tf.train.Example`: ImageNet's, those of TensorFlow Datasets, and the raw images of StyleGAN.

A record has its length, the masked CRC-32C of that, a protocol buffer, and the masked CRC-32C of that
(https://www.tensorflow.org/tutorials/load_data/tfrecord). An example is a map from names to features, and a feature is
a list of bytes, floats or integers. One of them is the image, encoded or as uint8 pixels, and another one the label.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from job.data.source import members
from job.data.source.formats import is_image_file, netpbm
from job.data.source.labels import LABEL_KEYS, chosen_label, class_names, label_among, text_of
from job.data.source.members import EXPANDS, Files, Member, RefusedError, Source, read_exactly, refused, unpacked
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
RECORD_BYTES = 64 * 1024 * 1024
"""The largest record: a forged list of numbers takes fifteen times its size in memory."""
_CONVERT = "write its images into a folder, and pack that"

_SCHEMA = """
name: "example.proto" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" } } }
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""
"""That of TensorFlow's example.proto and feature.proto."""

_Features = Mapping[str, Sequence[Any]]
"""The features of an example by name, each as a list of bytes, floats or integers."""


@dataclass(frozen=True)
class _Layout:
    """The features that are read.

    Attributes:
        image: the name of the image's.
        shape: the names of those with the shape of raw images; empty for encoded images.
        label: the name of the label's; empty for none, None if a person wants none.
        others: the names of other features that could be one.
    """

    image: str
    shape: tuple[str, ...]
    label: str | None = ""
    others: tuple[str, ...] = ()


def tfrecord_source(files: Files, column: str | None) -> Source | None:
    """Returns the images of one file or of all in a folder."""
    found = files.matching(_FILE)
    if not found:
        return None
    (names, note), layout = _highest(found), None
    for name in names:
        with members.refusing(f"{files.where}/{name}"), closing(files.open(name)) as raw:
            # A shard may be empty.
            if first := next(_records(raw), None):
                layout = _layout(f"{files.where}/{name}", _features(first), column)
                break
    if layout is None:
        raise BadDataError(f"{files.where}/{names[0]} holds no records: get it again")
    classes = _class_names(files, layout.label)
    listed, unchosen = partial(_members, files, names, layout, classes), tuple(f":{name}" for name in layout.others)
    return Source(files.place, listed, classes=classes, note=note, unchosen=unchosen).split_by(names)


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


def _records(raw: BinaryIO) -> Iterator[bytes]:
    """Yields the content of each record."""
    file, limit_bytes = unpacked(raw)
    position = 0
    while header := file.read(12):
        length, checksum = struct.unpack("<QI", header)
        if _masked_crc32c(header[:8]) != checksum:
            raise RefusedError("is damaged, or not a TFRecord file (a checksum differs): get it again")
        members.check_size(length, RECORD_BYTES, "a record")
        position += 12 + length + 4
        if position > limit_bytes:
            raise RefusedError(EXPANDS)
        content = read_exactly(file, length)
        if read_exactly(file, 4) != struct.pack("<I", _masked_crc32c(content)):
            raise RefusedError("is damaged (a checksum differs): get it again")
        yield content


def _masked_crc32c(content: bytes) -> int:
    checksum = google_crc32c.value(content)
    return ((checksum >> 15 | checksum << 17) + _MASK) % 2**32


@cache
def _example() -> Any:
    """Returns the class of an example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def _features(record: bytes) -> _Features:
    """Returns the features of an example that are not empty."""
    from google.protobuf.message import DecodeError

    try:
        found = _example().FromString(record).features.feature
    except DecodeError:
        raise RefusedError(f"holds a record that is damaged, or not a tf.train.Example: {_CONVERT}") from None
    kinds = {name: feature.WhichOneof("kind") for name, feature in found.items()}
    return {name: getattr(found[name], kind).value for name, kind in kinds.items() if kind}


def _content(values: Sequence[Any]) -> bytes | None:
    """Returns the value of a list of one value, in bytes; None of any other list."""
    return values[0] if len(values) == 1 and isinstance(values[0], bytes) else None


def _layout(where: str, features: _Features, column: str | None) -> _Layout:
    """Returns the layout of all records, as the first one has it."""
    layout = _image_layout(where, features)
    if column is None:
        return replace(layout, label=None)
    rest = [name for name in features if name not in (layout.image, *layout.shape)]
    labels = [name for name in rest if _IS_LABEL.fullmatch(name)]
    # The first record may lack what a person chose.
    label = column or (chosen_label(where, labels, "", _LABELS) if labels else "")
    return replace(layout, label=label, others=tuple(name for name in rest if name != label))


def _image_layout(where: str, features: _Features) -> _Layout:
    """Returns the layout without a label."""
    single = {name: content for name, feature in features.items() if (content := _content(feature)) is not None}
    files = [name for name, content in single.items() if is_image_file(content)]
    if image := next((name for name in _IMAGES if name in files), files[0] if len(files) == 1 else ""):
        return _Layout(image, ())
    if files:
        raise BadRequestError(f"{where} has several images in a record: {some_of(files)}: {_CONVERT}")
    image = next((name for name in _IMAGES if name in single), "")
    shape = next((names for names in _SHAPES if image and features.keys() >= {*names}), ())
    if not shape:
        said = f"but {some_of([*features])}" if features else "and is not a tf.train.Example"
        raise RefusedError(f"has no image such as a JPEG in image/encoded in its first record, {said}: {_CONVERT}")
    return _Layout(image, shape)


def _members(files: Files, names: Sequence[str], layout: _Layout, classes: Sequence[str]) -> Iterator[Member]:
    """Yields the image of each record."""
    for name in names:
        with closing(files.open(name)) as raw:
            for number, record in enumerate(_records(raw)):
                # The content decides how it is decoded: the suffix says no more than that it is an image.
                path = f"{name}/{number:08d}.jpg"
                try:
                    features = _features(record)
                    label = _label(features, layout, classes)
                except RefusedError as error:
                    raise refused(path, str(error)) from None
                yield Member(path, partial(_file, features, layout), size_bytes=len(record), label=label)


def _label(features: _Features, layout: _Layout, classes: Sequence[str]) -> str:
    """Returns the class of a record; empty without one."""
    if layout.image not in features:
        raise RefusedError(f"has no {layout.image}, but {some_of([*features])}: {_CONVERT}")
    later = layout.label == "" and next(filter(_IS_LABEL.fullmatch, features), None)
    if later:
        raise RefusedError(f"has {later}, which the first record lacks: use --labels :{later}")
    values = features.get(layout.label or "", ())
    value = values if len(values) > 1 else next(iter(values), None)
    return label_among(classes, text_of(value) if isinstance(value, bytes) else value, layout.label or "")


def _file(features: _Features, layout: _Layout) -> bytes:
    """Returns the image of a record as a file; StyleGAN's raw images have the channels first."""
    if (content := _content(features[layout.image])) is None:
        raise RefusedError(f"does not have one image: {_CONVERT}")
    if not layout.shape:
        return content
    lengths = (features.get(name, ()) for name in layout.shape)
    shape = [length for listed in lengths for length in listed if isinstance(length, int)]
    if len(shape) == 2:
        shape.append(1)
    is_planar = layout.shape == ("shape",) and shape[:1] in ([1], [3])
    channels = shape[0 if is_planar else -1] if shape else 0
    if len(shape) != 3 or channels not in (1, 3) or min(shape) < 1 or math.prod(shape) != len(content):
        raise RefusedError(f"has {len(content):,} bytes of pixels, whose shape is {shape[:4]}: {_CONVERT}")
    pixels = np.frombuffer(content, np.uint8).reshape(shape)
    return netpbm(pixels.transpose(1, 2, 0) if is_planar else pixels)

"""The columns of a table that hold images and labels, by its types and by the features of Hugging Face's `datasets`.

`datasets` writes an image as a struct of its bytes and its path, and a class as a number whose names stand in the
schema, as JSON under the key `huggingface`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from job.data.labels import LABEL_KEYS, chosen_label, class_names, label_among
from job.data.members import RefusedError
from job.exits import BadRequestError
from job.progress import printable, some_of

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
"""Usual columns of images: of `datasets`, and of img2dataset, whose Parquet files name the column by the codec."""
_LABELS = (*LABEL_KEYS, "labels", "fine_label", "class_label", "target", "category")
_AS_IMAGES = "write the images by `datasets`, in a column of the feature Image"


@dataclass(frozen=True)
class Columns:
    """The chosen columns of a table.

    Attributes:
        image: the column of images.
        in_struct: whether it is a struct whose field `bytes` holds the encoded images.
        label: the column of labels; empty for none.
        classes: the names of the classes in the order of their numbers, if the schema has them.
        unchosen: without a label, the words of `--labels` for each column that could be one.
    """

    image: str
    in_struct: bool
    label: str = ""
    classes: tuple[str, ...] = ()
    unchosen: tuple[str, ...] = ()

    def of_file(self, schema: Any) -> Columns:
        """Returns the same columns of another file's `pyarrow.Schema`, which may lack the labels.

        Raises:
            RefusedError: the file has other features.
        """
        features = _features(schema)
        if _image_columns(schema, features).get(self.image) != self.in_struct:
            raise RefusedError(f"lacks the column {self.image!r} of images of other files: name the files of one set")
        if not self.label or self.label not in schema.names:
            return replace(self, label="", classes=())
        if _classes(features.get(self.label, {})) != self.classes:
            raise RefusedError(f"has other classes in the column {self.label!r} than others: name the files of one set")
        return self

    def images_in(self, values: Any) -> Any:
        """Returns the encoded images, as a `pyarrow.Array` of bytes, of values of the column of images."""
        if not self.in_struct:
            return values
        # Unlike `field`, it knows of rows whose whole struct is null.
        return values.flatten()[values.type.get_field_index("bytes")]

    def label_texts(self, values: Any) -> list[str]:
        """Returns the class of each value of a `pyarrow.Array`, empty for none; see `label_among`.

        Raises:
            RefusedError: a value stands for no class.
        """
        import pyarrow as pa

        texts = partial(map, partial(label_among, self.classes))
        if pa.types.is_dictionary(values.type):
            found = list(texts(values.dictionary.to_pylist()))
            return ["" if index is None else found[index] for index in values.indices.to_pylist()]
        return list(texts(values.to_pylist()))


def columns_of(schema: Any, where: str, column: str | None) -> Columns:
    """Chooses the columns of a `pyarrow.Schema`.

    Args:
        schema: of the table.
        where: the source, for messages.
        column: the label that a person chose; empty for the usual one, None for none.

    Raises:
        BadRequestError: there are several images or labels to choose from, or the chosen label is missing.
        RefusedError: the table lacks images.
    """
    if len(set(schema.names)) < len(schema.names):
        raise RefusedError("has several columns of one name: rename them")
    features = _features(schema)
    images = _image_columns(schema, features)
    if not images:
        raise RefusedError(_without_images(schema))
    usual = [name for name in sorted(images, key=str.lower) if name.lower() in _IMAGES] or [*images]
    if len(usual) > 1:
        raise BadRequestError(
            f"{where} has several columns of images: {some_of(images)}: write it with one of them, named image"
        )
    image = usual[0]
    found = Columns(image, images[image])
    if column is None:
        return found
    possible = [field.name for field in schema if _can_be_label(field.type)]
    label = _label_column(possible, features, where, column)
    unchosen = () if label else tuple(f":{name}" for name in possible)
    return replace(found, label=label, classes=_classes(features.get(label, {})), unchosen=unchosen)


def _features(schema: Any) -> Mapping[str, Any]:
    """Returns the features that `datasets` has written into the schema, by column; empty without them."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature if isinstance(feature, dict) else {} for name, feature in found.items()}
    # Too many brackets are a RecursionError.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _image_columns(schema: Any, features: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the columns that may hold images, and whether each is a struct; structs come before plain bytes."""
    import pyarrow as pa

    found = dict[str, bool]()
    for field in schema:
        # A sound or a video is a struct of bytes, too.
        if features.get(field.name, {}).get("_type", "Image") not in ("Image", "Value"):
            continue
        in_struct = pa.types.is_struct(field.type)
        at = field.type.get_field_index("bytes") if in_struct else 0
        kind = field.type if not in_struct else field.type.field(at).type if at >= 0 else pa.null()
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            found[field.name] = in_struct
    structs = {name: True for name, in_struct in found.items() if in_struct}
    return structs or found


def _without_images(schema: Any) -> str:
    """Returns the reason why a table without images is refused, and the next step."""
    import pyarrow as pa

    for field in schema:
        kind, depth = getattr(field.type, "storage_type", field.type), 0
        while hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):
            kind, depth = kind.value_type, depth + 1
        it = f"is a table without a column of images: {printable(field.name)!r}"
        if depth and (pa.types.is_struct(kind) or pa.types.is_binary(kind)):
            return f"{it} holds lists of images: write each image into a row of its own"
        if depth and pa.types.is_uint8(kind):
            return f"{it} holds pixels as lists of numbers: {_AS_IMAGES}"
        if is_text(kind) and not depth and ("url" in field.name.lower() or field.name.lower() in _IMAGES):
            return f"{it} holds URLs or paths: img2dataset downloads the images into tars, which can be packed"
    return f"is a table without a column of images, and has {some_of(schema.names)}: {_AS_IMAGES}"


def _label_column(possible: list[str], features: Mapping[str, Any], where: str, column: str) -> str:
    """Returns the column of labels; empty for none."""
    classes = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    found = classes or [name for name in possible if name.lower() in _LABELS]
    return chosen_label(where, possible if column else found, column, usual=()) if found or column else ""


def _can_be_label(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: Any) -> bool:
    """Returns whether a `pyarrow.DataType` is that of texts."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _classes(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a `ClassLabel`."""
    names = feature.get("names")
    return class_names(names) if feature.get("_type") == "ClassLabel" and isinstance(names, list) else ()

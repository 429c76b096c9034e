"""The datasets of a bucket for people: list, description, preview, check; how to pack one."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.image_size import ImageSize
from job.config import EMBEDDED, pack_config, preset_names
from job.data.shards import DATASETS, PREVIEW, DatasetIndex, dataset_key, find_dataset, load_index
from job.exits import BadDataError, BadRequestError, MissingInputError, did_you_mean
from job.printing import open_page, print_json, print_table
from job.progress import note
from job.store import Retry, Store, open_store
from job.store.retry import away_limit_seconds


def how_packed(bucket_uri: str, name: str, size: ImageSize | None) -> tuple[str, DatasetIndex | None]:
    """Returns which dataset for training the bucket has, for people, empty for none; and its index, if it is one.

    Raises:
        MissingInputError: the bucket does not exist.
        BadDataError: the index of the dataset is damaged.
    """
    bucket = open_store(bucket_uri)
    try:
        key = find_dataset(bucket, name, size)
        index = load_index(bucket, key)
    except BadRequestError:
        # Training has an option to choose one.
        return f"{bucket.uri}/{DATASETS}/{name} is there already, at several sizes", None
    except MissingInputError:
        # Raises if the bucket itself is missing. A local folder may be missing: the first write creates it.
        bucket.exists(DATASETS)
        return "", None
    return f"{bucket.uri}/{key} is there already: {index.images:,} images of {index.source}", index


def how_to_pack(bucket_uri: str, name: str, size: ImageSize, on: str = "") -> str:
    """Returns the commands that pack a dataset, as a message; `on` is the target whose job needs it."""
    preset, quoted = pack_config(name), shlex.quote(bucket_uri)
    if name == EMBEDDED:
        more = f" --size {size}" * (preset is None or size != preset.size)
        return f"dataset {name!r} is not in {bucket_uri} yet: type\n  ddpm data ensure {name} --bucket {quoted}{more}"
    there = f" ON={shlex.quote(on)}" if on not in ("", "local") else ""
    what = (preset.fetch if preset else "") or "a folder or archive of images"
    other = "." if preset else _other_name(bucket_uri, name) or "."
    return (
        f"dataset {name!r} is not in {bucket_uri} yet{other} Get {what}, then type\n"
        f"  make submit-train DATASET={name} SOURCE=path/to/it SIZE={size} BUCKET={quoted}{there}\n"
        f"or, to pack alone,\n"
        f"  ddpm data pack path/to/it {name} --size {size} --bucket {quoted}"
    )


def _other_name(bucket_uri: str, name: str) -> str:
    """Returns the end of a message about a dataset that is missing: the name that may be meant, if any."""
    known = {*preset_names()}
    # A local folder that does not exist cannot be listed.
    with suppress(MissingInputError):
        known |= {folder.rpartition("-")[0] for folder in open_store(bucket_uri).folders(DATASETS)}
    return did_you_mean(name, known - {name, ""})


def list_datasets(bucket_uri: str, *, as_json: bool = False) -> None:
    """Prints a table of the datasets in the bucket."""
    from rich.table import Table

    bucket = open_store(bucket_uri)
    found = {folder: _index_or_why(bucket, folder) for folder in bucket.folders(DATASETS)}
    if as_json:
        print_json([_told(bucket, index) for index in found.values() if isinstance(index, DatasetIndex)])
        return
    table = Table("dataset", "size", "images", "classes", "crop", "shards", "bytes", "licence", box=None)
    for folder, index in found.items():
        if isinstance(index, str):
            table.add_row(folder, index)
        else:
            shards, size_bytes = f"{len(index.shards):,}", f"{int(index.shards.bytes.sum()):,}"
            about = f"{index.images:,}", f"{len(index.classes) or '-'}", index.crop, shards, size_bytes
            table.add_row(index.name, str(index.size), *about, index.licence or "-")
    print_table(table, f"no datasets in {bucket.uri} yet: pack one with `ddpm data pack SOURCE NAME --size 64`")


def _index_or_why(bucket: Store, folder: str) -> DatasetIndex | str:
    try:
        return load_index(bucket, f"{DATASETS}/{folder}")
    except MissingInputError:
        return "unfinished: pack it again, or delete it"
    except BadDataError:
        return "its index.json is corrupt: restore it, or delete the dataset"


def _told(bucket: Store, index: DatasetIndex) -> dict[str, Any]:
    """Returns the facts of a dataset as JSON values."""
    size_bytes, uri = int(index.shards.bytes.sum()), bucket.uri_of(index.key)
    more = {"uri": uri, "id": index.dataset_id, "images": index.images, "bytes": size_bytes}
    return more | index.model_dump(mode="json", exclude={"sha256", "shards", "format"}) | {"shards": len(index.shards)}


def show_dataset(
    bucket_uri: str,
    name: str,
    size: ImageSize | None,
    output: Path | None,
    *,
    open_it: bool = False,
    as_json: bool = False,
) -> None:
    """Prints the facts of a dataset and makes its preview anew, in the bucket unless `output` names a file.

    Raises:
        MissingInputError: the bucket has no such dataset.
    """
    bucket = open_store(bucket_uri)
    key = find_dataset(bucket, name, size)
    index = load_index(bucket, key)
    if as_json:
        print_json(_told(bucket, index))
        return

    from job.data.checks import preview_png
    from job.data.reading.cache import ImageCache
    from job.store.files import write_file

    print(describe_dataset(index, bucket))
    labels = ImageCache(bucket, index).labels(np.arange(index.images)) if index.classes else np.empty(0)
    for number, class_name in enumerate(index.classes):
        print(f"  {class_name:<20} {int((labels == number).sum()):>9,} images")
    if encoding := index.encoding:
        print(f"to look at: `ddpm data show {encoding.source} --size {encoding.size}`")
        return
    preview = preview_png(bucket, index)
    if output is None:
        bucket.put(f"{key}/{PREVIEW}", preview)
    else:
        write_file(output, preview)
    print(f"look at  {output or bucket.uri_of(f'{key}/{PREVIEW}')}")
    if open_it:
        open_page(bucket.sub(key), PREVIEW, output)


def verify_named(bucket_uri: str, name: str, size: ImageSize | None, *, as_json: bool = False) -> None:
    """Checks all hashes and images of a dataset.

    Raises:
        BadDataError: an object is damaged; the message names each.
    """
    from job.data.checks import verify_dataset

    bucket = open_store(bucket_uri, Retry(away_limit_seconds(), note=note))
    key = find_dataset(bucket, name, size)
    problems = verify_dataset(bucket, key)
    if as_json:
        print_json({"uri": f"{bucket.uri}/{key}", "problems": problems})
    if problems:
        raise BadDataError(f"{bucket.uri}/{key} has {len(problems):,} problems: " + "; ".join(problems))
    if not as_json:
        print(f"{bucket.uri}/{key}: every shard, offset table and image is as it was packed")


def describe_dataset(index: DatasetIndex, bucket: Store) -> str:
    """Returns the facts of a dataset in a few lines."""
    shards = "1 shard" if len(index.shards) == 1 else f"{len(index.shards):,} shards"
    colours = {1: "grey", 3: "colour"}.get(index.channels, f"{index.channels} channels")
    what = f"{colours}, {index.size.words} pixels" + ", 16 bits" * (index.bits == 16)
    if encoding := index.encoding:
        what = f"as latents of {index.size.words}×{index.channels}, encoded from {encoding.source}-{encoding.size}"
    converted = ", ".join(f"{count:,} {kind}" for kind, count in index.converted.items())
    made = f"from {index.source}, crop {index.crop}, {index.resize_filter} filter"
    made += f", range {index.pixel_range}" * bool(index.pixel_range) + ", at each reading" * index.is_foreign
    facts = {
        "dataset": f"{index.name}-{index.size}  ({bucket.uri}/{dataset_key(index.name, index.size)})"
        + f": converted images: {converted}" * bool(converted),
        "images": f"{index.images:,} {what}, in {shards}",
        "id": index.dataset_id,
        "made": made,
        "classes": ", ".join(index.classes) + " (folders)" * (index.classes_from == "folders"),
        "pairs": f"each with a condition image of {index.condition_from}, channels: {index.condition_channels}"
        * bool(index.condition_channels),
        "vector": ", ".join(map("{} {:.4g} ± {:.3g}".format, index.vector_names, index.vector_mean, index.vector_std)),
        "splits": ", ".join(index.splits) + ", packed together" * bool(index.splits),
        "left out": f"{index.unlabelled_images:,} without a label" * bool(index.unlabelled_images),
        "held out": f"{index.held_out}-{index.size}, on which its runs log val_loss" * bool(index.held_out),
        "rejects": f"{index.rejected_images:,}, named in rejects.jsonl beside the shards" * bool(index.rejected_images),
        "licence": index.licence,
        "skipped": ", ".join(f"{count:,} {suffix}" for suffix, count in index.skipped.items()),
    }
    return "\n".join(f"{title:<8} {text}" for title, text in facts.items() if text)

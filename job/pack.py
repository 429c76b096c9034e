"""Packing: images in, a dataset in the bucket out, whoever is killed on the way.

Shards are uploaded as they fill. A journal says of each what of the source went into it, so that the same command goes on
behind the last one; the index, created last and once, is what makes a dataset of them. The result depends on the source
and the parameters alone, never on threads, interruptions, or how often it was tried.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from job.exits import BadDataError, BadRequestError, StoppedError
from job.images import Recipe, RejectedImageError, codec_versions, prepare
from job.members import Source, in_order
from job.shards import INDEX, SHARD_BYTES, DatasetIndex, Shard, ShardWriter, dataset_key, shard_name
from job.sources import Survey, open_source, survey
from job.store import ObjectExistsError, Store
from job.store.files import os_errors

PACKING = "packing"
REJECTS = "rejects.jsonl"
_NAMED = 3
_WINDOW_PER_THREAD = 16

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")


class Reject(BaseModel):
    """A line of `rejects.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str


class Progress(BaseModel):
    """What `packing/shard-00000.json` says: this shard is in the bucket, and this is what went into it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters_sha256: str
    shard: Shard
    entries: int
    """Images of the source that were read up to the end of this shard, rejected ones included."""
    source_sha256: str
    """Hash of their names and contents."""
    rejects: tuple[Reject, ...]
    """Those since the shard before."""
...

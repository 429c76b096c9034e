"""What a source yields, as arrays and labels that a judge can be compared with."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job.data.source import open_source
from job.data.source.members import Source
from job.exits import Exit, JobError
from tests.job.packing import entries_of


def opened(path: Path | str, split: str | None = None, **options: object) -> Source:
    """The source at a path, and one split of it."""
    source = open_source(str(path), **options)
    return source if split is None else replace(source, split=split)


def pixels_of(source: Source) -> list[np.ndarray]:
    """The images as arrays, in order."""
    return [np.asarray(Image.open(io.BytesIO(content))) for _, content in entries_of(source)]


def labels_of(source: Source) -> list[str]:
    """The labels of the images, in order."""
    return [found.label for found in source.images(labelled=True)]


def line_of(path: Path | str, exit_code: Exit = Exit.BAD_DATA, **options: object) -> str:
    """The one line that refuses a source, be it when it is opened or when it is read."""
    with pytest.raises(JobError) as caught:
        source = open_source(str(path), **options)
        list(source.images(labelled=True))
        list(entries_of(source))
    assert caught.value.exit_code == exit_code, caught.value
    (line,) = str(caught.value).splitlines()
    return line

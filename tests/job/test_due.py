"""What falls due after a step: one table, of an epoch of 48 images in batches of 24, for four epochs."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from job.training.session import due_at
from tests.job.runs.leased import DATASET_IMAGES, small_config

SCORED = {"evaluate__every_epochs": 2, "evaluate__metrics": ("fid",)}
ROWS = [
    ({}, 24, ""),
    ({}, 48, "log validation save grid"),
    ({}, 144, "log validation save"),
    ({}, 192, "log validation save"),
    ({"log__every_images": 24}, 24, "log"),
    ({"log__validate_epochs": 0}, 48, "log save grid"),
    ({"log__validate_epochs": 0}, 192, "log validation save"),
    ({"sample__every_epochs": 3}, 96, "log validation save"),
    ({"sample__every_epochs": 3}, 144, "log validation save grid"),
    ({"sample__every_epochs": 0}, 48, "log validation save"),
    ({"checkpoint__every_epochs": 3}, 48, "log validation grid"),
    ({"checkpoint__every_epochs": 3, "checkpoint__keep_epochs": (1,)}, 48, "log validation save grid"),
    ({"checkpoint__every_epochs": 3} | SCORED, 96, "log validation scores save grid"),
    ({"checkpoint__every_epochs": 3} | SCORED, 144, "log validation save"),
    ({"checkpoint__every_epochs": 3} | SCORED, 192, "log validation scores save"),
    ({"data__size": 8, "parent__run": "theirs"}, 0, "validation save"),
    ({}, 0, ""),
]


@pytest.mark.parametrize(("changes", "images_seen", "wanted"), ROWS)
@pytest.mark.parametrize("is_held_out", [True, False])
def test_what_falls_due(changes, images_seen, wanted, is_held_out):
    config = small_config(**changes)
    plan = SimpleNamespace(
        config=config,
        target_images=4 * DATASET_IMAGES,
        index=SimpleNamespace(images=DATASET_IMAGES),
        held_out=object() if is_held_out else None,
    )
    due = [name for name, is_due in asdict(due_at(images_seen, plan)).items() if is_due]  # type: ignore[arg-type]
    assert due == [name for name in wanted.split() if is_held_out or name != "validation"]

"""Whether a run is on track: beside runs of its preset, and of nothing else."""

from __future__ import annotations

import pytest

from ddpm.image_size import ImageSize
from job.config import draft, preset_names, usual_of
from job.config.presets import UsualConfig
from job.data.shards import load_index
from job.plan import follow_dataset
from job.report import usual
from job.report.usual import differing, verdict_of
from job.store import open_store


@pytest.fixture
def index(tiles, monkeypatch):
    """Of a dataset for whose preset there is a band."""
    index = load_index(open_store(str(tiles)), "datasets/tiles-16")
    band = UsualConfig(dataset_id=index.dataset_id, epochs=(1, 3), low=(0.2, 0.1), high=(0.4, 0.2))
    monkeypatch.setattr(usual, "usual_of", lambda _: band)
    return index


def run_of(index, **changes):
    return follow_dataset(draft("landscape-sample", changes), index)


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ({0.5: 0.9}, ""),
        ({1: 0.9, 1.5: 0.35, 2: 0.25}, "on track"),
        # The mean of the last epoch, as the band is made of: one row may stray.
        ({1.2: 0.25, 1.5: 0.25, 2: 0.5}, "behind"),
        ({1: 0.9, 2: 0.5}, "broken"),
        # Behind its end the band goes on as it ended.
        ({9: 0.15}, "on track"),
    ],
)
def test_verdict_is_by_the_last_epoch(index, losses, word):
    rows = [{"images_seen": int(epoch * index.images), "loss": loss} for epoch, loss in losses.items()]
    verdict = verdict_of(run_of(index), rows, index)
    assert (verdict.word, verdict.epochs, verdict.high) == (word, (1, 3), (0.4, 0.2))


def test_there_is_none_for_other_runs(index):
    rows = [{"images_seen": 2 * index.images, "loss": 0.3}]
    assert verdict_of(run_of(index, **{"train.seed": 5, "train.epochs": 7, "sample.steps": 9}), rows, index)
    assert verdict_of(run_of(index, **{"train.learning_rate": 0.5}), rows, index) is None
    assert verdict_of(run_of(index), rows, None) is None
    other = index.model_copy(update={"size": ImageSize(32, 32)})
    assert verdict_of(run_of(index), rows, other) is None


def test_shipped_bands_are_bands():
    shipped = [band for band in map(usual_of, preset_names()) if band]
    assert shipped
    for band in shipped:
        assert len(band.epochs) == len(band.low) == len(band.high)
        assert list(band.epochs) == sorted(band.epochs) and all(
            low < high for low, high in zip(band.low, band.high, strict=True)
        )
        assert band.high[-1] < band.low[0]


def test_another_network_differs_from_the_preset(index):
    config = run_of(index, **{"model.kind": "dit"})
    assert differing(config, index) == {"model.kind": ("unet", "dit")}
    assert verdict_of(config, [{"images_seen": 2 * index.images, "loss": 0.3}], index) is None

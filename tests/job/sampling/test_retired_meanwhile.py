"""A run that trains while others read its newest checkpoint, and retires that one in between."""

from __future__ import annotations

import pytest

from job.evaluation.evaluate import run_evaluation
from job.evaluation.evaluation_plan import plan_evaluation
from job.requests import EvaluateRequest, SampleRequest
from job.runs.checkpoints import choose, list_checkpoints
from job.runs.layout import CheckpointRef
from job.runs.retention import reading_chosen
from job.sampling.pictures import run_sampling
from job.sampling.sampling_plan import plan_sampling
from job.store import open_store
from tests.job.command_line import ddpm_here, refused, succeeded

CHOSEN = CheckpointRef(1, 912)


@pytest.fixture
def train_on(bucket):
    """Trains another epoch, which retires all but the newest checkpoint and that of the first epoch."""

    def train_on(epochs: int = 4) -> list[int]:
        words = ("train", "--dataset", "tiles", "--run", "walk", "--bucket", bucket, "--epochs", epochs)
        succeeded(ddpm_here(*words))
        return [ref.images_seen for ref in list_checkpoints(open_store(str(bucket)).sub("runs/walk"))]

    return train_on


@pytest.mark.slow
def test_retired_checkpoints_are_chosen_again(bucket, train_on, capsys, monkeypatch):
    monkeypatch.setenv("DDPM_LAUNCHED", "1")
    requests = ({"chosen": {"nearest": False}}, {"count": 3}, {"checkpoints": "3"})
    grid, images, gone = (plan_sampling(SampleRequest("walk", bucket=str(bucket), **options)) for options in requests)
    scores = plan_evaluation(
        EvaluateRequest("walk", bucket=str(bucket), count=12, extractor="mobilenet", references=24)
    )
    assert grid.checkpoints == images.checkpoints == [CHOSEN]
    assert train_on() == [312, 1200]
    for plan in (grid, images):
        run_sampling(plan)
        assert "epoch-0004-" in capsys.readouterr().out
    run_evaluation(scores)
    assert "walk, epoch-0004: 12 images" in capsys.readouterr().out
    with pytest.raises(Exception, match=r"no checkpoint of epoch 3: not kept or not reached \(there are: 1, 4\)"):
        run_sampling(gone)
    assert not list((bucket / "runs/walk").glob("reading/*"))


@pytest.mark.slow
def test_what_is_held_stays(bucket, train_on):
    run = open_store(str(bucket)).sub("runs/walk")
    refs = choose(run, "latest", 299, 24)
    with reading_chosen(run, lambda: refs) as (kept, _):
        assert [*kept] == [CHOSEN]
        assert train_on() == [312, 912, 1200]
        told = ddpm_here("runs", "delete", "walk", "--yes", "--bucket", bucket)
        assert "a process samples from" in refused(told, 76)
    assert train_on(5) == [312, 1512]

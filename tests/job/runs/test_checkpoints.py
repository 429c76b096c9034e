"""Finding, verifying, loading and choosing checkpoints; which of them stay."""

import time

import pytest
import torch

from job.exits import BadDataError, MissingInputError
from job.runs.checkpoints import LATEST_KEY, choose, list_checkpoints, load_manifest, newest_good, opened
from job.runs.layout import CheckpointRef
from job.runs.metrics import metric_objects, read_rows
from job.runs.records import NamedObject
from job.runs.retention import Retention, delete_checkpoint
from job.store import open_store
from tests.job.damages import DAMAGES
from tests.job.runs.held import live_tensors, small_config, write


@pytest.fixture
def run(tmp_path):
    return open_store(str(tmp_path)).sub("runs/r")


def test_a_checkpoint_comes_back_bit_for_bit_and_a_damaged_one_is_passed_over(bucket_uri):
    run = open_store(bucket_uri).sub("runs/r")
    run.put("status.json", b"{}")
    with newest_good(run, pytest.fail) as restored:
        assert restored is None
    saved = write(run, (1, 80), (1, 160))
    target = {group: {n: torch.full_like(t, 9.0) for n, t in named.items()} for group, named in saved.items()}
    strides = target["model"]["conv.weight"].stride()
    with newest_good(run, pytest.fail) as restored:
        restored.copy_into(target)
        assert (restored.manifest.images_seen, restored.manifest.loss_sums) == (160, [[1.5, 0.1], [3.0, 4.0]])
        folder = restored.files["model"][0].parent
    assert not folder.exists()
    for group, named in saved.items():
        for name, tensor in named.items():
            assert torch.equal(target[group][name], tensor)
    assert target["model"]["conv.weight"].stride() == strides
    key, warnings, aside = "checkpoints/000001-000000000160/optimizer-00.safetensors", [], set()
    run.put(key, DAMAGES["bit in the middle"](run.read(key).data))
    with newest_good(run, warnings.append, aside) as restored:
        assert restored.manifest.images_seen == 80
    assert [key in warning for warning in warnings] == [True]
    assert aside == {CheckpointRef(1, 160)}


def test_tensors_that_do_not_fit_and_a_manifest_of_another_place_are_refused(run):
    write(run, (1, 80))
    with opened(run, CheckpointRef(1, 80), ("model",)) as restored:
        with pytest.raises(BadDataError, match=r"conv\.bias"):
            restored.copy_into({"model": {"conv.weight": torch.zeros(8, 4, 3, 3), "conv.bias": torch.zeros(9)}})
        with pytest.raises(BadDataError, match=r"extra"):
            restored.copy_into({"model": {**live_tensors()["model"], "extra": torch.zeros(1)}})
    run.create(CheckpointRef(2, 80).manifest_key, run.read(CheckpointRef(1, 80).manifest_key).data)
    with pytest.raises(BadDataError, match="is not in its place"):
        load_manifest(run, CheckpointRef(2, 80))


def test_retention_keeps_the_last_the_named_epochs_and_never_drops_the_newest():
    refs = [CheckpointRef(1, images) for images in range(16, 16 * 21, 16)]
    for keep, expected in (
        ({}, [320]),
        ({"checkpoint__keep_last": 3}, [288, 304, 320]),
        ({"checkpoint__keep_epochs": (1, 3)}, [48, 128, 320]),
        ({"checkpoint__keep_every_epochs": 2}, [80, 160, 240, 320]),
    ):
        rule = {"checkpoint__keep_last": 1, "checkpoint__keep_every_epochs": 0, "train__batch_size": 16}
        gone = Retention(small_config(**rule | keep), 40).retire(refs[::-1])
        assert [ref.images_seen for ref in refs if ref not in gone] == expected, keep


def test_choosing_names_what_there_is(run):
    # The highest fence wins, and without a manifest there is nothing.
    write(run, (1, 48), (1, 80), (2, 80), (1, 96), (1, 112))
    run.delete(CheckpointRef(1, 112).manifest_key)
    refs = [CheckpointRef(1, 48), CheckpointRef(2, 80), CheckpointRef(1, 96)]
    for words, expected in {"1,2": refs[:2], "2,2": refs[1:2], "all": refs, "latest": refs[1:2]}.items():
        assert choose(run, words, 40, 16) == expected, words
    with pytest.raises(MissingInputError, match=r"epoch 7.*there are: 1, 2"):
        choose(run, "7", 40, 16)
    for ref in list_checkpoints(run):
        delete_checkpoint(run, ref)
    with pytest.raises(BadDataError, match=r"no checkpoint any more: .*LATEST names it"):
        choose(run, "latest", 40, 16)
    run.delete(LATEST_KEY)
    with pytest.raises(MissingInputError, match=r"no checkpoint yet"):
        choose(run, "latest", 40, 16)


def test_metric_segments_come_back_in_order_and_rot_is_found(run):
    rows = [{"images_seen": i, "loss": i / 7, "time": time.time()} for i in range(1, 5)]
    segments = []
    for part, images in ((rows[:3], 3), (rows[3:], 4)):
        for key, data in metric_objects(part, CheckpointRef(1, images)).items():
            segments.append(NamedObject.of(key, data))
            run.create(key, data)
    assert read_rows(run, segments) == rows
    run.put(segments[0].key, b"{}\n")
    with pytest.raises(BadDataError, match="rotten"):
        read_rows(run, segments)

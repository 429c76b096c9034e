"""Committing, finding, verifying and retiring checkpoints, on a local folder and on a real bucket server."""

import time

import pytest
import torch
from job.runs.restoring import newest_good
from job.runs.saving import CheckpointWriter, HostCopy, Save, plan_parts

from job.exits import BadDataError, BadRequestError, MissingInputError
from job.runs.checkpoints import (
    LATEST,
    CheckpointRef,
    Manifest,
    by_progress,
    choose,
    list_checkpoints,
    load_manifest,
    opened,
)
from job.runs.metrics import read_rows, segment_objects
from job.runs.retention import Retention, delete_checkpoint
from job.store import open_store


def live_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {
        "model": {"conv.weight": weight, "conv.bias": torch.randn(8, generator=generator)},
        "ema": {"conv.weight": weight.clone(), "conv.bias": torch.zeros(8)},
        "optimizer": {"exp_avg.conv.weight": torch.randn(8, 4, 3, 3, generator=generator)},
    }


def manifest(fence, images_seen, segments=()):
    return Manifest(
        fence=fence,
        attempt="a" * 32,
        images_seen=images_seen,
        epoch=None,
        created="2026-01-01T00:00:00Z",
        code_version="0",
        config_sha256="0" * 64,
        world_size=1,
        loss_sums=[[1.5, 0.1], [3.0, 4.0]],
        files=(),
        metric_segments=segments,
    )


def write(run, *places, tensors=None):
    tensors = tensors or live_tensors()
    writer = CheckpointWriter(run, tensors)
    for fence, images_seen in places:
        writer.save(Save(manifest(fence, images_seen), {}))
        writer.wait()
    writer.close()
    return tensors


@pytest.fixture
def run(bucket_uri):
    return open_store(bucket_uri).sub("runs/r")


def test_a_checkpoint_comes_back_bit_for_bit_in_the_layout_of_the_target(run):
    saved = write(run, (1, 80))
    target = {group: {n: torch.full_like(t, 9.0) for n, t in named.items()} for group, named in saved.items()}
    strides = target["model"]["conv.weight"].stride()
    with newest_good(run, ("model", "ema", "optimizer"), pytest.fail) as restored:
        restored.copy_into(target)
        assert restored.manifest.loss_sums == [[1.5, 0.1], [3.0, 4.0]]
        folder = restored.files["model"][0].parent
    assert not folder.exists()
    for group, named in saved.items():
        for name, tensor in named.items():
            assert torch.equal(target[group][name], tensor)
    assert target["model"]["conv.weight"].stride() == strides


def test_the_newest_is_the_highest_fence_then_the_most_progress(run):
    write(run, (1, 80), (1, 240), (2, 160))
    assert max(list_checkpoints(run)) == CheckpointRef(2, 160)
    assert by_progress(list_checkpoints(run))[240] == CheckpointRef(1, 240)


def test_objects_without_a_manifest_are_no_checkpoint(run):
    write(run, (1, 80), (1, 160))
    run.delete("checkpoints/000001-000000000160/MANIFEST.json")
    assert list_checkpoints(run) == [CheckpointRef(1, 80)]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, damage, tmp_path):
    write(run, (1, 80), (1, 160))
    key = "checkpoints/000001-000000000160/optimizer-00.safetensors"
    data = bytearray(run.read(key).data)
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "truncate":
        data = data[:-1]
    elif damage == "swap":
        data = run.read(key.replace("optimizer", "ema")).data
    if damage == "delete":
        run.delete(key)
    elif damage == "manifest":
        key = "checkpoints/000001-000000000160/MANIFEST.json"
        run.put(key, run.read(key).data.replace(b'"world_size": 1', b'"world_size": 2'))
    else:
        run.put(key, bytes(data))
    warnings = []
    with newest_good(run, ("model", "ema", "optimizer"), warnings.append) as restored:
        assert restored.manifest.images_seen == 80
    assert len(warnings) == 1
    assert key in warnings[0]


def test_when_nothing_verifies_the_run_does_not_begin_anew(run):
    write(run, (1, 80))
    run.put("checkpoints/000001-000000000080/MANIFEST.json", b"{}")
    with pytest.raises(BadDataError, match="no checkpoint"), newest_good(run, ("model",), lambda _: None):
        pass


def test_a_new_run_has_no_checkpoint(run):
    run.put("status.json", b"{}")
    with newest_good(run, ("model",), pytest.fail) as restored:
        assert restored is None


def test_tensors_that_do_not_fit_are_named(run):
    write(run, (1, 80))
    with opened(run, CheckpointRef(1, 80), ("model",)) as restored:
        with pytest.raises(BadDataError, match=r"conv\.bias"):
            restored.copy_into({"model": {"conv.weight": torch.zeros(8, 4, 3, 3), "conv.bias": torch.zeros(9)}})
        with pytest.raises(BadDataError, match=r"extra"):
            restored.copy_into({"model": {**live_tensors()["model"], "extra": torch.zeros(1)}})


def test_a_manifest_of_another_place_is_refused(run):
    write(run, (1, 80))
    data = run.read("checkpoints/000001-000000000080/MANIFEST.json").data
    run.create("checkpoints/000002-000000000080/MANIFEST.json", data)
    with pytest.raises(BadDataError, match="belongs to"):
        load_manifest(run, CheckpointRef(2, 80))


def test_values_at_the_moment_of_save_are_written_though_training_goes_on(run):
    tensors = live_tensors()
    before = tensors["model"]["conv.bias"].clone()
    writer = CheckpointWriter(run, tensors)
    writer.save(Save(manifest(1, 80), {}))
    tensors["model"]["conv.bias"].fill_(-1)
    writer.close()
    target = {"model": {n: torch.zeros_like(t) for n, t in tensors["model"].items()}}
    with opened(run, CheckpointRef(1, 80), ("model",)) as restored:
        restored.copy_into(target)
    assert torch.equal(target["model"]["conv.bias"], before)


def test_a_failed_save_is_raised_by_the_next_call_and_leaves_no_checkpoint(run):
    class Broken:
        uri = run.uri

        def __getattr__(self, name):
            return getattr(run, name)

        def upload(self, path, key):
            raise BadDataError("the disk ate it")

    writer = CheckpointWriter(Broken(), live_tensors())
    writer.save(Save(manifest(1, 80), {}))
    with pytest.raises(BadDataError, match="ate it"):
        writer.wait()
    with pytest.raises(BadDataError, match="ate it"):
        writer.save(Save(manifest(1, 160), {}))
    assert not list(run.list("checkpoints"))


def test_large_groups_are_cut_into_parts_and_come_back(run, monkeypatch):
    tensors = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(10)}, "ema": {"w": torch.ones(5)}}
    parts = plan_parts(tensors, part_bytes=12_000)
    assert [p.name for p in parts] == [f"model-{i:02d}.safetensors" for i in range(4)] + ["ema-00.safetensors"]
    assert [n for p in parts if p.group == "model" for n in p.tensors] == list(tensors["model"])
    monkeypatch.setattr("job.runs.saving.plan_parts", lambda host: plan_parts(host, 12_000))
    write(run, (1, 8), tensors=tensors)
    target = {"model": {n: torch.zeros_like(t) for n, t in tensors["model"].items()}}
    with opened(run, CheckpointRef(1, 8), ("model",)) as restored:
        assert len(restored.files["model"]) == 4
        restored.copy_into(target)
    assert all(torch.equal(target["model"][n], t) for n, t in tensors["model"].items())


def test_host_buffers_are_contiguous_and_filled_without_new_memory():
    tensors = live_tensors()
    copy = HostCopy(tensors)
    addresses = [t.data_ptr() for t in copy.host["model"].values()]
    copy.copy()
    assert [t.data_ptr() for t in copy.host["model"].values()] == addresses
    assert copy.host["model"]["conv.weight"].is_contiguous()
    assert torch.equal(copy.host["model"]["conv.weight"], tensors["model"]["conv.weight"])


def test_retention_keeps_the_last_the_named_epochs_and_never_drops_the_newest():
    refs = [CheckpointRef(1, images) for images in range(16, 16 * 21, 16)]  # 16 images a batch, 40 an epoch

    def kept(**keywords):
        rule = Retention(**{"keep_last": 1, "keep_every_epochs": 0, "keep_epochs": (), **keywords})
        gone = rule.retire(refs, 40, 16)
        return [ref.images_seen for ref in refs if ref not in gone]

    assert kept() == [320]
    assert kept(keep_last=3) == [288, 304, 320]
    assert kept(keep_epochs=(1, 3)) == [48, 128, 320]
    assert kept(keep_every_epochs=2) == [80, 160, 240, 320]


def test_choosing_by_epoch_names_what_there_is(run):
    write(run, (1, 48), (1, 80), (1, 96))
    assert choose(run, "r", "1,2", 40, 16) == [CheckpointRef(1, 48), CheckpointRef(1, 80)]
    assert choose(run, "r", "latest", 40, 16) == [CheckpointRef(1, 96)]
    assert len(choose(run, "r", "all", 40, 16)) == 3
    with pytest.raises(MissingInputError, match=r"epoch 7.*there are: 1, 2"):
        choose(run, "r", "7", 40, 16)
    with pytest.raises(BadRequestError, match="newest"):
        choose(run, "r", "newest", 40, 16)
    for ref in list_checkpoints(run):
        delete_checkpoint(run, ref)
    assert not list(run.list("checkpoints"))
    with pytest.raises(BadDataError, match=r"no checkpoint any more: .*LATEST names it"):
        choose(run, "r", "latest", 40, 16)
    run.delete(LATEST)
    with pytest.raises(MissingInputError, match=r"no checkpoint .* yet"):
        choose(run, "r", "latest", 40, 16)


def test_metric_segments_come_back_in_order_and_rot_is_found(run):
    rows = [{"images_seen": i, "loss": i / 7, "time": time.time()} for i in range(1, 5)]
    segments = []
    for part, images in ((rows[:3], 3), (rows[3:], 4)):
        segment, objects = segment_objects(part, CheckpointRef(1, images))
        segments.append(segment)
        for key, data in objects.items():
            run.create(key, data)
    assert read_rows(run, segments) == rows
    assert [e.key for e in run.list("tensorboard")] == [
        "tensorboard/events.out.tfevents.000001-000000000003",
        "tensorboard/events.out.tfevents.000001-000000000004",
    ]
    run.put(segments[0].key, b"{}\n")
    with pytest.raises(BadDataError, match="rotten"):
        read_rows(run, segments)

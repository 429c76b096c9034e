"""Finding, verifying, loading and choosing checkpoints."""

import pytest
import torch

from job.exits import BadConfigError, BadDataError, MissingInputError
from job.runs.checkpoints import LATEST_KEY, choose, list_checkpoints, load_manifest, newest_good
from job.runs.layout import CheckpointRef, Located, ObjectKind, located
from job.runs.retention import delete_checkpoint
from tests.job.damages import DAMAGES
from tests.job.runs.leased import live_tensors, write


def test_a_checkpoint_comes_back_bit_equal(new_run, capsys, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = new_run
    run.put("status.json", b"{}")
    assert newest_good(run) is None
    write(run, (1, 80), (1, 160))
    saved = live_tensors()
    target = {group: {n: torch.full_like(t, 9.0) for n, t in named.items()} for group, named in saved.items()}
    strides = target["model"]["conv.weight"].stride()
    newest = newest_good(run, into=target)
    assert (newest.images_seen, newest.loss_sums) == (160, [[1.5, 0.1], [3.0, 4.0]])
    assert (capsys.readouterr().err, [*scratch.rglob("*.safetensors")]) == ("", [])
    for group, named in saved.items():
        for name, tensor in named.items():
            assert torch.equal(target[group][name], tensor)
    assert target["model"]["conv.weight"].stride() == strides
    key, aside = "checkpoints/000001-000000000160/optimizer-00.safetensors", set()
    run.put(key, DAMAGES["bit in the middle"](run.read(key).data))
    assert newest_good(run, aside).images_seen == 80
    assert [key in warning for warning in capsys.readouterr().err.splitlines()] == [True]
    assert aside == {CheckpointRef(1, 160)}
    # Who came later knows better, also with less.
    write(run, (2, 40))
    assert newest_good(run).ref == CheckpointRef(2, 40)


def test_unfit_tensors_and_manifests_are_refused(new_run):
    write(new_run, (1, 80))
    misfits = {
        r"conv\.bias": {"conv.weight": torch.zeros(8, 4, 3, 3), "conv.bias": torch.zeros(9)},
        "'extra' does not fit": {**live_tensors()["model"], "extra": torch.zeros(1)},
        "'conv.weight' does not fit": {"conv.bias": live_tensors()["model"]["conv.bias"]},
    }
    for match, tensors in misfits.items():
        # An older checkpoint would lose work.
        with pytest.raises(BadConfigError, match=match):
            newest_good(new_run, into={"model": tensors})
    new_run.create(CheckpointRef(2, 80).manifest_key, new_run.read(CheckpointRef(1, 80).manifest_key).data)
    with pytest.raises(BadDataError, match="was not written by attempt 2 of this run"):
        load_manifest(new_run, CheckpointRef(2, 80))


def test_choosing_names_what_there_is(new_run):
    # The highest fence wins, and without a manifest there is nothing.
    write(new_run, (1, 48), (1, 80), (2, 80), (1, 96), (1, 112))
    new_run.delete(CheckpointRef(1, 112).manifest_key)
    refs = [CheckpointRef(1, 48), CheckpointRef(2, 80), CheckpointRef(1, 96)]
    for words, expected in {"1,2": refs[:2], "2,2": refs[1:2], "all": refs, "latest": refs[1:2]}.items():
        assert choose(new_run, words, 40, 16) == expected, words
    with pytest.raises(MissingInputError, match=r"epoch 7.*there are: 1, 2"):
        choose(new_run, "7", 40, 16)
    for ref in list_checkpoints(new_run):
        delete_checkpoint(new_run, ref)
    with pytest.raises(BadDataError, match=r"no checkpoint any more: .*LATEST names it"):
        choose(new_run, "latest", 40, 16)
    new_run.delete(LATEST_KEY)
    with pytest.raises(MissingInputError, match=r"no checkpoint yet"):
        choose(new_run, "latest", 40, 16)


READ = {"checkpoint": CheckpointRef(3, 480), "fence": 3, "group": "ema-0.13", "folder": "one", "piece": 12}
OTHERS = {"steps": 10, "number": 2, "name": "epoch-0001-ddim-4", "picture": "png", "seed": 3072, "unique": "d" * 32}
OTHERS["pipeline"] = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"


def test_a_key_is_read_back():
    """In the table of what lies where: out of it is read what it is made of."""
    for kind in ObjectKind:
        fields = {name: value for name, value in READ.items() if f"{{{name}" in kind.value}
        assert located(kind.key(**READ | OTHERS)) == Located(kind, **fields), kind

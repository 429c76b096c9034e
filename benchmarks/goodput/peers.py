"""The peers: a careful user's training loop after diffusers' unconditional example, with two kinds of checkpoints.

`accelerate`: `save_state` to a folder. `dcp`: `torch.distributed.checkpoint.async_save` with its fast stager. Both make
folders by step, with a marker in each that is whole, keep three, and resume from the newest whole one. As in the
example the sampler is PyTorch's, and `skip_first_batches` leaves out what an interrupted epoch has learnt.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from benchmarks.crash_campaign.injection import Trace
from benchmarks.goodput.trace import VARIABLE, digests

KEEP_LAST = 3
MARKER = "WHOLE"


class Folders:
    """The checkpoints below a URI, a folder for each; one without a marker does not count."""

    def __init__(self, uri: str) -> None:
        from fsspec.core import url_to_fs

        self.fs, self.root = url_to_fs(uri)
        self.is_local = "file" in self.fs.protocol
        self.uri = self.root if self.is_local else uri

    def name(self, step: int) -> str:
        """Returns the folder of a step."""
        return f"{step:09d}"

    def whole(self) -> list[int]:
        """Returns the steps of the whole ones, newest first."""
        return sorted((int(path.split("/")[-2]) for path in self.fs.glob(f"{self.root}/*/{MARKER}")), reverse=True)

    def mark(self, step: int) -> None:
        """Marks a folder as whole, and deletes old ones."""
        self.fs.pipe_file(f"{self.root}/{self.name(step)}/{MARKER}", b"whole")
        for old in self.whole()[KEEP_LAST:]:
            self.fs.rm(f"{self.root}/{self.name(old)}", recursive=True)

    def sweep(self) -> None:
        """Deletes what a kill left half-written."""
        whole = set(self.whole())
        self.fs.makedirs(self.root, exist_ok=True)
        for path in self.fs.ls(self.root, detail=False):
            if int(path.rpartition("/")[2]) not in whole:
                self.fs.rm(path, recursive=True)


class AccelerateStates:
    """Saves by `Accelerator.save_state`; a bucket gets a copy of the folder."""

    def __init__(self, folders: Folders, trace: Trace, loop: SimpleNamespace) -> None:
        self._folders, self._trace, self._accelerator = folders, trace, loop.accelerator
        loop.accelerator.register_for_checkpointing(loop.average)

    def save(self, step: int) -> None:
        """Saves, and returns when that has ended."""
        name = self._folders.name(step)
        if self._folders.is_local:
            self._accelerator.save_state(f"{self._folders.root}/{name}")
        else:
            with TemporaryDirectory() as scratch:
                self._accelerator.save_state(scratch)
                self._folders.fs.put(f"{scratch}/", f"{self._folders.root}/{name}/", recursive=True)
        self._folders.mark(step)
        self._trace("saved", at=step)

    def restore(self, step: int) -> None:
        """Loads the state of a step."""
        name = self._folders.name(step)
        if self._folders.is_local:
            self._accelerator.load_state(f"{self._folders.root}/{name}")
            return
        with TemporaryDirectory() as scratch:
            self._folders.fs.get(f"{self._folders.root}/{name}/", f"{scratch}/", recursive=True)
            self._accelerator.load_state(scratch)

    def before_update(self) -> None:
        """Has nothing to wait for: saving has ended."""


class DistributedCheckpoints:
    """Saves by `async_save`: weights may not change before staging has ended, and the marker comes with the upload."""

    def __init__(self, folders: Folders, trace: Trace, loop: SimpleNamespace) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._folders, self._trace, self._loop = folders, trace, loop
        self._stager = DefaultStager(StagingOptions(False, True, True, False))
        self._saving: Any = None

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self._loop.model, self._loop.optimizer)
        return {"model": model, "optimizer": optimizer, "average": self._loop.average.state_dict()}

    def save(self, step: int) -> None:
        """Waits for the save before, and begins one."""
        from torch.distributed.checkpoint import FileSystemWriter, async_save
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        def done(upload: Any) -> None:
            if upload.exception() is None:
                self._folders.mark(step)
                self._trace("saved", at=step)

        if self._saving is not None:
            self._saving.upload_completion.result()
        writer = (FileSystemWriter if self._folders.is_local else FsspecWriter)(
            f"{self._folders.uri}/{self._folders.name(step)}"
        )
        self._saving = async_save(self._state(), storage_writer=writer, async_stager=self._stager, no_dist=True)
        self._saving.upload_completion.add_done_callback(done)

    def before_update(self) -> None:
        """Waits for the copy of the weights that are about to change."""
        if self._saving is not None:
            self._saving.staging_completion.result()

    def restore(self, step: int) -> None:
        """Loads the state of a step."""
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state, loop = self._state(), self._loop
        reader = FileSystemReader if self._folders.is_local else FsspecReader
        load(state, storage_reader=reader(f"{self._folders.uri}/{self._folders.name(step)}"), no_dist=True)
        set_state_dict(loop.model, loop.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loop.average.load_state_dict(state["average"])


def train(asked: argparse.Namespace, trace: Trace) -> None:
    """Trains for ever from the newest whole checkpoint on, or looks for that alone."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torch.utils.data import DataLoader, TensorDataset

    from ddpm import networks
    from ddpm.objective import Condition

    set_seed(0)
    options, data = json.loads(asked.options.read_text()), np.load(asked.images)
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options["precision"])
    loader: Any = DataLoader(TensorDataset(images, labels), batch_size=options["batch_size"], shuffle=True)
    bare = networks.build(**options["network"])
    average = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(options["decay"]))
    optimizer: Any = torch.optim.AdamW(bare.parameters(), lr=options["learning_rate"], fused=True)
    network, optimizer, loader = accelerator.prepare(bare, optimizer, loader)
    average.to(accelerator.device)
    loop = SimpleNamespace(accelerator=accelerator, model=bare, optimizer=optimizer.optimizer, average=average)
    trace("imported")
    folders = Folders(asked.folder)
    saver = (AccelerateStates if asked.kind == "accelerate" else DistributedCheckpoints)(folders, trace, loop)

    def loads(step: int) -> bool:
        try:
            saver.restore(step)
        except Exception as error:
            print(f"step {step} does not load: {error}")
            return False
        trace("restored", at=step)
        return True

    step = next(filter(loads, folders.whole()), 0)
    if asked.look:
        return
    folders.sweep()
    trace("training")
    for epoch in count(step // len(loader)):
        skipped = step % len(loader)
        rest = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        number = epoch * len(images) + skipped * options["batch_size"]
        for clean, classes in rest:
            learnt = digests(clean.cpu())
            x = clean.float() / 127.5 - 1
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
            noise, t = torch.randn_like(x), torch.randn(len(x), device=x.device).sigmoid()
            noisy = torch.lerp(x, noise, t[:, None, None, None])
            predicted = network(noisy, 1000 * t, Condition(classes if options["network"]["num_classes"] else None))
            accelerator.backward((predicted - (noise - x)).square().mean())
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            saver.before_update()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(bare)
            step += 1
            trace("step", at=step, images=list(enumerate(learnt, number)))
            number += len(learnt)
            if asked.every and step % asked.every == 0:
                trace("saving", at=step)
                saver.save(step)


def main() -> None:
    """Runs a peer."""
    trace = Trace(os.environ[VARIABLE])
    trace("process")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput.peers", description=__doc__)
    parser.add_argument("kind", choices=("accelerate", "dcp"))
    parser.add_argument("--folder", required=True, help="path or URI of the checkpoints")
    parser.add_argument("--images", type=Path, required=True, help="npz of images, uint8 [n, C, H, W], and labels")
    parser.add_argument("--options", type=Path, required=True, help="JSON of the network and its training")
    parser.add_argument("--every", type=int, default=0, help="steps between two saves; 0: none")
    parser.add_argument("--look", action="store_true", help="restore and end")
    train(parser.parse_args(), trace)


if __name__ == "__main__":
    main()

"""The peers: a careful user's training loop after diffusers' unconditional example, with two kinds of checkpoints.

`accelerate`: `save_state` to a folder. `dcp`: `torch.distributed.checkpoint.async_save` with its fast stager. Both make
folders by step, with a marker in each that is whole, keep three, and resume from the newest one that loads. As in the
example the sampler is PyTorch's, and `skip_first_batches` leaves out what an interrupted epoch has learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.crash_campaign.injection import VARIABLE, Trace
from benchmarks.goodput.trace import digests

KEEP_LAST = 3
MARKER = "WHOLE"


class Folders:
    """The checkpoints in a folder, a folder for each."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self._root / f"{step:09d}"

    def whole(self) -> list[int]:
        """Returns the steps of the marked folders, newest first."""
        return sorted((int(path.parent.name) for path in self._root.glob(f"*/{MARKER}")), reverse=True)

    def publish(self, step: int) -> None:
        """Marks a folder as whole, and deletes old ones."""
        (self.path(step) / MARKER).touch()
        for old in self.whole()[KEEP_LAST:]:
            shutil.rmtree(self.path(old))


class AccelerateStates:
    """Saves by `Accelerator.save_state`, and waits for the end of it."""

    def __init__(self, loop: SimpleNamespace) -> None:
        self._accelerator = loop.accelerator
        loop.accelerator.register_for_checkpointing(loop.average)
        self.restore = loop.accelerator.load_state

    def save(self, path: str, publish: Any) -> None:
        """Saves to a folder, then publishes it."""
        self._accelerator.save_state(path)
        publish()

    def before_update(self) -> None:
        """Returns at once."""


class DistributedCheckpoints:
    """Saves by `async_save`, one save at a time; weights may not change before staging has ended."""

    def __init__(self, loop: SimpleNamespace) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._loop, self._stager = loop, DefaultStager(StagingOptions(False, True, True, False))
        self._saving: Any = None

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self._loop.model, self._loop.optimizer)
        return {"model": model, "optimizer": optimizer, "average": self._loop.average.state_dict()}

    def save(self, path: str, publish: Any) -> None:
        """Begins to save to a folder, which is published at the end."""
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        if self._saving is not None:
            self._saving.upload_completion.result()
        writer = FileSystemWriter(path)
        self._saving = async_save(self._state(), storage_writer=writer, async_stager=self._stager, no_dist=True)
        self._saving.upload_completion.add_done_callback(lambda upload: upload.exception() or publish())

    def before_update(self) -> None:
        """Waits for the copy of the weights that are about to change."""
        if self._saving is not None:
            self._saving.staging_completion.result()

    def restore(self, path: str) -> None:
        """Loads a folder."""
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state, loop = self._state(), self._loop
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(loop.model, loop.optimizer, **parts)
        loop.average.load_state_dict(state["average"])


def train(asked: argparse.Namespace, trace: Trace) -> None:
    """Trains for ever from the newest checkpoint that loads, or only looks for that."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torch.utils.data import DataLoader, TensorDataset

    from ddpm import networks
    from ddpm.objective import Condition

    set_seed(0)
    options, data = json.loads((asked.data / "options.json").read_text()), np.load(asked.data / "images.npz")
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options["precision"])
    loader: Any = DataLoader(TensorDataset(images, labels), batch_size=options["batch_size"], shuffle=True)
    bare = networks.build(**options["network"]).to(accelerator.device)
    average = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(options["decay"]))
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=options["learning_rate"], fused=True)
    network, optimizer, loader = accelerator.prepare(bare, bare_optimizer, loader)
    loop = SimpleNamespace(accelerator=accelerator, model=bare, optimizer=bare_optimizer, average=average)
    folders, saver = Folders(asked.folder), SAVERS[asked.kind](loop)

    def loads(step: int) -> bool:
        try:
            saver.restore(str(folders.path(step)))
        except Exception as error:
            print(f"step {step} does not load: {error}")
            return False
        trace("restored", at=step)
        return True

    step = next(filter(loads, folders.whole()), 0)
    if asked.look:
        return
    for epoch in count(step // len(loader)):
        skipped = step % len(loader)
        number = epoch * len(images) + skipped * options["batch_size"]
        for clean, classes in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            learnt = digests(clean.cpu())
            x = clean.float() / 127.5 - 1
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
            noise, t = torch.randn_like(x), torch.randn(len(x), device=x.device).sigmoid()
            noisy, condition = torch.lerp(x, noise, t[:, None, None, None]), Condition(classes)
            loss = (network(noisy, 1000 * t, condition) - (noise - x)).square().mean()
            accelerator.backward(loss)
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

                def publish(step: int = step) -> None:
                    folders.publish(step)
                    trace("saved", at=step)

                saver.save(str(folders.path(step)), publish)


SAVERS: dict[str, Any] = {"accelerate": AccelerateStates, "dcp": DistributedCheckpoints}

if __name__ == "__main__":
    this_trace = Trace(json.loads(os.environ[VARIABLE])["trace"])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput.peers", description=__doc__)
    parser.add_argument("kind", choices=SAVERS)
    parser.add_argument("folder", type=Path, help="folder of the checkpoints")
    parser.add_argument("data", type=Path, help="folder with images.npz (images and labels) and options.json")
    parser.add_argument("--every", type=int, default=0, help="steps between two saves; 0: none")
    parser.add_argument("--look", action="store_true", help="restore and end")
    train(parser.parse_args(), this_trace)

"""The systems under kills: the commands that start them, and their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.goodput.accounting import Event
from benchmarks.goodput.trace import VARIABLE, digests
from job.config import EMBEDDED
from job.data.reading.cache import open_cache
from job.plan import plan_run
from job.processes import compute
from job.progress import Progress
from job.requests import TrainRequest
from job.runs.checkpoints import newest_good
from job.runs.layout import RUNS
from job.store import open_store

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"ours": "ddpm train", "accelerate": "accelerate.save_state", "dcp": "torch.distributed.checkpoint, async"}
NEVER_SAVES = ("checkpoint.every_epochs=99999", "checkpoint.every_minutes=99999", "checkpoint.keep_every_epochs=0")
POLL_SECONDS = 0.2
_running = set[int]()
"""Process groups; each has its own session, so signals to this process do not reach them."""
_leaving = threading.Event()


def destroy_all() -> None:
    """Kills all systems; afterwards none can be started."""
    _leaving.set()
    for group in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class Attempt(NamedTuple):
    """The trace of one process, and when it was started."""

    started: float
    events: list[Event]


@dataclass(frozen=True)
class Subject:
    """One network and the embedded images, which all systems train on."""

    folder: Path
    bucket: str
    sets: tuple[str, ...]
    dataset: Counter[str]
    """The hash of each image."""
    batch_size: int
    every_minutes: float | None
    """The minutes between saves of ours; None: as the job decides."""

    @classmethod
    def prepared(cls, folder: Path, bucket: str, sets: tuple[str, ...]) -> Subject:
        """Packs the images into the bucket, and writes the files that the peers read."""
        os.environ["DDPM_CACHE"] = str(folder / "cache")
        ensure = [sys.executable, "-m", "job", "data", "ensure", EMBEDDED, "--bucket", bucket]
        subprocess.run(ensure, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        plan = plan_run(TrainRequest(EMBEDDED, bucket=bucket, sets=sets).check(), suited=compute.suited)
        config, everything = plan.config, np.arange(plan.index.images)
        cache = open_cache(plan.bucket, plan.index, 1 << 40)
        images = torch.from_numpy(cache.read(everything)).permute(0, 3, 1, 2).contiguous()
        network = asdict(config.model) | dict.fromkeys(("in_channels", "out_channels"), plan.index.channels)
        network |= {"image_size": plan.index.image_shape[0], "null_class": network.pop("label_dropout") > 0}
        train, precision = config.train, "bf16" if config.train.precision == "bf16" else "no"
        options = {"network": network, "precision": precision, "decay": config.ema.decay}
        options |= {"batch_size": train.batch_size, "learning_rate": train.learning_rate}
        (folder / "options.json").write_text(json.dumps(options))
        np.savez(folder / "images.npz", images=images.numpy(), labels=cache.labels(everything))
        every_minutes = config.checkpoint.every_minutes
        return cls(folder, bucket, sets, Counter(digests(images)), train.batch_size, every_minutes)

    def step_images(self, system: str) -> float:
        """Returns the mean size of a batch: those of the peers end with the epoch."""
        images = self.dataset.total()
        return self.batch_size if system == "ours" else images / -(-images // self.batch_size)

    def command(self, system: str, run: str, every_steps: int) -> list[str]:
        """Returns the words after `python -m` that begin or resume a run.

        `every_steps` is the interval of the peers' saves; ours saves as its configuration says. 0: no saves.
        """
        if system != "ours":
            words = ["benchmarks.goodput.peers", system, f"{self.bucket}/{system}/{run}", str(self.folder)]
            return [*words, "--every", str(every_steps)]
        # The peers draw no pictures.
        sets = ("sample.every_epochs=99999", *self.sets, *(() if every_steps else NEVER_SAVES))
        words = ["job", "train", "--dataset", EMBEDDED, "--bucket", self.bucket, "--run", run, "--epochs", "99999"]
        return words + [f"--set={one}" for one in sets]

    def kept_at(self, system: str, run: str) -> int:
        """Returns the progress of the newest state that loads: images seen of ours, steps of the peers."""
        if system == "ours":
            newest = newest_good(open_store(self.bucket).sub(f"{RUNS}/{run}"))
            return newest.images_seen if newest else 0
        look = self.attempt(system, [*self.command(system, run, 0), "--look"], f"{system}: restoring", 120)
        return next((event["at"] for event in look.events if event["event"] == "restored"), 0)

    def attempt(
        self,
        system: str,
        words: list[str],
        title: str,
        seconds: float,
        is_enough: Callable[[list[Event]], bool] | None = None,
    ) -> Attempt:
        """Starts a command, and kills its whole group after so many seconds, or once its trace is enough.

        Raises:
            RuntimeError: it ended with an error before.
        """
        started = time.time()
        # A name of its own: a dying process may still write a line.
        trace, output = (self.folder / f"{system}-{started:.3f}.{kind}" for kind in ("trace", "output"))
        trace.touch()
        paths = [str(Path(__file__).with_name("injected"))] * (system == "ours") + [str(ROOT)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
        environment |= {"DDPM_CACHE": os.environ["DDPM_CACHE"], "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-P", "-m", *words]
        with output.open("wb") as file, Progress(title, total=round(seconds), unit="s") as bar:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            environment[VARIABLE] = str(trace)
            process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **streams)
            _running.add(process.pid)
            try:
                while (
                    not _leaving.is_set() and (left := started + seconds - time.time()) > 0 and process.poll() is None
                ):
                    if is_enough and is_enough(_events(trace)):
                        break
                    time.sleep(min(POLL_SECONDS, left))
                    bar.update(seconds - left)
            finally:
                code = process.poll()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _running.discard(process.pid)
        if code or _leaving.is_set():
            raise RuntimeError(f"{' '.join(command)}: {output.read_text(errors='replace')[-2000:]}")
        return Attempt(started, _events(trace))


def _events(trace: Path) -> list[Event]:
    # A kill may cut the last line.
    return [json.loads(line) for line in trace.read_text().rpartition("\n")[0].splitlines()]

"""The systems under kills: the commands that start them, and their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.goodput.accounting import Event
from benchmarks.goodput.trace import VARIABLE, digests
from job.config import EMBEDDED
from job.plan import plan_run
from job.processes import compute
from job.requests import TrainRequest
from job.runs.checkpoints import newest_good
from job.runs.layout import RUNS
from job.stop import NEVER
from job.store import open_store

ROOT = Path(__file__).resolve().parents[2]
NEVER_SAVES = ("checkpoint.every_epochs=99999", "checkpoint.every_minutes=99999", "checkpoint.keep_every_epochs=0")
POLL_SECONDS = 0.2
LABELS = {"ours": "ddpm train", "accelerate": "accelerate.save_state", "dcp": "torch.distributed.checkpoint, async"}


@dataclass(frozen=True)
class Subject:
    """What all systems train: one network on the embedded images."""

    folder: Path
    bucket: str
    sets: tuple[str, ...]
    dataset: Counter[str]
    """The hash of each image."""
    batch_size: int

    @classmethod
    def prepared(cls, folder: Path, bucket: str, sets: tuple[str, ...]) -> Subject:
        """Packs the images into the bucket, and writes the files that the peers read."""
        os.environ["DDPM_CACHE"] = str(folder / "cache")
        ensure = [sys.executable, "-m", "job", "data", "ensure", EMBEDDED, "--bucket", bucket]
        subprocess.run(ensure, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        plan = plan_run(TrainRequest(EMBEDDED, bucket, sets=sets).check(), suited=compute.suited)
        config, everything = plan.config, np.arange(plan.index.images)
        cache = plan.opened_images(NEVER)
        images = torch.from_numpy(cache.read(everything)).permute(0, 3, 1, 2).contiguous()
        model = asdict(config.model)
        model["null_class"] = model.pop("label_dropout") > 0
        shape = dict.fromkeys(("in_channels", "out_channels"), plan.index.channels) | {
            "image_size": plan.index.image_shape[0]
        }
        options = {
            "network": model | shape,
            "batch_size": config.train.batch_size,
            "learning_rate": config.train.learning_rate,
            "decay": config.ema.decay,
            "precision": "bf16" if config.train.precision == "bf16" else "no",
        }
        (folder / "options.json").write_text(json.dumps(options))
        np.savez(folder / "images.npz", images=images.numpy(), labels=cache.labels(everything))
        return cls(folder, bucket, sets, Counter(digests(images)), config.train.batch_size)

    def step_images(self, system: str) -> float:
        """Returns the mean size of a batch: those of the peers end with the epoch."""
        images = self.dataset.total()
        return self.batch_size if system == "ours" else images / -(-images // self.batch_size)

    def command(self, system: str, run: str, every_steps: int) -> list[str]:
        """Returns the command that begins or resumes a run.

        Args:
            system: a key of `LABELS`.
            run: a name.
            every_steps: the interval of the peers' saves; 0: no saves. Ours saves when its configuration says so.
        """
        if system == "ours":
            # The peers draw no pictures.
            sets = ("sample.every_epochs=0", *self.sets, *(() if every_steps else NEVER_SAVES))
            words = ["job", "train", "--dataset", EMBEDDED, "--bucket", self.bucket, "--run", run, "--epochs", "99999"]
            return [*words, *(f"--set={one}" for one in sets)]
        words = ["benchmarks.goodput.peers", system, "--folder", f"{self.bucket}/{system}/{run}"]
        files = ["--images", str(self.folder / "images.npz"), "--options", str(self.folder / "options.json")]
        return [*words, *files, "--every", str(every_steps)]

    def kept_at(self, system: str, run: str) -> int:
        """Returns the progress of the newest state that loads: images seen of ours, steps of the peers."""
        if system == "ours":
            with newest_good(open_store(self.bucket).sub(f"{RUNS}/{run}"), print) as restored:
                return restored.manifest.images_seen if restored else 0
        look = Attempt(self, "look", [*self.command(system, run, 0), "--look"], system)
        look.wait(lambda: look.process.poll() is not None, 120)
        return next((event["at"] for event in look.events if event["event"] == "restored"), 0)


class Attempt:
    """One start of a system, in a process group of its own."""

    def __init__(self, subject: Subject, name: str, words: list[str], system: str) -> None:
        at = subject.folder / f"{system}-{name}"
        self.trace_path, self.output_path = at.with_suffix(".trace"), at.with_suffix(".output")
        self.trace_path.unlink(missing_ok=True)
        paths = [ROOT / "benchmarks" / "goodput" / "injected", ROOT] if system == "ours" else [ROOT]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
        environment = inherited | {
            "DDPM_CACHE": str(subject.folder / "cache"),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            VARIABLE: str(self.trace_path),
        }
        self.started = time.time()
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                cwd=subject.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def events(self) -> list[Event]:
        """Its trace so far; the last line may be incomplete."""
        with suppress(FileNotFoundError):
            whole, _, _ = self.trace_path.read_text().rpartition("\n")
            return [json.loads(line) for line in whole.splitlines()]
        return []

    def wait(self, condition: Callable[[], bool], seconds: float, tell: Callable[[float], None] | None = None) -> None:
        """Waits until the condition holds, or for so many seconds since the start, then kills the group.

        Raises:
            RuntimeError: the process ended with an error.
        """
        try:
            while (passed := time.time() - self.started) < seconds and not condition():
                if self.process.poll():
                    raise RuntimeError(f"{self.process.args}: {self.output_path.read_text(errors='replace')[-2000:]}")
                if tell:
                    tell(passed)
                time.sleep(min(POLL_SECONDS, max(0.0, self.started + seconds - time.time())))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

"""What is usual for a preset on its own dataset: trains it with several seeds, and prints the band of their losses.

    python -m benchmarks.usual landscape-sample --seeds 4

The output is the preset's section `usual`, by which the page of a run says whether it is on track. The loss at an epoch
is the mean of its rows; the band goes from the lowest to the highest of the seeds, and by half of that beyond both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

import numpy as np
import yaml

from job.data.shards import find_dataset, load_index
from job.runs.checkpoints import list_checkpoints, load_manifest
from job.runs.metric_rows import merged, read_rows
from job.runs.records import run_store
from job.store import Store, open_store

EPOCHS = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500)
MARGIN = 0.5


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="of a dataset that is packed, or embedded")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=None, help="default: the preset's")
    parser.add_argument("--bucket", default="", help="where the dataset is; default: a new one, for what is embedded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = arguments.bucket or folder
        ddpm = [sys.executable, "-P", "-m", "job"]
        subprocess.run([*ddpm, "data", "ensure", arguments.preset, "--bucket", uri], check=True, stdout=sys.stderr)
        for seed in range(1, arguments.seeds + 1):
            words = ["--dataset", arguments.preset, "--run", f"usual-{seed}", "--bucket", uri]
            sets = ["--set", f"train.seed={seed}", "--set", "sample.images=1", "--set", "sample.nearest=false"]
            more = ["--epochs", str(arguments.epochs)] if arguments.epochs else []
            subprocess.run([*ddpm, "train", *words, *sets, *more], check=True, stdout=sys.stderr)
        print(yaml.safe_dump({"usual": _band(open_store(uri), arguments)}, sort_keys=False, width=110), end="")


def _band(bucket: Store, arguments: argparse.Namespace) -> dict[str, object]:
    index = load_index(bucket, find_dataset(bucket, arguments.preset, None))
    losses = [_losses(run_store(bucket, f"usual-{seed}"), index.images) for seed in range(1, arguments.seeds + 1)]
    epochs = [epoch for epoch in EPOCHS if all(epoch in of_seed for of_seed in losses)]
    values = np.array([[of_seed[epoch] for epoch in epochs] for of_seed in losses])
    beyond = MARGIN * (values.max(axis=0) - values.min(axis=0))
    return {
        "dataset_id": index.dataset_id,
        "epochs": epochs,
        "low": [float(f"{value:.4g}") for value in values.min(axis=0) - beyond],
        "high": [float(f"{value:.4g}") for value in values.max(axis=0) + beyond],
    }


def _losses(run: Store, epoch_images: int) -> dict[int, float]:
    """The mean loss of each epoch, by its number from 1."""
    rows = merged(read_rows(run, load_manifest(run, max(list_checkpoints(run))).metrics))
    of_epoch: dict[int, list[float]] = {}
    for row in rows:
        if row.get("loss") is not None:
            of_epoch.setdefault(-(-row["images_seen"] // epoch_images), []).append(row["loss"])
    return {epoch: float(np.mean(values)) for epoch, values in of_epoch.items()}


if __name__ == "__main__":
    main()

"""The parent of a run: the checkpoint with whose weights it begins, by `ddpm train --from RUN[@EPOCH]`.

The run's configuration pins it by hash. It is read until the run has a checkpoint of its own, which is that of image 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ddpm.epochs import epochs_completed_by
from job.config import EMBEDDED, ParentConfig, RunConfig, draft, layered, preset_names
from job.data.shards import DatasetIndex
from job.exits import BadConfigError, BadDataError, MissingInputError
from job.runs import records
from job.runs.checkpoints import Restored, check_average, choose, opened
from job.runs.layout import CheckpointRef
from job.runs.outlook import attempts_of
from job.runs.readers import reading
from job.store import Store, open_store

_PROCESS = "schedule timesteps prediction sigma_data variance self_conditioning"
_MEANINGS = ["data.channels", "data.latents", "data.augment", *(f"diffusion.{key}" for key in _PROCESS.split())]
"""Keys that decide the meaning of a network's inputs and output."""
_FREE = {"model.num_classes", "model.label_dropout", "model.dropout", "model.gradient_checkpointing"}
"""Keys of a network that decide about its layers of classes alone, or about no weight."""
_SAMPLER = "sampler steps grid shift eta order churn variance clip"
_TAKEN = {"data.augment", *(f"sample.{key}" for key in _SAMPLER.split())}
"""Keys that go with a network and its process."""
_OWN = {"model.num_classes", "train.precision", "train.freeze"}
"""Keys that no run takes from its parent."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a new run begins with."""

    config: RunConfig
    """That of its run."""
    pinned: dict[str, Any]
    """The section `parent` of the new run, by dotted keys."""

    def draft(self, preset: str, changes: dict[str, Any]) -> RunConfig:
        """Returns the configuration of the new run before its dataset is known.

        Network, process and sampler are the parent's. So are the optimiser and the averages if there is no `preset`,
        because a learning rate goes with a network.
        """
        sections = ("model.", "diffusion.", *(() if preset else ("train.", "ema.")))
        of_dataset = {"model.label_dropout"} if changes.get("model.num_classes") == 0 else set()
        taken = {
            key: value
            for key, value in self.config.flat().items()
            if (key.startswith(sections) or key in _TAKEN) and key not in _OWN | of_dataset
        }
        usual = self.config.preset if self.config.preset in preset_names() else EMBEDDED
        return draft(preset or usual, layered(taken, changes))

    def follow(self, config: RunConfig, index: DatasetIndex, changes: dict[str, Any]) -> RunConfig:
        """Returns a draft with this checkpoint pinned, and with what its network becomes for the dataset."""
        fitted = self._attention(index.size) if config.model.kind == self.config.model.kind else {}
        if not index.classes:
            fitted["model.label_dropout"] = 0.0
        return config.updated(fitted | changes | self.pinned)

    def check(self, config: RunConfig) -> None:
        """Checks that the weights fit the network of a configuration.

        Raises:
            BadConfigError: they do not; the message lists all differences.
        """
        assert config.data.size is not None
        theirs, ours = self.config.flat() | self._attention(config.data.size), config.flat()
        for values in (theirs, ours):
            values["data.augment"] = values["data.augment"] > 0
        keys = [*(key for key in ours if key.startswith("model.") and key not in _FREE), *_MEANINGS]
        if theirs["model.kind"] != ours["model.kind"]:
            keys = ["model.kind"]
        if differing := [f"{key}: {theirs[key]} → {ours[key]}" for key in keys if theirs[key] != ours[key]]:
            raise BadConfigError(
                f"the weights of {self.pinned['parent.run']} fit another network ({'; '.join(differing)}): leave out "
                "these settings, or --from"
            )

    def _attention(self, size: int) -> dict[str, Any]:
        """Returns the setting by which attention stays at its levels for images of this size."""
        before, sizes = self.config.data.size, self.config.flat().get("model.attention_sizes")
        if before is None or sizes is None:
            return {}
        return {"model.attention_sizes": [side * size // before for side in sizes if side * size % before == 0]}


def find_parent(bucket: Store, asked: dict[str, Any]) -> Parent:
    """Finds the checkpoint that a person asked for.

    Args:
        bucket: of the new run.
        asked: keys and values, with those of the section `parent`: `run`, `weights`, and `epoch` if not the newest.

    Raises:
        MissingInputError: no such run, checkpoint or weights; the message lists those that exist.
    """
    bucket, name = _place_of(bucket, asked["parent.run"])
    run, config = records.run_store(bucket, name), records.existing_config(bucket, name)
    images, batch_size = records.dataset_images_of(bucket, config), config.train.batch_size
    (ref,) = choose(run, str(asked.get("parent.epoch", "latest")), images, batch_size)
    ended = epochs_completed_by(ref.images_seen, images, batch_size)
    imports = [attempt.imported for attempt in attempts_of(run)] if config.imported else []
    pinned = {
        "parent.epoch": ended[-1] if ended else None,
        "parent.checkpoint": str(ref),
        "parent.sha256": check_average(run, ref, asked["parent.weights"], name).sha256,
        "parent.before": config.parent.lineage or next(filter(None, imports), None),
    }
    return Parent(config, pinned | {key: value for key, value in asked.items() if key.startswith("parent.")})


@contextmanager
def opened_parent(bucket: Store, parent: ParentConfig) -> Iterator[Restored]:
    """Downloads and verifies the weights of a pinned checkpoint; `bucket` is that of the run which begins with them.

    Raises:
        MissingInputError: it is gone.
        BadDataError: it is damaged, or another one than at the time of the pinning.
    """
    assert parent.run and parent.checkpoint and parent.weights
    bucket, name = _place_of(bucket, parent.run)
    run, ref = records.run_store(bucket, name), CheckpointRef.parse(parent.checkpoint)
    what_to_do = "restore it, or delete the run that begins with it, and begin another"
    try:
        if check_average(run, ref, parent.weights, name).sha256 != parent.sha256:
            raise BadDataError(f"{run.uri}/{ref.key} has changed since it was pinned: {what_to_do}")
        with reading(run, ref), opened(run, ref, (parent.weights,)) as restored:
            yield restored
    except MissingInputError as error:
        raise MissingInputError(f"{run.uri}/{ref.key} is gone ({error}): {what_to_do}") from None


def _place_of(bucket: Store, run: str) -> tuple[Store, str]:
    """Returns the bucket and the name of a run: a name in `bucket`, or the URI of a folder."""
    if "/" not in run:
        return bucket, run
    uri, name = records.split_run(run)
    return open_store(uri, bucket.retry), name

"""The lineage of a run: which attempt learnt which of the images that count, and with which settings.

An attempt that was killed may have learnt images after its last checkpoint. The next attempt learns them again, so that
they count as the next one's. A manifest names the checkpoints from which its attempts resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from job.config import RunConfig, validated
from job.exits import MissingInputError
from job.runs import records
from job.runs.checkpoints import Manifest, list_checkpoints, newest_sound
from job.runs.layout import CheckpointRef
from job.store import Store


@dataclass(frozen=True)
class Stretch:
    """The images that one attempt learnt, from the end of the stretch before up to number `last_image`, without it."""

    attempt: records.Attempt
    config: RunConfig
    """The run's configuration with the changes of this attempt."""
    last_image: int

    def has(self, ref: CheckpointRef) -> bool:
        """Returns whether a checkpoint of the run lies in it."""
        return ref.fence == self.attempt.fence and ref.images_seen <= self.last_image


@dataclass(frozen=True)
class Lineage:
    """The way to a run's newest checkpoint."""

    newest: Manifest
    stretches: tuple[Stretch, ...]
    """In order."""

    @classmethod
    def of(cls, run: Store, stored: RunConfig) -> Lineage:
        """Reads the lineage of a run; `stored` is its configuration as it began.

        Raises:
            MissingInputError: the run has no checkpoint.
            BadDataError: the record of an attempt is damaged or missing.
        """
        if (newest := newest_sound(run, list_checkpoints(run))) is None:
            raise MissingInputError(f"{run.uri} has no checkpoint that can be read: train it first")
        stretches = list[Stretch]()
        for ref in (*map(CheckpointRef.parse, newest.lineage), newest.ref):
            attempt = records.load_attempt(run, ref.fence)
            config = validated(stored.flat() | attempt.changes, f"{run.uri}, attempt {ref.fence}")
            stretches.append(Stretch(attempt, config, ref.images_seen))
        return cls(newest, tuple(stretches))

    @property
    def imported_images(self) -> int:
        """Returns the images seen of the last import, before which this bucket's images were not learnt; else -1."""
        return max((one.last_image for one in self.stretches if one.attempt.imported), default=-1)

    def checkpoints(self, run: Store) -> list[CheckpointRef]:
        """Returns the checkpoints on the way that the run has now, in order."""
        there = [ref for ref in list_checkpoints(run) if any(stretch.has(ref) for stretch in self.stretches)]
        return sorted(there, key=lambda ref: (ref.images_seen, ref.fence))

    def stretch_of(self, image_number: int) -> Stretch:
        """Returns the stretch that learnt an image; that of later images is the last one."""
        return next((one for one in self.stretches if image_number < one.last_image), self.stretches[-1])

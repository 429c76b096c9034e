"""The sets of `ddpm sample --count`: many images of a checkpoint, in pieces that are committed one by one.

RUN/samples/epoch-0080-ddim-100-0-50000-1f3a9c02/piece-00012.tar      a shard that webdataset can read
                                                 pieces/00012.json    created once, after the piece: its commit
                                                 grid.png             the first images, before their piece
                                                 index.json           created once, when all pieces are there
RUN/samples/epoch-0080-ddim-100-0-50000-7be2c4d1/piece-00012/000003072.png …   with --save png

The last part of the name is a hash of everything that decides the images and their files: no two sets share a folder.

`job.coordination.pieces` shares the pieces among processes and machines, and resumes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil

from ddpm.image_size import ImageSize
from job.coordination.pieces import WHOLE, Pieces, Slice
from job.exits import BadDataError
from job.runs.checkpoints import load_manifest
from job.runs.layout import SAMPLES, CheckpointRef, ObjectKind
from job.runs.samples import SampleSetConfig, SampleSetIndex, named_piece
from job.sampling.sampling_plan import SamplePlan
from job.stop import NEVER, Stop
from job.store import Store

PIECES_WANTED = 64
"""The preferred number of pieces: enough for a dozen slices to finish at about the same time."""
SMALLEST_PIECE_IMAGES = 16
LARGEST_PIECE_IMAGES = 256
"""A killed process loses at most two pieces: one in upload, one half made."""


def piece_images(count: int) -> int:
    """Returns the images of a piece, a function of `count` alone, so that other slices or processes can resume."""
    return min(max(ceil(count / PIECES_WANTED), SMALLEST_PIECE_IMAGES), LARGEST_PIECE_IMAGES)


@dataclass(frozen=True)
class SampleSet:
    """The numbered images of one set, and their folder `name` below the run's samples."""

    run: Store
    name: str
    ref: CheckpointRef
    config: SampleSetConfig
    share: Slice = WHOLE

    @property
    def folder(self) -> Store:
        """The folder of the set."""
        return self.run.sub(f"{SAMPLES}/{self.name}")

    def key(self, kind: ObjectKind, piece: int = 0, seed: int = 0) -> str:
        """Returns the key of an object of this set, below the run."""
        return kind.key(folder=self.name, piece=piece, seed=seed)

    @property
    def pieces(self) -> Pieces:
        """The pieces, of which this machine makes its share first."""
        sizes = [len(self.config.seeds(number)) for number in range(self.config.pieces)]
        folder = f"{SAMPLES}/{self.name}"
        return Pieces(self.run, self.config.fingerprint, sizes, folder=folder, share=self.share)

    def index(self) -> SampleSetIndex | None:
        """Returns the index, if all pieces are there.

        Raises:
            BadDataError: the index is corrupt, or a listed piece is gone; the message says what to delete.
        """
        index = SampleSetIndex.load_made(self.run, self.key(ObjectKind.INDEX))
        if index is not None:
            self._check_files(index)
        return index

    def publish(self, stop: Stop = NEVER) -> None:
        """Creates the index, once all pieces are there.

        Raises:
            BadDataError: an object is corrupt or missing; the message says what to delete.
        """
        pieces = [named_piece(record, self.config) for record in self.pieces.records(stop=stop)]
        index = SampleSetIndex(sample_set=self.config, pieces=tuple(pieces))
        self._check_files(index)
        # Another machine that found no piece missing writes the same bytes.
        self.run.create(self.key(ObjectKind.INDEX), index.to_json())

    def describe(self, note: str) -> str:
        """Returns a line for people about a complete set."""
        pieces = f"{self.config.pieces:,} piece{'s' * (self.config.pieces > 1)}"
        return f"{self.run.uri_of(self.key(ObjectKind.INDEX))}  ({self.config.count:,} images in {pieces}; {note})"

    def _check_files(self, index: SampleSetIndex) -> None:
        """Checks that a listing has all pieces; `ddpm runs verify` checks their content."""
        found = Counter[str]()
        for entry in self.run.list(f"{SAMPLES}/{self.name}"):
            # With --save png a piece is a folder of images: their sizes are added.
            found["/".join(entry.key.split("/")[:3])] += entry.size_bytes
        wrong = [number for number, piece in enumerate(index.pieces) if found[piece.key] != piece.size_bytes]
        if wrong:
            record_key, index_key = self.key(ObjectKind.RECORD, wrong[0]), self.key(ObjectKind.INDEX)
            raise BadDataError(
                f"{self.run.uri_of(index.pieces[wrong[0]].key)} is missing, or not as its record says "
                f"({len(wrong)} such); delete it, {self.run.uri_of(record_key)} and {self.run.uri_of(index_key)}, if "
                "they exist, and the same command makes this piece again"
            )


def plan_sets(plan: SamplePlan) -> list[SampleSet]:
    """Returns the sets of `--count`, one for each checkpoint; an empty list without it. Writes nothing.

    Raises:
        BadDataError: a checkpoint's manifest is damaged.
    """
    request, count = plan.request, plan.request.count
    if count is None:
        return []
    first_seed, save = request.first_seed or 0, request.save or "shards"
    sets = []
    for ref in plan.checkpoints:
        config = SampleSetConfig(
            **plan.config.sample.effective.model_copy(update={"precision": plan.precision}).model_dump(),
            checkpoint=ref.key,
            checkpoint_sha256=load_manifest(plan.run, ref).sha256,
            worse_sha256=load_manifest(plan.worse.of_run.run, plan.worse.ref).sha256 if plan.worse else "",
            editing=plan.given.editing if plan.given else None,
            custom_sampler=f"{plan.custom_sampler.name} {plan.custom_sampler.sha256}" if plan.custom_sampler else "",
            found=plan.found,
            size=ImageSize(*plan.pixel_shape[1:]),
            channels=plan.pixel_shape[0],
            classes=plan.sampled_classes,
            first_seed=first_seed,
            count=count,
            piece_images=piece_images(count),
            save=save,
        )
        name = f"{plan.label(ref.images_seen)}-{plan.how()}-{first_seed}-{count}-{config.fingerprint[:8]}"
        sets.append(SampleSet(plan.run, name, ref, config, Slice.parse(request.slice)))
    return sets

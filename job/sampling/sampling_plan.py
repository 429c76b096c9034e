"""The plan of a sampling command, before it begins: its settings, a sampler of the user's, and sets of many images.

It needs no tensors. `ddpm sample --count` makes the images of a checkpoint in pieces, which are committed one by one:

RUN/samples/epoch-0080-ddim-100-0-50000-1f3a9c02/piece-00012.tar      a shard that webdataset can read
                                                 pieces/00012.json    created once, after the piece: its commit
                                                 grid.png             the first images, before their piece
                                                 index.json           created once, when all pieces are there
RUN/samples/epoch-0080-ddim-100-0-50000-7be2c4d1/piece-00012/000003072.png …   with --save png

The last part of the name is a hash of everything that decides the images and their files: no two sets share a folder.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.catalogue import takers
from ddpm.image_size import ImageSize
from job.coordination.pieces import WHOLE, Pieces, Slice
from job.data.codecs import kind_of
from job.exits import BadDataError, BadRequestError, did_you_mean
from job.own_code import faults_of
from job.processes.launcher import lost_peer
from job.progress import note
from job.requests import SampleRequest
from job.runs.checkpoints import load_manifest, lost_manifest
from job.runs.layout import SAMPLES, CheckpointRef, ObjectKind
from job.runs.records import check_network_named
from job.runs.run import (
    FoundGrid,
    RunHandle,
    SampleSetConfig,
    SampleSetIndex,
    file_words,
    named_piece,
    open_run,
)
from job.sampling.given import NO_CONDITIONS, GivenConditions, GivenImages, given_conditions, given_images
from job.stop import NEVER, Stop
from job.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ddpm.process import Point
    from ddpm.samplers import Denoiser, NoiseAt, Sampler

PIECES_WANTED = 64
"""The preferred number of pieces: enough for a dozen slices to finish at about the same time."""
SMALLEST_PIECE_IMAGES = 16
LARGEST_PIECE_IMAGES = 256
"""A killed process loses at most two pieces: one in upload, one half made."""


@dataclass(frozen=True)
class OwnSampler:
    """A sampler of the user, which a command names as `module:function`; no file of a bucket can name one."""

    name: str
    function: Sampler
    """See `ddpm.samplers.Sampler`."""
    sha256: str
    """The hash of its module's file."""

    @classmethod
    def load(cls, name: str) -> OwnSampler:
        """Imports the function: an installed one, or one in the working folder.

        Raises:
            BadRequestError: no such function, or its module cannot be imported.
        """
        module_name, _, function_name = name.partition(":")
        # At the end of the path, so that a file of the working folder cannot replace a library.
        sys.path.append(str(Path.cwd()))
        with _faults_of(name, "name a function of a module that is installed or lies in the working folder"):
            module = importlib.import_module(module_name)
            sha256 = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            return cls(name, getattr(module, function_name), sha256)

    @property
    def words(self) -> str:
        """Its part of a picture's name."""
        return f"{self.name.replace(':', '.')}-{self.sha256[:8]}"

    def __call__(self, denoise: Denoiser, x: Tensor, points: Sequence[Point[float]], noise_at: NoiseAt) -> Tensor:
        """Calls the function.

        Raises:
            BadRequestError: it raises an error, or returns anything but finite numbers of the shape of x.
        """
        import torch

        # Taken before the call, which may change it.
        shape, code = x.shape, getattr(inspect.unwrap(self.function), "__code__", None)
        place = f"see {code.co_filename}, line {code.co_firstlineno}" if code else "see its module"
        with _faults_of(self.name, place):
            made = self.function(denoise, x, points, noise_at)
            is_like_x = isinstance(made, torch.Tensor) and made.shape == shape and made.is_floating_point()
            if not is_like_x or not made.isfinite().all():
                what = f"{[*made.shape]}, {made.dtype}" if isinstance(made, torch.Tensor) else type(made).__name__
                raise ValueError(f"it must return finite numbers {[*shape]}, as x, and returned {what}")
            return made.detach().float()


def _faults_of(name: str, otherwise: str) -> AbstractContextManager[None]:
    """Returns the context in which a sampler of the user runs."""
    module = name.partition(":")[0]
    file = getattr(sys.modules.get(module), "__file__", "") or f"{module.rpartition('.')[2]}.py"
    return faults_of(f"--sampler {name}", Path(file), otherwise, lost_peer)


_OF_PROCESS = "schedule timesteps zero_terminal_snr sigma_min sigma_max sigma_data prediction self_conditioning"
_OF_CONDITION = "condition.derive", "condition.noise"
SHARED = ["data.dataset_id", "data.size", *_OF_CONDITION, *(f"diffusion.{key}" for key in _OF_PROCESS.split())]
"""Keys that must be equal for autoguidance: only then do both networks estimate the same images."""


@dataclass(frozen=True)
class Worse:
    """The weaker network of autoguidance."""

    of_run: RunHandle
    ref: CheckpointRef
    weights: str


@dataclass(frozen=True)
class SamplePlan(RunHandle):
    """A run, and the images to sample from it; the section `sample` of its `config` has the values of the request."""

    request: SampleRequest
    checkpoints: Sequence[CheckpointRef]
    worse: Worse | None
    given: GivenImages | None
    custom_sampler: OwnSampler | None
    found: tuple[int, ...] = ()
    """The numbers of the points of the found grid, once it is computed."""
    conditions: GivenConditions = NO_CONDITIONS
    first: SamplePlan | None = None
    """The run whose images become the conditions, for `--then`."""

    @property
    def count(self) -> int | None:
        """The number of images to save; None: pictures of them instead."""
        return self.request.count or (self.conditions.count if self.request.save else None)

    @property
    def precision(self) -> str:
        """The number format of the network."""
        chosen = self.config.sample.precision
        return self.config.train.precision if chosen == "auto" else chosen

    def choose(self) -> list[CheckpointRef]:
        """Returns the checkpoints of the request that exist now; see `RunHandle.chosen`."""
        return self.chosen(self.request.checkpoints, self.config.sample.weights)

    @property
    def words(self) -> str:
        """The sampling settings, for people."""
        own = f", {self.custom_sampler.name}" if self.custom_sampler else ""
        edited = f", {self.given.editing.words}" if self.given else ""
        return f"{self.config.sample.words(self.stored.sample)}{own}{edited}{self.how_shown}"

    def how(self, seeds: str = "") -> str:
        """Returns everything that decides the images of a checkpoint, as part of a picture's name."""
        how = self.how_sampled
        how += f"-{self.custom_sampler.words}" if self.custom_sampler else ""
        how += f"-{self.given.editing.name}" if self.given else ""
        how += f"-condition-{self.conditions.sha256[:12]}" if self.conditions.sha256 else ""
        if (first := self.first) is not None:
            moment = first.label(first.checkpoints[0].images_seen)
            how += f"-of-{first.run.uri.rpartition('/')[2]}-{moment}-{first.how()}"
        return f"{how}-seeds-{file_words(seeds, '_')}" if seeds else how


def plan_sampling(request: SampleRequest, stop: Stop = NEVER) -> SamplePlan:
    """Finds the run and its checkpoints. Writes nothing; `stop` ends a wait for the bucket, now and later.

    Raises:
        MissingInputError: no such run, dataset or checkpoint; the message lists those that exist.
        BadConfigError: more steps than timesteps, or guidance that the network has not learnt.
        BadRequestError: an option that the sampler does not take, or an unknown sampler, class or image.
    """
    if request.then:
        # The options are those of the first run: the second one samples by its settings.
        first, (run, _, epoch) = plan_sampling(replace(request, then=""), stop), request.then.partition("@")
        if len(first.checkpoints) != 1:
            raise BadRequestError("--then takes the images of one checkpoint: name it by --checkpoints")
        keys = ("bucket", "seeds", "batch_size", "save", "first_seed", "gif", "nearest", "show")
        shared = {key: getattr(request, key) for key in keys} | {"count": first.count}
        then = SampleRequest(run, checkpoints=epoch or "latest", slice=request.slice, **shared)
        second = plan_sampling(then, stop)
        if not second.config.condition.channels or first.pixel_shape[0] != second.pixel_shape[0]:
            raise BadRequestError(f"--then {run}: it has no condition image of {first.pixel_shape[0]} channels")
        return replace(second, first=first)
    of_run = open_run(request.bucket, request.run, stop)
    config, chosen = of_run.config, {**request.keys}
    given, classes = given_images(request, of_run), of_run.classes
    if request.classes:
        chosen["labels"] = _labels(request.classes, classes)
    elif given and classes and len(given.labels):
        chosen["labels"] = given.labels
    if chosen.get("precision") == config.train.precision:
        chosen["precision"] = "auto"
    usual, timesteps = config.sample.sampler, config.diffusion.timesteps
    if (sampler := chosen.get("sampler", usual)) != usual and "ddpm" in (sampler, usual):
        # The run's steps fit its own sampler: too few give noise with ancestral sampling, and other samplers need few.
        chosen.setdefault("steps", timesteps if sampler == "ddpm" else min(100, timesteps))
    of_run = replace(of_run, config=config.updated({f"sample.{key}": value for key, value in chosen.items()}))
    sample = of_run.config.sample
    for option in chosen:
        if (of := takers(option)) and sample.sampler not in of:
            raise BadRequestError(f"--{option} is an option of {', '.join(of)}: leave it out, or choose --sampler")
    if sample.guidance == 1 and (idle := sorted({"guidance_interval", "guidance_rescale"} & chosen.keys())):
        raise BadRequestError(f"--{idle[0].replace('_', '-')} needs --guidance W other than 1")
    if "autoguidance_weights" in chosen and not sample.autoguidance:
        raise BadRequestError("--autoguidance-weights needs --autoguidance [RUN@]EPOCH")
    custom_sampler = OwnSampler.load(request.custom_sampler) if request.custom_sampler else None
    worse = _worse(of_run, request, stop) if sample.autoguidance else None
    check_network_named(of_run.run, of_run.stored)
    plan = SamplePlan(
        **vars(of_run),
        request=request,
        checkpoints=of_run.chosen(request.checkpoints, sample.weights),
        worse=worse,
        given=given,
        custom_sampler=custom_sampler,
        found=found_points(of_run.run, sample.steps) if sample.grid == "found" else (),
        conditions=given_conditions(request, of_run),
    )
    if request.checkpoints == "latest" and (lost := lost_manifest(of_run.run, [*plan.checkpoints])):
        note(f"{lost}; sampling from the newest checkpoint that is there")
    return plan


def _worse(of_run: RunHandle, request: SampleRequest, stop: Stop) -> Worse:
    sample, name = of_run.config.sample, of_run.config.sample.autoguidance_run
    other = open_run(request.bucket, name, stop) if name else of_run
    ours, theirs = of_run.config.flat(), other.config.flat()
    # A network without classes stands for images of any class, as that of the null class does.
    shared = [*SHARED, *(["model.num_classes"] if theirs["model.num_classes"] else [])]
    if different := [f"{key}: {ours[key]} and {theirs[key]}" for key in shared if ours[key] != theirs[key]]:
        raise BadRequestError(f"--autoguidance {name}: it must match {request.run}, but differs in {different[0]}")
    weights = sample.autoguidance_weights or sample.weights
    (ref,) = other.chosen(str(sample.autoguidance), weights)
    return Worse(other, ref, weights)


def found_points(run: Store, steps: int) -> tuple[int, ...]:
    """Returns the stored found grid of a number of steps; empty before its first use.

    Raises:
        BadDataError: the grid is damaged.
    """
    grid = FoundGrid.load_made(run, ObjectKind.FOUND_GRID.key(steps=steps))
    return grid.numbers if grid else ()


def _labels(text: str, classes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the numbers of classes by name or number."""
    if not classes:
        raise BadRequestError(f"--classes {text!r}: the network of this run has no classes, so leave it out")
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if word in classes:
            labels.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            labels.append(int(word))
        else:
            there = did_you_mean(word, classes) or f"; there are {len(classes):,}: {', '.join(classes)}"
            raise BadRequestError(f"--classes: there is no class {word!r}{there:.200}")
    return tuple(labels)


def sample_kind(channels: int, levels: tuple[int, int]) -> str:
    """Returns the suffix of the files of sampled images: png, or npy of what no PNG holds."""
    return kind_of(channels) if levels[0] >= 0 and levels[1] < 1 << 16 else "npy"


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
    request, count = plan.request, plan.count
    if count is None:
        return []
    first_seed, save, channels = request.first_seed or 0, request.save or "shards", plan.pixel_shape[0]
    levels = plan.index.levels if plan.index else (0, 255)
    if save == "png" and sample_kind(channels, levels) != "png":
        what = f"{channels} channels of {levels[0]:,} to {levels[1]:,}"
        raise BadRequestError(f"--save png: a PNG does not hold {what}: use --save shards, which has .npy")
    sets = []
    for ref in plan.checkpoints:
        config = SampleSetConfig(
            **plan.config.sample.effective.model_copy(update={"precision": plan.precision}).model_dump(),
            checkpoint=ref.key,
            checkpoint_sha256=load_manifest(plan.run, ref).sha256,
            worse_sha256=load_manifest(plan.worse.of_run.run, plan.worse.ref).sha256 if plan.worse else "",
            editing=plan.given.editing if plan.given else None,
            # All that decides the images of the first run is in its own set.
            conditions=plan_sets(plan.first)[0].config.fingerprint if plan.first else plan.conditions.sha256,
            custom_sampler=f"{plan.custom_sampler.name} {plan.custom_sampler.sha256}" if plan.custom_sampler else "",
            found=plan.found,
            size=ImageSize(*plan.pixel_shape[1:]),
            channels=channels,
            levels=levels,
            bits=plan.config.data.bits,
            classes=plan.sampled_classes,
            first_seed=first_seed,
            count=count,
            piece_images=piece_images(count),
            save=save,
        )
        name = f"{plan.label(ref.images_seen)}-{plan.how()}-{first_seed}-{count}-{config.fingerprint[:8]}"
        sets.append(SampleSet(plan.run, name, ref, config, Slice.parse(request.slice)))
    return sets

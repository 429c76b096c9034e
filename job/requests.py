"""The options of the commands, with all checks that need no bucket: errors of usage come before missing inputs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ddpm.catalogue import METRICS, Train
from ddpm.image_size import ImageSize
from job.config import EMBEDDED, SampleConfig, draft, nearest_name, parse_sets, preset_names, read_config_file
from job.data.shards import validated_dataset_name
from job.exits import BadConfigError, BadRequestError, did_you_mean
from job.pieces import Slice
from job.runs import records
from job.store import is_remote

GIF_SEEDS = 12
"""The largest number of images in a GIF."""
MODES = {
    "inpaint": {"image", "mask", "resamplings"},
    "img2img": {"image", "strength"},
    "invert": {"image", "strength"},
    "interpolate": set[str](),
}
"""The modes of `ddpm sample` besides new images, and the options of each."""
MASKS = ("", "half", "centre")
"""Masks by name; any other `--mask` is a file."""
NUMBERS = "0123456789-, "
"""The characters of a list of numbers; any other `--image` is a file."""
MAX_RESAMPLINGS = 1000
MAX_NUMBERS = 10_000
MAX_COUNT = 25_600_000
"""The largest `--count`: the five digits in the name of a piece allow 100,000 pieces of 256 images."""

_OWN_SAMPLER = re.compile(r"[A-Za-z_][\w.]{0,99}:[A-Za-z_]\w{0,99}", re.ASCII)
_CHECKPOINTS = re.compile(r"latest|all|\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")


@dataclass(frozen=True)
class TrainRequest:
    """Options of `ddpm train`; `check` finds every error that needs no bucket."""

    dataset: str
    bucket: str
    run: str = ""
    preset: str = ""
    epochs: int | None = None
    sets: tuple[str, ...] = ()
    config_file: Path | None = None
    wait_seconds: float = 0.0
    """The time to wait for another attempt that holds the run."""
    tracker: str = ""
    """A service that also gets the metrics."""
    open_page: bool = False
    """Whether the browser of this machine opens the run's page."""
    from_: str | None = None
    """`RUN[@EPOCH]`: the checkpoint of another run, its parent, with whose weights a new run begins."""
    weights: str = ""
    """Which of its weights; empty: `ema`."""
    changes: dict[str, Any] = field(default_factory=dict)

    def check(self) -> TrainRequest:
        """Returns the request with its run named and its changes parsed.

        Raises:
            BadRequestError, BadConfigError, MissingInputError: see the message.
        """
        validated_dataset_name(self.dataset)
        run = records.validated_run_name(self.run or self.dataset.replace(".", "-").replace("_", "-"))
        changes = read_config_file(self.config_file) | parse_sets(self.sets)
        if self.epochs is not None:
            changes["train.epochs"] = self.epochs
        if self.tracker:
            changes["log.tracker"] = self.tracker
        changes |= (parent := self._parent())
        if parent.get("parent.run") == run:
            raise BadRequestError(
                f"--from {self.from_}: run {run!r} would be its own parent: name the new one with --run"
            )
        if not parent:
            # Otherwise a setting may be one of the parent's network, which is not known yet.
            draft(self.preset_name(), changes)
        return replace(self, run=run, changes=changes)

    def preset_name(self, default: str = EMBEDDED) -> str:
        """Returns the preset of the option, else the one named like the dataset, else the default."""
        return self.preset or (self.dataset if self.dataset in preset_names() else default)

    def _parent(self) -> dict[str, Any]:
        """Returns the keys of the section `parent` that `--from` and `--weights` give."""
        if self.from_ is None:
            if self.weights:
                raise BadRequestError("--weights chooses among the weights of a parent: add --from RUN[@EPOCH]")
            return {}
        # No message repeats a URI with a user or a signature in it.
        if not (match := re.fullmatch("([^@?]+?)/*(?:@(?:latest|([0-9]{1,9})))?", self.from_)):
            raise BadRequestError("--from: use RUN[@EPOCH], such as celeba@490 or gs://theirs/runs/celeba@490")
        run, name, chosen = match[1], match[1], {"weights": self.weights or "ema"}
        if "/" in run:
            _, name = records.split_run(run)
            # One folder has one name, from wherever the same command is typed.
            run = run if is_remote(run) else os.path.normpath(Path(run.removeprefix("file://")).expanduser().absolute())
        SampleRequest(name, "", chosen=chosen).check()
        epoch = {"parent.epoch": int(match[2])} if match[2] else {}
        return {"parent.run": run, "parent.weights": SampleConfig.model_validate(chosen).weights, **epoch}


@dataclass(frozen=True)
class SampleRequest:
    """Options of `ddpm sample`; the others follow the run's configuration."""

    run: str
    bucket: str
    checkpoints: str = "latest"
    seeds: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the run's section `sample`, by key."""
    gif: bool = False
    count: int | None = None
    """The number of images to save in pieces; None: pictures only."""
    save: str = ""
    slice: str = ""
    first_seed: int | None = None
    classes: str = ""
    """Names or numbers of the classes that the seeds take in turn."""
    mode: str = ""
    """One of `MODES`; empty: new images."""
    image: str = ""
    """Numbers of images in the dataset, or a file."""
    mask: str = ""
    """The part to replace: half, centre, or the white part of a file."""
    resamplings: int | None = None
    strength: float | None = None
    with_grid: bool = True

    @property
    def custom_sampler(self) -> str:
        """`module:function`, if the sampler is one of the user."""
        name = str(self.chosen.get("sampler"))
        return name if ":" in name else ""

    @property
    def files(self) -> dict[str, str]:
        """The options that name files of this machine, with their values."""
        image, mask = self.image.strip(NUMBERS) and self.image, self.mask if self.mask not in MASKS else ""
        module = self.custom_sampler.partition(":")[0].partition(".")[0]
        # A module that does not lie here may be installed in the image of a job.
        is_here = module and any(Path(name).exists() for name in (module, f"{module}.py"))
        named = {"--sampler": self.custom_sampler if is_here else "", "--image": image, "--mask": mask}
        return {option: name for option, name in named.items() if name}

    @property
    def keys(self) -> dict[str, Any]:
        """The chosen values in the form of a configuration."""
        return self.chosen | ({"sampler": "own"} if self.custom_sampler else {})

    def check(self) -> SampleRequest:
        """Returns the request if its options are valid.

        Raises:
            BadRequestError: an unknown sampler or precision, an invalid list, or options that exclude each other.
        """
        records.validated_run_name(self.run)
        try:
            SampleConfig(**self.keys)
        except ValidationError as error:
            first = error.errors()[0]
            option, what = str(first["loc"][0]).replace("_", "-"), first["msg"].removeprefix("Value error, ")
            raise BadRequestError(f"--{option} {first['input']!r}: {what.lower()}{nearest_name(first)}") from None
        sampler = self.chosen.get("sampler")
        if sampler == "own" or (self.custom_sampler and not _OWN_SAMPLER.fullmatch(self.custom_sampler)):
            raise BadRequestError(f"--sampler {sampler!r}: name yours as module:function, such as mysamplers:walk")
        if self.save not in ("", "shards", "png"):
            raise BadRequestError(f"--save {self.save!r}: use shards or png")
        if not _CHECKPOINTS.fullmatch(self.checkpoints):
            raise BadRequestError(f"--checkpoints {self.checkpoints!r}: use epochs such as 30,80, or latest, or all")
        if self.seeds:
            parse_numbers(self.seeds, "--seeds")
        if self.count is not None and not 1 <= self.count <= MAX_COUNT:
            raise BadRequestError(f"--count {self.count}: at most {MAX_COUNT:,}; --first-seed goes on from there")
        if self.count is None:
            unfit = {"--save": self.save, "--slice": self.slice, "--first-seed": self.first_seed is not None}
            why = "works only with --count: add the number of images"
        else:
            unfit = {"--seeds": self.seeds, "--gif": self.gif, "--nearest": self.chosen.get("nearest")}
            why = "makes pictures: leave it out, or --count, which takes --first-seed"
        if chosen := [option for option, is_chosen in unfit.items() if is_chosen]:
            raise BadRequestError(f"{chosen[0]} {why}")
        self._check_mode()
        Slice.parse(self.slice)
        return self

    def _check_mode(self) -> None:
        if self.mode not in ("", *MODES):
            raise BadRequestError(f"--mode {self.mode!r}: use {', '.join(MODES)}{did_you_mean(self.mode, MODES)}")
        given = {"image", "mask", "resamplings", "strength"} & {key for key in vars(self) if vars(self)[key]}
        for option in sorted(given - MODES.get(self.mode, set())):
            modes = " and ".join(mode for mode, options in MODES.items() if option in options)
            raise BadRequestError(f"--{option} is an option of --mode {modes}: leave it out, or choose one")
        if "image" in MODES.get(self.mode, ()) and not self.image:
            raise BadRequestError(f"--mode {self.mode} needs --image: numbers in the dataset such as 0-3, or a file")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadRequestError(f"--strength {self.strength:g}: a share of the steps, above 0 and up to 1")
        if self.resamplings is not None and not 1 <= self.resamplings <= MAX_RESAMPLINGS:
            raise BadRequestError(f"--resamplings {self.resamplings}: use 1 to {MAX_RESAMPLINGS:,}")
        new = {"--gif": self.gif, "--nearest": self.chosen.get("nearest")}
        if self.mode and (chosen := [option for option, is_chosen in new.items() if is_chosen]):
            raise BadRequestError(f"{chosen[0]} works only for new images: leave it out, or --mode")
        if self.mode == "interpolate" and self.count is not None:
            raise BadRequestError("--mode interpolate makes a picture: leave --count out")
        if self.mode == "interpolate" and self.seeds and len(parse_numbers(self.seeds, "--seeds")) % 2:
            raise BadRequestError(f"--mode interpolate goes from seed to seed: --seeds {self.seeds} has an odd number")


@dataclass(frozen=True)
class EvaluateRequest:
    """Options of `ddpm evaluate`; the others follow the run's configuration."""

    run: str
    bucket: str
    checkpoints: str = "latest"
    count: int | None = None
    """The number of samples of each checkpoint; None: `COUNT` or `CPU_COUNT` of `job.evaluation.evaluation_plan`."""
    metrics: str = ""
    """The scores to compute; empty: all that apply."""
    extractor: str = "inception"
    extractor_file: str = ""
    references: int = 50_000
    """The largest number of real images to compare with."""
    repeats: int = 1
    """The number of sample sets, each with other seeds."""
    classes: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the run's section `sample`, by key."""
    slice: str = ""

    def check(self) -> EvaluateRequest:
        """Returns the request if its options are valid.

        Raises:
            BadRequestError: as for a `SampleRequest`, or an unknown metric.
        """
        _ = self.chosen_metrics
        self.sampling.check()
        return self

    @property
    def chosen_metrics(self) -> tuple[str, ...]:
        """The names of the metrics.

        Raises:
            BadRequestError: a metric is unknown.
        """
        if not self.metrics:
            return tuple(METRICS)
        chosen = tuple(dict.fromkeys(word.strip() for word in self.metrics.split(",")))
        for metric in chosen:
            if metric not in METRICS:
                there = f"{did_you_mean(metric, METRICS)} (there are {', '.join(METRICS)})"
                raise BadRequestError(f"--metrics: unknown metric {metric!r:.40}{there}")
        return chosen

    @property
    def sampling(self) -> SampleRequest:
        """The options of the samples to score."""
        return SampleRequest(
            self.run,
            self.bucket,
            self.checkpoints,
            chosen=self.chosen,
            count=self.count or 1,
            classes=self.classes,
            slice=self.slice,
        )


@dataclass(frozen=True)
class EncodeRequest:
    """Options of `ddpm data encode`; `name` is the dataset's."""

    name: str
    bucket: str
    autoencoder: str
    """A folder of diffusers, a path or a URI."""
    size: ImageSize | None = None
    """The size of the images; None: the only one of the dataset."""
    to: str = ""
    """Name of the dataset of latents; empty: the dataset's name with `-latents`."""
    slice: str = ""

    def check(self) -> EncodeRequest:
        """Returns the request with the name of its dataset of latents filled in.

        Raises:
            BadRequestError: an invalid name or slice.
        """
        Slice.parse(self.slice)
        validated_dataset_name(self.name)
        return replace(self, to=validated_dataset_name(self.to or f"{self.name}-latents"))


def chosen_of(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the given options of `ddpm sample` that are keys of the section `sample`."""
    chosen = {key: options[key] for key in SampleConfig.model_fields if options.get(key) is not None}
    if "@" in (guide := str(chosen.get("autoguidance", ""))):
        chosen["autoguidance_run"], _, chosen["autoguidance"] = guide.partition("@")
    return chosen


def check_world_size(processes: int, train: Train) -> None:
    """Checks that this number of processes can share a batch.

    Raises:
        BadConfigError: the batch has fewer images than processes, or fewer slots if they must be exact.
    """
    if processes > train.batch_size:
        shared = f"{processes} processes cannot share train.batch_size={train.batch_size} images"
        raise BadConfigError(f"{shared}: use fewer with --processes N")
    if train.exact and processes > (train.slots or processes):
        shared = f"train.exact=true: {processes} processes cannot share train.slots={train.slots}"
        raise BadConfigError(f"{shared}: use fewer with --processes N, or --set train.exact=null")


def check_output(path: Path) -> None:
    """Checks that a picture can be written to `path`.

    Raises:
        BadRequestError: it does not end in .png, is a folder, or its folder is missing.
    """
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise BadRequestError(f"--output {path}: name a file that ends in .png, in a folder that is there")


def parse_numbers(text: str, option: str) -> list[int]:
    """Parses `"0-3,7"` into `[0, 1, 2, 3, 7]`.

    Raises:
        BadRequestError: the text is another one, or has more than `MAX_NUMBERS` numbers.
    """
    numbers: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", word)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise BadRequestError(
                f"{option} {text!r}: use numbers and ranges such as 0-63 or 1,5,9-12, of up to 18 digits"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if len(numbers) + last - first >= MAX_NUMBERS:
            raise BadRequestError(f"{option} {text!r}: at most {MAX_NUMBERS:,} numbers")
        numbers += range(first, last + 1)
    return numbers

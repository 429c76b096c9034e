"""Requests: the options of commands, with all checks that need no bucket. Errors of usage come before missing inputs.

The docstring of a request is the help of its command. The help imports this module: what takes long is imported late.
"""

import os
import re
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from ddpm.catalogue import EXTRACTORS, METRICS, Train
from job.data.pack_request import EncodeRequest, PackRequest
from job.exits import BadConfigError, BadRequestError
from job.options import (
    SAMPLE_SETTINGS,
    BucketUri,
    Checkpoints,
    Dataset,
    LaunchedOptions,
    NetworkFile,
    OnTarget,
    Option,
    Preset,
    Request,
    RunOption,
    Sets,
    SettingsFile,
    Size,
    SliceOption,
    Targets,
    option,
)
from job.own_code import named_network

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
MAX_NUMBERS = 10_000
MAX_COUNT = 25_600_000
"""The largest `--count`: the five digits in the name of a piece allow 100,000 pieces of 256 images."""

_OWN_SAMPLER = re.compile(r"[A-Za-z_][\w.]{0,99}:[A-Za-z_]\w{0,99}", re.ASCII)
_REPOSITORY = r"(?a:(?!.*(?:--|\.\.|\.git$))\w[\w.-]*/\w[\w.-]*)"
"""The names of the hub's repositories; huggingface_hub.utils.validate_repo_id."""


@dataclass(frozen=True)
class TrainRequest(LaunchedOptions):
    """Train a run, or resume it: the same command does both.

    The command continues from the newest intact checkpoint, on every GPU of the machine. Ctrl-C saves, and exits
    with 75.

    Examples:

        ddpm train --dataset celeba --bucket gs://my-bucket

        ddpm train --dataset mine --epochs 200 --set train.batch_size=64

        ddpm train --dataset mine --epochs 20 --from celeba@490 --set train.learning_rate=2e-5

        ddpm train --dataset mine --run wide --network mynet.py:MyNet --set network.width=96
    """

    command = ("train",)
    dataset: Dataset
    _: KW_ONLY
    run: str = option("--run NAME", "Default: the dataset's name.")
    epochs: int | None = option("--epochs N", "Train up to this epoch, counted from the start of the run.", None, min=1)
    from_: str | None = option(
        "--from RUN[@EPOCH]",
        "Begin a new run with the weights of another: a name, or a URI such as gs://theirs/runs/celeba@490.",
        None,
    )
    weights: str = option("--weights NAME", "For --from: ema, ema-STD, model. Default: ema.")
    preset: Preset = ""
    network: NetworkFile = ""
    sets: Sets = ()
    config_file: SettingsFile = None
    tracker: str = option("--tracker NAME", "Also send the metrics to wandb or mlflow; none: stop sending.")
    wait_seconds: float = option("--wait SECONDS", "Wait this long if another process holds the run.", 0.0, min=0)
    open_page: bool = option(
        "--open", "Open the run's page in a browser: it reloads itself, unless its bucket is remote.", False
    )
    changes: dict[str, Any] = field(default_factory=dict)
    """The settings of a checked request that differ from its preset, by key."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Those of a network of the user in a new run, by key."""

    def check(self) -> Self:
        """Returns the request with its run named and its changes parsed.

        Raises:
            BadRequestError, BadConfigError, MissingInputError: see the message.
        """
        from job.config import draft, parse_sets, read_config_file
        from job.data.shards import validated_dataset_name
        from job.runs.records import validated_run_name

        validated_dataset_name(self.dataset)
        run = validated_run_name(self.run or self.dataset.replace(".", "-").replace("_", "-"))
        changes, defaults = read_config_file(self.config_file) | parse_sets(self.sets), dict[str, Any]()
        if self.epochs is not None:
            changes["train.epochs"] = self.epochs
        if self.tracker:
            changes["log.tracker"] = self.tracker
        if self.network:
            own = named_network(self.network, self.bucket)
            changes, defaults = changes | own.section(changes), own.defaults
        elif unknown := [key for key in changes if key.startswith("network.")]:
            raise BadConfigError(f"{unknown[0]} is a setting of a network of yours: name it by --network FILE:CLASS")
        changes |= (parent := self._parent())
        if parent.get("parent.run") == run:
            raise BadRequestError(
                f"--from {self.from_}: run {run!r} would be its own parent: name the new one with --run"
            )
        if not parent:
            # Otherwise a setting may be one of the parent's network, which is not known yet.
            draft(self.preset_name(), defaults | changes)
        return replace(self, run=run, changes=changes, defaults=defaults)

    def preset_name(self, default: str | None = None) -> str:
        """Returns the preset of the option, else the one named like the dataset, else the default."""
        from job.config import EMBEDDED, preset_names

        default = EMBEDDED if default is None else default
        return self.preset or (self.dataset if self.dataset in preset_names() else default)

    def _parent(self) -> dict[str, Any]:
        """Returns the keys of the section `parent` that `--from` and `--weights` give."""
        from job.config.schema import SampleConfig
        from job.runs.records import split_run
        from job.store import is_remote

        if self.from_ is None:
            if self.weights:
                raise BadRequestError("--weights chooses among the weights of a parent: add --from RUN[@EPOCH]")
            return {}
        # No message repeats a URI with a user or a signature in it.
        if not (match := re.fullmatch("([^@?]+?)/*(?:@(?:latest|([0-9]{1,9})))?", self.from_)):
            raise BadRequestError("--from: use RUN[@EPOCH], such as celeba@490 or gs://theirs/runs/celeba@490")
        run, name, chosen = match[1], match[1], {"weights": self.weights or "ema"}
        if "/" in run:
            _, name = split_run(run)
            # One folder has one name, from wherever the same command is typed.
            run = run if is_remote(run) else os.path.normpath(Path(run.removeprefix("file://")).expanduser().absolute())
        SampleRequest(name, chosen=chosen).check()
        epoch = {"parent.epoch": int(match[2])} if match[2] else {}
        return {"parent.run": run, "parent.weights": SampleConfig.model_validate(chosen).weights, **epoch}


@dataclass(frozen=True)
class SampleRequest(LaunchedOptions):
    """Sample images from a run's checkpoints.

    An image depends only on the checkpoint, the options and its seed. The section `sample` of the run's configuration
    has the defaults; the name of a picture lists the differences from them. Each checkpoint gets a grid in the run's
    folder in the bucket. Several checkpoints also get one picture with a row for each.

    --count saves the images themselves, in pieces of up to 256. The same command resumes an interrupted one, also with
    other --slice or --processes, and makes no committed piece twice. While the run still trains, give an epoch,
    because `latest` changes with the next checkpoint.

    Examples:

        ddpm sample --run celeba --checkpoints 30,80,490 --seeds 0-63

        ddpm sample --run celeba --sampler ddpm --steps 1000 --gif

        ddpm sample --run celeba --checkpoints 490 --count 50000 --slice 0/4

        ddpm sample --run celeba --mode inpaint --image 0-3 --mask half
    """

    command = ("sample",)
    run: RunOption
    _: KW_ONLY
    checkpoints: Checkpoints = "latest"
    seeds: str = option("--seeds LIST", "One image per seed, such as 0-63 or 1,5,9-12.")
    chosen: Annotated[dict[str, Any], SAMPLE_SETTINGS] = field(default_factory=dict)
    """Values that replace those of the run's section `sample`, by key."""
    classes: str = option(
        "--classes LIST",
        "Names or numbers, such as forest,coast. The seeds take them in turn. Default: all classes.",
    )
    autoguidance: str | None = option(
        "--autoguidance [RUN@]EPOCH", "Guide away from this weaker checkpoint, such as 30.", None
    )
    mode: str = option(
        "--mode NAME", "inpaint, img2img, invert or interpolate. Default: new images.", choices=(*MODES,)
    )
    image: str = option("--image LIST|FILE", "Image numbers in the dataset, such as 0-3, or a file.")
    mask: str = option("--mask NAME|FILE", "Part to replace: half, centre, or the white of a file.")
    resamplings: int | None = option(
        "--resamplings N", "Passes of inpaint over each stretch of ten steps. Default: 10.", None, min=1, max=1000
    )
    condition: str = option(
        "--condition FILE|FOLDER",
        "Pictures for a run with condition images; the seeds take them in turn. Default: the held-out images.",
    )
    vector: str = option(
        "--vector NUMBERS",
        "Numbers for a run with vectors, such as 35,0.5; a row from one to another, such as 20,0.5:60,0.5.",
        pattern="[^:]+(:[^:]+)?",
    )
    vectors: str = option("--vectors FILE", "CSV file with a vector in each line; the seeds take them in turn.")
    then: str = option(
        "--then RUN[@EPOCH]", "Make each image the condition image of this run, by seed.", pattern="[^@]+(@[0-9]{1,9})?"
    )
    strength: float | None = option(
        "--strength 0..1", "Share of the steps to take. Default: img2img 0.6, invert 1.", None, min=0.001, max=1
    )
    gif: bool = option("--gif", "Also make a GIF of the denoising of the first 12 seeds.", False)
    nearest: bool | None = option(
        "--nearest/--no-nearest", "Show the nearest training image beside each sample, or not.", None
    )
    show: str = option("--show LIST", "Channels that pictures show as red, green and blue, such as 3,2,1; or one.")
    batch_size: int | None = option("--batch-size N", "Images at once on each process.", None, min=1)
    count: int | None = option("--count IMAGES", "Save this many images, one per seed.", None, min=1, max=MAX_COUNT)
    save: str = option(
        "--save KIND", "Format for --count: shards (tar files; the default) or png.", choices=("shards", "png")
    )
    network: NetworkFile = ""
    slice: SliceOption = ""
    first_seed: int | None = option(
        "--first-seed K", "Seed of the first image for --count. Default: 0.", None, min=0, max=10**17
    )

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
        named |= {"--condition": self.condition, "--vectors": self.vectors}
        return {option: name for option, name in named.items() if name}

    @property
    def keys(self) -> dict[str, Any]:
        """The values that replace those of the run's section `sample`, in the form of a configuration."""
        keys = self.chosen | ({"sampler": "own"} if self.custom_sampler else {})
        if self.autoguidance is not None:
            run, at, epoch = self.autoguidance.partition("@")
            keys |= {"autoguidance_run": run, "autoguidance": epoch} if at else {"autoguidance": run}
        others = {"nearest": self.nearest, "batch_size": self.batch_size, "show": self.show or None}
        return keys | {key: value for key, value in others.items() if value is not None}

    def check(self) -> Self:
        """Returns the request if its options are valid.

        Raises:
            BadRequestError: an unknown sampler or precision, an invalid list, or options that exclude each other.
        """
        from pydantic import ValidationError

        from job.config.schema import SampleConfig, nearest_name
        from job.coordination.pieces import Slice
        from job.runs.records import validated_run_name

        validated_run_name(self.run)
        if self.network:
            named_network(self.network, self.bucket)
        try:
            SampleConfig(**self.keys)
        except ValidationError as error:
            first = error.errors()[0]
            name, what = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
            given = f"--{name.replace('_', '-')} {self.keys[name]!r}"
            raise BadRequestError(f"{given}: {what.lower()}{nearest_name(first)}") from None
        sampler = self.chosen.get("sampler")
        if sampler == "own" or (self.custom_sampler and not _OWN_SAMPLER.fullmatch(self.custom_sampler)):
            raise BadRequestError(f"--sampler {sampler!r}: name yours as module:function, such as mysamplers:walk")
        if self.seeds:
            parse_numbers(self.seeds, "--seeds")
        for name, why in self._unfit().items():
            if (value := getattr(self, name)) not in (None, "") and value is not False:
                raise BadRequestError(f"--{name.replace('_', '-')} {why}")
        if "image" in MODES.get(self.mode, ()) and not self.image:
            raise BadRequestError(f"--mode {self.mode} needs --image: numbers in the dataset such as 0-3, or a file")
        if self.mode == "interpolate" and self.seeds and len(parse_numbers(self.seeds, "--seeds")) % 2:
            raise BadRequestError(f"--mode interpolate goes from seed to seed: --seeds {self.seeds} has an odd number")
        Slice.parse(self.slice)
        return self

    def _unfit(self) -> dict[str, str]:
        """Returns the options that the mode and `--count` exclude, each with the reason."""
        unfit = {}
        for name in ("image", "mask", "resamplings", "strength"):
            if name not in MODES.get(self.mode, ()) and not (name == "mask" and self.condition):
                modes = " and ".join(mode for mode, names in MODES.items() if name in names)
                unfit[name] = f"is an option of --mode {modes}: leave it out, or choose one"
        if self.mode:
            unfit |= dict.fromkeys(("gif", "nearest"), "works only for new images: leave it out, or --mode")
        if self.then:
            unfit["mode"] = "makes no condition images: leave it out, or leave --then out"
            if ":" in self.vector:
                unfit["vector"] = "of a row makes no condition images: use --vectors, or leave --then out"
        if self.vector and self.vectors:
            unfit["vectors"] = "and --vector exclude each other: leave one out"
        if self.count is None and not (self.save and (self.condition or self.vectors)):
            why = "works only with --count: add the number of images"
            return unfit | dict.fromkeys(("save", "slice", "first_seed"), why)
        if self.mode == "interpolate":
            unfit["mode"] = "interpolate makes a picture: leave --count out"
        why = "makes pictures: leave it out, or --count, which takes --first-seed"
        return unfit | dict.fromkeys(("seeds", "gif", "nearest"), why)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(SampleRequest):
    """Score samples of a run against real images, such as by FID.

    The scores are FID, KID, precision, recall, density, coverage, MIND, inception score and bits per dimension. The
    command samples like `ddpm sample`, on all GPUs, but saves no image. The same command resumes an interrupted one.
    With --slice several machines share the work.

    Beside each score the command prints the score of real images against other real images, and the protocol: crop,
    filter, count and network change a score more than most methods do. The features of the real images are kept with
    the dataset, for all runs on it.

    Without --count it scores 5,000 samples, or 500 on a CPU.

    `make setup EXTRAS=evaluate` installs what scores need. Jobs read the weights of the networks from the folder
    extractors/ of the bucket.

    Examples:

        ddpm evaluate --run celeba --checkpoints 30,80,490

        ddpm evaluate --run celeba --count 50000 --sampler ddpm --steps 1000

        ddpm evaluate --run mine --count 1000 --extractor mobilenet --repeats 3
    """

    command = ("evaluate",)
    option_names: ClassVar = (
        "run checkpoints count metrics extractor extractor_file references repeats chosen classes batch_size network "
        "slice processes hang_after_seconds stop_after bucket"
    )
    count: int | None = option("--count IMAGES", "Samples to score, per checkpoint.", None, min=1, max=1_000_000)
    """None: `COUNT` or `CPU_COUNT` of `job.evaluation.evaluation_plan`."""
    metrics: str = option(
        "--metrics LIST",
        f"Some of {','.join(METRICS)}. Default: all that can be computed.",
        pattern=r" *({0}) *(, *({0}) *)*".format("|".join(METRICS)),
    )
    extractor: str = option(
        "--extractor NAME", f"One of {', '.join(EXTRACTORS)}.", "inception", choices=tuple(EXTRACTORS)
    )
    extractor_file: str = option(
        "--extractor-file PATH|URI", "Weights of that network, if no package and no bucket has them."
    )
    references: int = option(
        "--references IMAGES", "Largest number of real images to compare with.", 50_000, min=1, max=1_000_000
    )
    repeats: int = option("--repeats N", "Sample sets with other seeds, to measure the spread.", 1, min=1, max=100)

    def check(self) -> Self:
        """Returns the request if its options are valid.

        Raises:
            BadRequestError: as for a `SampleRequest`.
        """
        SampleRequest.check(self.sampling)
        return self

    @property
    def chosen_metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(dict.fromkeys(self.metrics.replace(" ", "").split(","))) if self.metrics else tuple(METRICS)

    @property
    def sampling(self) -> Self:
        """The request of the samples to score."""
        return replace(self, count=self.count or 1)


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


def parse_numbers(text: str, option: str) -> list[int]:
    """Parses `"0-3,7"` into `[0, 1, 2, 3, 7]`.

    Raises:
        BadRequestError: the text is another one, or has more than `MAX_NUMBERS` numbers.
    """
    numbers: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", word)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise BadRequestError(f"{option} {text!r}: use numbers and ranges such as 0-63,70, of up to 18 digits")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(numbers) + last - first >= MAX_NUMBERS:
            raise BadRequestError(f"{option} {text!r}: at most {MAX_NUMBERS:,} numbers")
        numbers += range(first, last + 1)
    return numbers


JobRequest = TrainRequest | SampleRequest | EvaluateRequest | PackRequest | EncodeRequest
"""A command that can be a job."""


@dataclass(frozen=True)
class SubmitRequest(Request):
    """The options of `ddpm submit`: where a command becomes a job, and on which machines."""

    command = ()
    on: OnTarget = "local"
    gpus: int | None = option("--gpus N", "GPUs per machine. Default: the target's.", None, min=0, max=64)
    nodes: int = option("--nodes N", "Number of machines that train together.", 1, min=1, max=1000)
    gpu_type: str = option("--gpu-type TYPE", "Type of GPU, such as nvidia-l4. Default: the target's.")
    spot: bool | None = option(
        "--spot/--on-demand", "Use cheap machines that may be preempted, or not. Default: the target's.", None
    )
    max_hours: float | None = option("--max-hours H", "End the job after H hours. Default: the target's.", None)
    slices: int = option("--slices N", "Machines that share the work, such as 8; not for training.", 0, min=0, max=1000)
    targets: Targets = None
    dry_run: bool = option("--dry-run", "Print what would be sent, and send nothing.", False)
    watch: bool = option("--watch", "Wait, and submit again after preemptions, failures or lack of machines.", False)
    yes: bool = option("--yes", "Do not ask for confirmation.", False)
    detach: bool = option("--detach", "Return at once; a local or container job runs in the background.", False)


@dataclass(frozen=True)
class ImportRequest:
    """Make a run from a checkpoint of another program or of this one.

    The command reads folders of diffusers (a UNet2DModel, alone or in a pipeline), the U-Nets of Ho et al. as
    pesser/pytorch_diffusion and the DDIM authors save them, and those of the ddpm of dome272 and ErenGurs. It prefers
    averaged weights. It executes nothing in a file, and refuses a pickle that holds more than tensors.

    Checkpoints and exports of this program bring all settings of their run, and the names of its classes.

    `ddpm sample` works at once. With --dataset, `ddpm train` also continues the training from --epoch. Several
    checkpoints of one training fit into one run.

    Examples:

        ddpm import ddpm-celebahq-256 --run celebahq

        ddpm import gs://bucket/exports/celeba-490 --run fork --dataset celeba

        ddpm import ckpt_80.pt --run landscape --dataset landscape --preset erengurs --epoch 80
    """

    source: Annotated[str, Option("PATH|URI", "Folder of diffusers, or a .pt, .ckpt or .safetensors file.")]
    _: KW_ONLY
    run: RunOption
    dataset: str = option("--dataset NAME", "Packed dataset for further training. Default: no training.")
    size: Size = None
    """Of the images, if the checkpoint does not state it."""
    epoch: int = option("--epoch N", "Epoch of the dataset after which the file was saved.", 0, min=0, max=1_000_000)
    preset: str = option("--preset NAME", "Settings that the file lacks, or that replace its own, such as erengurs.")
    sets: tuple[str, ...] = option("--set KEY=VALUE", "Such as train.batch_size=64; may be repeated.", ())
    bucket: BucketUri = ""

    def check(self) -> dict[str, Any]:
        """Returns the settings of `--set` by dotted keys, if the other options are valid.

        Raises:
            BadRequestError: an invalid name, or an epoch without a dataset.
            BadConfigError: an invalid setting.
        """
        from job.config import parse_sets
        from job.data.shards import validated_dataset_name
        from job.runs.records import validated_run_name

        validated_run_name(self.run)
        if self.dataset:
            validated_dataset_name(self.dataset)
        elif self.epoch:
            raise BadRequestError("--epoch counts the epochs of a dataset: name it with --dataset")
        return parse_sets(self.sets)


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Request):
    """Write a checkpoint for diffusers, or push it to the hub.

    Every checkpoint of a unet is a folder for diffusers already, with the settings of its run and the names of its
    classes. An export adds a README.md with sample code, leaves out the state of the training, and can hold other
    weights. The command refuses a network that diffusers lacks.

    --push makes one commit with all files, and a new repository is private. The token is that of `hf auth login`, or of
    the variable HF_TOKEN.

    Examples:

        ddpm export --run celeba --checkpoint 490 --to celeba-490

        ddpm export --run celeba --checkpoint 490 --push my-name/celeba
    """

    command = ("export",)
    run: RunOption
    to: str = option("--to DIR|URI", "New or empty folder; a path or a URI.")
    push: str = option(
        "--push ORG/NAME",
        "In place of --to: a model repository of the hub, new or pushed to, such as my-name/celeba.",
        pattern=_REPOSITORY,
    )
    checkpoint: str = option(
        "--checkpoint EPOCH", "Epoch, such as 80, or latest.", "latest", pattern="[0-9]{1,9}|latest"
    )
    weights: str = option("--weights NAME", "ema, ema-STD or model. Default: the run's sample.weights.")
    bucket: BucketUri = ""

    def check(self) -> None:
        """Checks what can be checked without the bucket.

        Raises:
            BadRequestError: both or none of `to` and `push`.
        """
        if bool(self.to) == bool(self.push):
            raise BadRequestError("give either --to FOLDER or --push ORG/NAME")

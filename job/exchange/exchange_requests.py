"""The requests of `ddpm import` and `ddpm export`, see `job.requests`."""

import re
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from job.exits import BadRequestError
from job.options import BucketUri, Option, RunOption, Size, option

_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""The names of the hub's repositories; huggingface_hub.utils.validate_repo_id."""


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
class ExportRequest:
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

    run: RunOption
    to: str = option("--to DIR|URI", "New or empty folder; a path or a URI.")
    push: str = option("--push ORG/NAME", "In place of --to: a model repository of the hub, new or pushed to.")
    checkpoint: str = option("--checkpoint EPOCH", "Epoch, such as 80, or latest.", "latest")
    weights: str = option("--weights NAME", "ema, ema-STD or model. Default: the run's sample.weights.")
    bucket: BucketUri = ""

    def check(self) -> None:
        """Checks what can be checked without the bucket.

        Raises:
            BadRequestError: both or none of `to` and `push`, the repository has no valid name, or the checkpoint is
                neither an epoch nor `latest`.
        """
        if bool(self.to) == bool(self.push):
            raise BadRequestError("give either --to FOLDER or --push ORG/NAME")
        if self.push and not _REPOSITORY.fullmatch(self.push):
            raise BadRequestError(f"--push {self.push!r}: use ORG/NAME, such as my-name/celeba")
        if not re.fullmatch("[0-9]{1,9}", self.checkpoint) and self.checkpoint != "latest":
            raise BadRequestError(f"--checkpoint {self.checkpoint!r}: use an epoch such as 80, or latest")

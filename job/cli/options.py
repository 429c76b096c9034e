"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from ddpm.image_size import ImageSize
from job.cli import completion


def usual_bucket(context: typer.Context, given: str = "") -> str:
    """Returns the bucket of a command: the given one, else the usual one of its target, else that of `local`."""
    if given:
        # As in all jobs and ranks: spares the imports.
        return given
    from job.jobs.targets import target_on

    return target_on(context.params.get("on") or "local", context.params.get("targets")).usual_bucket


BucketUri = Annotated[
    str,
    typer.Option(
        metavar="URI",
        callback=usual_bucket,
        help="Bucket of datasets and runs: a folder, or a URI such as gs://NAME[/PREFIX]. "
        "Default: DDPM_BUCKET, else the target's, else ./bucket.",
    ),
]
RunOption = Annotated[
    str, typer.Option(metavar="NAME", help="Name of the run, such as celeba.", autocompletion=completion.runs)
]
Dataset = Annotated[
    str,
    typer.Option(metavar="NAME", help="Name of a packed dataset, such as celeba.", autocompletion=completion.datasets),
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Settings to start from. Default: the preset named like the dataset, else landscape-sample.",
        autocompletion=completion.presets,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting, such as train.batch_size=64; may be repeated. `ddpm config --list` has all keys.",
        autocompletion=completion.keys,
    ),
]
SettingsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with settings; --set overrides it.")]


def _size(text: str) -> ImageSize:
    from job.config import image_size

    try:
        return image_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text:.40}: {error}") from None


Size = Annotated[
    ImageSize | None,
    typer.Option(metavar="PIXELS", parser=_size, help="Width and height of the images, such as 64 or 96x64."),
]
Checkpoints = Annotated[
    str, typer.Option(metavar="LIST", help="Checkpoints by epoch, such as 30,80,490; or latest, or all.")
]
SampledClasses = Annotated[
    str,
    typer.Option(
        "--classes",
        "--class",
        metavar="LIST",
        help="Names or numbers, such as forest,coast. The seeds take them in turn. Default: all classes.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Images at once on each process.")]
Processes = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=64, help="Number of processes. Default: one per GPU, else one.")
]
HangAfter = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0, help="Exit with 71 after this time without progress; 0: never."),
]
StopAfter = Annotated[
    str,
    typer.Option(
        metavar="DURATION",
        help="Save and exit with 75 after this time, such as 1h30m. For a job it sets --max-hours.",
    ),
]
SliceOption = Annotated[
    str,
    typer.Option("--slice", metavar="I/N", help="Share the work among N machines; this is machine I, counted from 0."),
]
OnTarget = Annotated[
    str,
    typer.Option(
        metavar="TARGET",
        help="Where to run: local, container, or a name in the targets file.",
        autocompletion=completion.targets,
    ),
]
Targets = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Targets file. Default: that of DDPM_TARGETS, else ./targets.yaml.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Certain = Annotated[bool, typer.Option("--yes", help="Delete. Without --yes: only print what would be deleted.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FORMAT", help="Format of --dry-run: yaml or json.")]

DEFAULT_HANG_AFTER = 600.0

"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from job.cli import completion

BucketUri = Annotated[
    str,
    typer.Option(
        metavar="URI",
        envvar="DDPM_BUCKET",
        help="Where datasets and runs lie: a folder, or a URI such as gs://NAME[/PREFIX].",
        show_envvar=True,
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
        help="Settings to begin with. Default: the dataset's own, else the small one.",
        autocompletion=completion.presets,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, such as train.batch_size=64; `ddpm config --list` has all.",
        autocompletion=completion.keys,
    ),
]
SettingsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A YAML file with settings.")]
Size = Annotated[int | None, typer.Option(metavar="PIXELS", min=1, max=4096, help="Height and width of the images.")]
Checkpoints = Annotated[str, typer.Option(metavar="LIST", help="Epochs such as 30,80,490, or latest, or all.")]
Sampler = Annotated[str | None, typer.Option(metavar="NAME", help="Such as ddpm, ddim, unipc; or module:function.")]
Steps = Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of sampling steps.")]
GridOfPoints = Annotated[
    str | None, typer.Option(metavar="NAME", help="trailing, leading, linspace, quadratic, karras, log_snr or found.")
]
Guidance = Annotated[
    float | None, typer.Option(metavar="W", min=0, help="Guidance scale, such as 2; 1 turns guidance off.")
]
SampledClasses = Annotated[
    str,
    typer.Option(
        "--classes",
        "--class",
        metavar="LIST",
        help="Names or numbers, such as forest,coast; of n, seed k has number k mod n. Default: all.",
    ),
]
Weights = Annotated[str | None, typer.Option(metavar="NAME", help="ema, ema-STD (averages) or model (raw).")]
Precision = Annotated[str | None, typer.Option(metavar="NAME", help="fp32 or bf16.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Images at a time and process.")]
Processes = Annotated[int | None, typer.Option(metavar="N", min=1, max=64, help="Default: one per GPU, or one.")]
HangAfter = Annotated[
    float, typer.Option(metavar="SECONDS", min=0, help="End with 71 after so long without progress; 0: never.")
]
StopAfter = Annotated[
    str, typer.Option(metavar="DURATION", help="Save, and end with 75 after so long, such as 1h30m; a job for good.")
]
SliceOption = Annotated[
    str, typer.Option("--slice", metavar="I/N", help="Share the work of N machines: this one is I, from 0.")
]
OnTarget = Annotated[
    str,
    typer.Option(
        metavar="TARGET",
        help="Where: local, container, or a name of the file.",
        autocompletion=completion.targets,
    ),
]
Targets = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Default: that of DDPM_TARGETS, else ./targets.yaml.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Certain = Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FORMAT", help="yaml or json.")]

DEFAULT_HANG_AFTER = 600.0

"""`ddpm config`."""

from typing import Annotated

import typer

from job.cli.options import AsJson, Preset, Sets, SettingsFile


def ddpm_config(
    preset: Preset = "",
    sets: Sets = None,
    config: SettingsFile = None,
    list_all: Annotated[bool, typer.Option("--list", help="All keys, with what each takes and is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a new run would get, key by key, and where each value comes from.

    preset ← --config FILE ← --set; what follows the dataset is not known before there is one.

    Examples:

        ddpm config --list

        ddpm config --preset celeba --set train.batch_size=64
    """
    from job.report.settings import list_keys, show_config
    from job.requests import TrainRequest

    if list_all:
        list_keys(as_json=as_json)
    else:
        show_config(TrainRequest("", "", preset=preset, sets=tuple(sets or ()), config_file=config), as_json=as_json)

"""`ddpm config`."""

from typing import Annotated

import typer

from job.cli.options import AsJson, Preset, Sets, SettingsFile


def ddpm_config(
    preset: Preset = "",
    sets: Sets = None,
    config: SettingsFile = None,
    list_all: Annotated[bool, typer.Option("--list", help="List all keys with their values and meanings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the configuration of a new run, and the source of each value.

    --set overrides --config FILE, which overrides the preset. The dataset sets some more values, such as data.size.

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

"""`ddpm config`."""

from typing import Annotated

import typer

from job.cli.options import AsJson, Preset, Sets, SettingsFile


def ddpm_config(
    begin: Annotated[
        str, typer.Argument(metavar="KEYS", help="Only the keys that begin so, such as train or train.adam.")
    ] = "",
    preset: Preset = "",
    sets: Sets = None,
    config: SettingsFile = None,
    list_all: Annotated[bool, typer.Option("--list", help="List all keys with their values and meanings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the configuration of a new run, or with --list all keys.

    The column `from` has the source of each value. --set overrides --config FILE, which overrides the preset. The
    dataset sets some more values, such as data.size.

    Examples:

        ddpm config --list

        ddpm config --list train

        ddpm config --preset celeba --set train.batch_size=64
    """
    from job.config.resolve import list_keys, show_config

    if list_all:
        list_keys(begin, as_json=as_json)
    else:
        show_config(preset, sets or (), config, begin, as_json=as_json)

"""Names the words to type instead of those that other programs take, such as `--lr` and `--output_dir`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from typer.core import TyperGroup

from job.exits import BadRequestError, Exit

_SAME = {
    "checkpoint": "checkpoints",
    "dataset_name": "dataset",
    "guidance_scale": "guidance",
    "image_size": "data.size",
    "init_from": "from_",
    "labels": "classes",
    "lr": "train.learning_rate",
    "max_epochs": "epochs",
    "mixed_precision": "train.precision",
    "num_epochs": "epochs",
    "num_images": "count",
    "num_inference_steps": "steps",
    "num_processes": "processes",
    "num_samples": "count",
    "num_train_epochs": "epochs",
    "output_dir": "bucket",
    "pretrained_model_name_or_path": "from_",
    "resolution": "data.size",
    "seed": "seeds",
    "train_data_dir": "dataset",
}
"""The option or the key of this program for an option of others, by its name with underscores."""
_RESUMES = ("resume", "resume_from", "resume_from_checkpoint")


class Commands(TyperGroup):
    """The group of all commands, whose usage errors name the words to type instead, if these are known."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command.

        Raises:
            BadRequestError: its words are wrong, and others are known; the exit code is that of a usage error.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:
            context = getattr(error, "ctx", None)
            if context is not None and (said := _instead(error, context, sys.argv[1:], self)):
                raise BadRequestError(said, Exit.USAGE) from None
            raise


def _instead(error: Any, context: Any, words: list[str], root: Any) -> str:
    """Returns the words to type instead of those of a usage error, as a message; empty if none are known."""
    for option, key, value in zip(words, words[1:], words[2:], strict=False):
        if option == "--set" and "=" not in key and not value.startswith("-"):
            return f"--set {key} {value}: type --set {shlex.quote(f'{key}={value}')}"
    # Only the error about an unknown option has `possibilities`, and only that about a missing one `param_type`.
    if hasattr(error, "possibilities"):
        typed = _typed_instead(error.option_name, context.command.params, words, root.commands["data"].commands)
        return typed and f"{context.command_path} has no option {error.option_name}: {typed}"
    if match := re.match("No such command '([^']+)'", error.message):
        others = " or ".join(_commands_named(match[1], root))
        return others and f"{context.command_path} has no command {match[1]}: type {others}"
    params = context.command.params
    takes_arguments = any(each.param_type_name == "argument" for each in params)
    if not takes_arguments and (hasattr(error, "param_type") or "extra argument" in error.message):
        wanted = getattr(error, "param", None) or next(
            (each for each in params if each.name in ("run", "dataset")), None
        )
        name = context.info_name.split()[-1]
        after = words[words.index(name) + 1 :][:1] if name in words else []
        if wanted and after and not after[0].startswith("-"):
            return f"{context.command_path} takes only options: type {wanted.opts[0]} {shlex.quote(after[0])}"
    return ""


def _commands_named(name: str, group: Any, path: str = "ddpm") -> Iterator[str]:
    """Yields the words of each command of this name in a group and the groups below."""
    for each, command in getattr(group, "commands", {}).items():
        if each == name:
            yield f"{path} {each}"
        yield from _commands_named(name, command, f"{path} {each}")


def _typed_instead(option: str, params: list[Any], words: list[str], of_data: dict[str, Any]) -> str:
    name = option.lstrip("-").replace("-", "_")
    if name in _RESUMES and any(each.name == "sets" for each in params):
        return "leave it out, the same command resumes a run"
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    values += [after for word, after in pairwise(words) if word == option and not after.startswith("-")]
    value, names = shlex.quote(values[0]) if values else "", (name, _SAME.get(name))
    for each in params:
        if each.name in names and each.param_type_name == "argument":
            return f"type {value or name.upper()} without it"
        if each.name in names:
            return f"type {each.opts[0]} {value}".rstrip()
    packing = _of_packing(option.replace("_", "-"), value, of_data)
    keys = _keys_named(names) if any(each.name == "sets" for each in params) else []
    # Many settings of training have namesakes that concern its pictures.
    keys = [key for key in keys if key.startswith("train.")] or keys
    if packing:
        keys = [key for key in keys if not key.startswith("sample.")]
    typed = "type " + " or ".join(f"--set {key}={value or 'VALUE'}" for key in keys) if keys else ""
    return "; ".join(filter(None, (packing, typed)))


def _keys_named(names: tuple[str | None, ...]) -> list[str]:
    """Returns the keys of these names, with or without a section, that `--set` takes."""
    from job.config import CHOSEN_ELSEWHERE, known_keys

    return [key for key in known_keys() if key not in CHOSEN_ELSEWHERE and {key, key.rpartition(".")[2]} & {*names}]


def _of_packing(option: str, value: str, of_data: dict[str, Any]) -> str:
    """Returns the words about an option of `ddpm data pack`; empty for any other."""
    found = [each for each in of_data["pack"].params if option in (*each.opts, *each.secondary_opts)]
    if not found:
        return ""
    # `make submit-train` packs with `ddpm data ensure`, which has fewer options.
    verb = "make" if any(each.name == found[0].name for each in of_data["ensure"].params) else "make pack"
    typed = option if found[0].is_flag else f"{option} {value}".rstrip()
    return f"it is an option of `ddpm data pack` ({verb}: PACK={shlex.quote(typed)})"

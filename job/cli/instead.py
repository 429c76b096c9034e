"""Names the words to type instead of those that other programs take, such as `--lr` and `--output_dir`."""

from __future__ import annotations

import shlex
import sys
from itertools import pairwise
from typing import Any

from typer.core import TyperGroup

from job.exits import BadRequestError, Exit

_SAME = {
    "checkpoint": "checkpoints",
    "ckpt": "checkpoints",
    "data_dir": "dataset",
    "dataset_name": "dataset",
    "gpus": "processes",
    "guidance_scale": "guidance",
    "image_size": "data.size",
    "lr": "train.learning_rate",
    "max_epochs": "epochs",
    "mixed_precision": "train.precision",
    "name": "run",
    "num_epochs": "epochs",
    "num_images": "count",
    "num_inference_steps": "steps",
    "num_processes": "processes",
    "num_samples": "count",
    "num_train_epochs": "epochs",
    "output_dir": "bucket",
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
            if context is not None and (said := _instead(error, context, sys.argv[1:])):
                raise BadRequestError(said, Exit.USAGE) from None
            raise


def _instead(error: Any, context: Any, words: list[str]) -> str:
    """Returns the words to type instead of those of a usage error, as a message; empty if none are known."""
    for option, key, value in zip(words, words[1:], words[2:], strict=False):
        if option == "--set" and "=" not in key and not value.startswith("-"):
            return f"--set {key} {value}: type --set {shlex.quote(f'{key}={value}')}"
    # Only the error about an unknown option has `possibilities`, and only that about a missing one `param_type`.
    if hasattr(error, "possibilities"):
        typed = _typed_instead(error.option_name, context.command.params, words)
        return typed and f"{context.command_path} has no option {error.option_name}: {typed}"
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


def _typed_instead(option: str, params: list[Any], words: list[str]) -> str:
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
    if not any(each.name == "sets" for each in params):
        return ""
    from job.config import known_keys

    keys = [key for key in known_keys() if key in names or key.rpartition(".")[2] in names]
    # Many settings of training have namesakes that concern its pictures.
    keys = [key for key in keys if key.startswith("train.")] or keys
    return "type " + " or ".join(f"--set {key}={value or 'VALUE'}" for key in keys) if keys else ""

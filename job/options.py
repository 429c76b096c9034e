"""Options of commands. A request declares each once, as a field: help, parser and words of a job follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import Parameter, get_annotations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from ddpm.catalogue import SampleOptions, takers
from ddpm.image_size import ImageSize

R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """An option or an argument of a command, as metadata of the type of a field or a parameter.

    Attributes:
        words: as the help shows them, such as `--slice I/N`, `--output -o PNG` or `--clip/--no-clip`; an argument has
            no dash, such as `SOURCE`.
        help: its meaning.
        min: the smallest number.
        max: the largest number.
        choices: names that a shell completes.
        pattern: a regular expression of the whole value, of which `help` gives examples.
    """

    words: str
    help: str
    min: float | None = None
    max: float | None = None
    choices: Sequence[str] = ()
    pattern: str = ""

    @property
    def flags(self) -> list[str]:
        """The words with a dash; none for an argument."""
        return [word for word in self.words.split() if word.startswith("-")]

    @property
    def metavar(self) -> str | None:
        """The word that stands for the value; None for an option without one."""
        last = self.words.split()[-1]
        return None if last.startswith("-") else last


def option(words: str, help: str, default: Any = "", **limits: Any) -> Any:
    """Returns a field of a request that is an option of its own; one that requests share is a type such as `Size`."""
    return field(default=default, metadata={"option": Option(words, help, **limits)})


def options_of(kind: type) -> dict[str, tuple[Parameter, ...]]:
    """Returns the options of a request by field, in the order of its help, as parameters of a function.

    These are its own, then those that it inherits; a class whose command does not take all of them lists them in
    `option_names`. A field of several options, such as `SAMPLE_SETTINGS`, is a dictionary of those that were given.
    """
    by_name = {each.name: each for each in fields(kind)}
    own_first = [name for base in kind.__mro__ for name in get_annotations(base) if name in by_name]
    found: dict[str, tuple[Parameter, ...]] = {}
    for name in getattr(kind, "option_names", "").split() or own_first:
        each: Any = by_name[name]
        takes, *shared = get_args(each.type) if get_origin(each.type) is Annotated else [each.type]
        match [*each.metadata.values(), *shared]:
            case [Option() as one]:
                default = Parameter.empty if each.default is MISSING else each.default
                found[name] = (_parameter(name, default, takes, one),)
            case [tuple() as several]:
                found[name] = several
    return found


def _parameter(name: str, default: Any, takes: Any, option: Option) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[takes, option])


def request_of(kind: type[R], values: Mapping[str, Any]) -> R:
    """Returns the request that parsed options make."""
    given: dict[str, Any] = {}
    for name, options in options_of(kind).items():
        if name in values:
            given[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        else:
            given[name] = {each.name: values[each.name] for each in options if values[each.name] is not None}
    return kind(**given)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)


def _setting(setting: Field[Any]) -> Parameter:
    """Returns the option of a setting that the catalogue lists."""
    takes, *metadata = get_args(setting.type)
    sentence = next(part for part in metadata if isinstance(part, str))
    choices = get_args(takes) if get_origin(takes) is Literal else ()
    only = f" Only for {', '.join(takers(setting.name))}." if takers(setting.name) else ""
    one_of = f" One of {', '.join(choices)}." if choices else ""
    name, typed = setting.name.replace("_", "-"), takes if takes in (bool, int, float) else str
    value = {bool: f"/--no-{name}", int: " N", float: " X"}.get(takes, " NAME" if choices or takes is str else " A,B")
    named = Option(f"--{name}{value}", f"{sentence[0].upper()}{sentence[1:]}.{only}{one_of}", choices=choices)
    return _parameter(setting.name, None, typed | None, named)


_HAVE_OTHER_OPTIONS = ("autoguidance", "autoguidance_run", "labels")
SAMPLE_SETTINGS = tuple(_setting(each) for each in fields(SampleOptions) if each.name not in _HAVE_OTHER_OPTIONS)
"""An option for each setting of how images are sampled, but `--classes` for `labels` and `--autoguidance RUN@EPOCH`."""

AsJson = Annotated[bool, Option("--json", "Print JSON.")]
BucketUri = Annotated[
    str,
    Option(
        "--bucket URI",
        "Bucket of datasets and runs: a folder, or a URI such as gs://NAME[/PREFIX]. "
        "Default: DDPM_BUCKET, else the target's, else ./bucket.",
    ),
]
Certain = Annotated[bool, Option("--yes", "Delete. Without --yes: only print what would be deleted.")]
Checkpoints = Annotated[
    str,
    Option(
        "--checkpoints LIST",
        "Checkpoints by epoch, such as 30,80,490; or latest, or all.",
        pattern=r"latest|all|\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*",
    ),
]
Dataset = Annotated[str, Option("--dataset NAME", "Name of a packed dataset, such as celeba.")]
DatasetName = Annotated[str, Option("NAME", "Name of the dataset, such as celeba.")]
NetworkFile = Annotated[
    str,
    Option(
        "--network FILE:CLASS",
        "The run's own network: a class in a file, such as mynet.py:MyNet, or package.module:Class.",
    ),
]
OnTarget = Annotated[str, Option("--on TARGET", "Where to run: local, container, or a name in the targets file.")]
Preset = Annotated[
    str,
    Option(
        "--preset NAME", "Settings to start from. Default: the preset named like the dataset, else landscape-sample."
    ),
]
RunOption = Annotated[str, Option("--run NAME", "Name of the run, such as celeba.")]
Sets = Annotated[
    tuple[str, ...],
    Option(
        "--set KEY=VALUE",
        "Change one setting, such as train.batch_size=64; may be repeated. `ddpm config --list` has all keys.",
    ),
]
SettingsFile = Annotated[Path | None, Option("--config FILE", "YAML file with settings; --set overrides it.")]
Size = Annotated[ImageSize | None, Option("--size PIXELS", "Width and height of the images, such as 64 or 96x64.")]
SliceOption = Annotated[
    str, Option("--slice I/N", "Share the work among N machines; this is machine I, counted from 0.")
]
Targets = Annotated[
    Path | None, Option("--targets FILE", "Targets file. Default: that of DDPM_TARGETS, else ./targets.yaml.")
]


class Request:
    """A dataclass of the options of a command."""

    command: ClassVar[tuple[str, ...]]
    """The words after `ddpm`, such as `("data", "pack")`; the last one is the verb."""

    def argv(self) -> tuple[str, ...]:
        """Returns the words after `ddpm`: command, arguments, then options that differ from their defaults.

        Equal requests give equal words, however they were typed.
        """
        arguments: list[str] = []
        words: list[str] = []
        for name, options in options_of(type(self)).items():
            held = getattr(self, name)
            values = held if isinstance(held, dict) else {name: held}
            for each in options:
                value, named = values.get(each.name, each.default), get_args(each.annotation)[1]
                many = value if isinstance(value, tuple) else (value,)
                if value == each.default:
                    continue
                if not named.flags:
                    arguments += map(str, many)
                elif isinstance(value, bool):
                    on, _, off = named.flags[0].partition("/")
                    words.append(on if value else off)
                else:
                    words += [word for one in many for word in (named.flags[0], _text(one))]
        if any(word.startswith("-") for word in arguments):
            return (*self.command, *words, "--", *arguments)
        return (*self.command, *arguments, *words)


@dataclass(frozen=True, kw_only=True)
class JobOptions(Request):
    """The options of each command that can be a job."""

    stop_after: str = option(
        "--stop-after DURATION", "Save and exit with 75 after this time, such as 1h30m. For a job it sets --max-hours."
    )
    bucket: BucketUri = ""


@dataclass(frozen=True, kw_only=True)
class LaunchedOptions(JobOptions):
    """The options of each command that launches processes."""

    processes: int | None = option(
        "--processes N", "Number of processes. Default: one per GPU, else one.", None, min=1, max=64
    )
    hang_after_seconds: float = option(
        "--hang-after SECONDS", "Exit with 71 after this time without progress; 0: never.", 600.0, min=0
    )

"""The pipeline from Python: `job.train("~/photos", size=64, epochs=20)` does what `ddpm train` does.

A function takes the options of its command as keyword arguments, such as `stop_after="2h"` for `--stop-after 2h`. The
work happens in processes of its own, as on the command line: they have the GPUs, and save at an interrupt. An error is
an exception of `job.exits`, whose message says what to do. Under torchrun and accelerate launch each process calls the
function, and they train together.
"""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from job.config import EMBEDDED
from job.data.pack_request import EncodeRequest, EnsureRequest, IndexRequest, PackRequest
from job.exits import BadRequestError, JobError, did_you_mean
from job.options import Option, Request, options_of, request_of
from job.own_code import name_of
from job.relay import in_notebook, run_command
from job.requests import EvaluateRequest, ExportRequest, SampleRequest, SubmitRequest, TrainRequest

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from ddpm.model import Model
    from job.report import Facts

R = TypeVar("R", bound=Request)
_JOB_KINDS = (TrainRequest, SampleRequest, EvaluateRequest, PackRequest, IndexRequest, EncodeRequest)
_JOBS: dict[str, type[Request]] = {kind.command[-1]: kind for kind in _JOB_KINDS}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def train(
    source: str | Path, *, size: int | str | None = None, pack: Mapping[str, Any] | None = None, **options: Any
) -> Run:
    """Trains a run to its last epoch, or resumes it, and packs the images before if the bucket lacks them.

    Args:
        source: the name of a dataset in the bucket, such as `"mine"`; or images to pack: a path or a URL with a slash
            in it, such as `"~/photos"` or `"./mine.zip"`. `dataset=` names their dataset; its default is their name.
        size: pixels of a side of the images to pack and to train on, such as 64 or `"96x64"`.
        pack: further options of `ddpm data ensure`, such as `{"labels": "labels.csv:breed"}`.
        options: those of `ddpm train`, with `set={"train.batch_size": 64}`, and a class or a name for `network`.

    Raises:
        StoppedError: an interrupt, a signal or a deadline; everything is saved, and the same call resumes.
        JobError: see the message.
    """
    where = os.fspath(source)
    is_source = not _NAME.fullmatch(where)
    name = options.pop("dataset", re.sub(r"\W+", "-", Path(where).name.partition(".")[0]) if is_source else where)
    bucket = options["bucket"] = os.fspath(options.get("bucket") or _usual_bucket())
    # Of processes that train together the first one packs; the others wait for it.
    if (is_source or pack or size or name == EMBEDDED) and os.environ.get("RANK", "0") == "0":
        given = {"source": str(Path(where).expanduser())} if is_source and "://" not in where else {}
        given |= {"source": where} if is_source and not given else {}
        _run(EnsureRequest, {"name": name, "bucket": bucket, "size": size, **given, **(pack or {})})
    if size:
        options["set"] = (f"data.size={size}", *_worded("set", options.get("set", ())))
    request = _request(TrainRequest, {"dataset": name, **options}).check()
    run = Run(request.run, bucket, network=request.network)
    run_command(request.argv(), run.display if in_notebook() else bool)
    return run


def pack(source: str | Path, name: str, **options: Any) -> str:
    """Packs images into a dataset, and returns the description that `ddpm data pack` prints.

    Raises:
        JobError: see the message.
    """
    return _run(PackRequest, {"source": os.fspath(source), "name": name, **options})


def sample(run: str, **options: Any) -> list[str]:
    """Samples as `ddpm sample` does, and returns the URIs of the pictures or of the set; `Run.sample` returns images.

    Raises:
        JobError: see the message.
    """
    return [line.partition("  ")[0] for line in _run(SampleRequest, {"run": run, **options}).splitlines()]


def evaluate(run: str, **options: Any) -> list[dict[str, Any]]:
    """Scores samples as `ddpm evaluate` does, and returns all scores of the run, a dictionary for each set of samples.

    Raises:
        JobError: see the message.
    """
    _run(EvaluateRequest, {"run": run, **options})
    return Run(run, options.get("bucket", _usual_bucket())).scores()


def export(run: str, **options: Any) -> str:
    """Writes a checkpoint as `ddpm export` does, and returns its URI.

    Raises:
        JobError: see the message.
    """
    return _run(ExportRequest, {"run": run, **options}).partition("  ")[0]


def submit(verb: str, **options: Any) -> str:
    """Submits a command as a job, such as `submit("train", dataset="mine", on="gke", gpus=8, yes=True)`.

    Args:
        verb: train, sample, evaluate, pack, index or encode.
        options: those of the command and of `ddpm submit`; `yes=True` confirms the cost, and without `detach=True` a
            job on this machine ends before the function returns.

    Returns:
        What the command prints: duration and cost, and the name of the job.

    Raises:
        JobError: see the message.
    """
    if verb not in _JOBS:
        raise BadRequestError(f"submit({verb!r}): use {', '.join(_JOBS)}{did_you_mean(verb, _JOBS)}")
    of_submit = _by_keyword(SubmitRequest)
    how = _request(SubmitRequest, {key: value for key, value in options.items() if key in of_submit})
    what = _request(_JOBS[verb], {key: value for key, value in options.items() if key not in of_submit})
    return run_command(["submit", verb, *what.argv()[len(what.command) :], *how.argv()])


class Run:
    """A run in a bucket."""

    def __init__(self, name: str, bucket: str | Path = "", network: str | type[nn.Module] = "") -> None:
        """Names a run; `bucket` is that of a command by default, and `network` the run's own network, if it has one."""
        self.name, self.bucket = name, os.fspath(bucket) or _usual_bucket()
        self.network = network if isinstance(network, str) else name_of(network)
        self._shown = ""

    def __repr__(self) -> str:
        """Returns the name and the place."""
        return f"Run({self.name!r}, {self.bucket!r})"

    @property
    def uri(self) -> str:
        """The folder of the run."""
        return f"{self.bucket.rstrip('/')}/runs/{self.name}"

    @property
    def page(self) -> str:
        """The page of the run, one file of HTML."""
        return f"{self.uri}/report.html"

    def facts(self) -> Facts:
        """Returns all that the page shows."""
        from job.report import facts_of
        from job.runs.run import open_run

        return facts_of(open_run(self.bucket, self.name, with_dataset=False), self.name)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of the metrics, in order, as `pandas.DataFrame` takes them."""
        return [*self.facts().rows]

    def checkpoints(self) -> list[int]:
        """Returns the images seen at each checkpoint, in order."""
        from job.runs.checkpoints import by_progress, list_checkpoints
        from job.store import open_store

        return [*by_progress(list_checkpoints(open_store(self.uri)))]

    def scores(self) -> list[dict[str, Any]]:
        """Returns the scores of `ddpm evaluate`: how the samples were made, and each score by its name."""
        return [{**one.sample_set.model_dump(mode="json"), **one.values} for one in self.facts().scores]

    def load(self, **options: Any) -> Model:
        """Returns the model; see `job.load`."""
        from job.sampling.painter import load_run

        return load_run(self.uri, network=self.network, **options)

    def sample(
        self, images: int = 1, *, epoch: int | None = None, weights: str | None = None, **options: Any
    ) -> list[Image.Image]:
        """Returns images; `seed`, `classes`, `steps` and more are options of `ddpm.Model.sample`."""
        made: list[Any] = [*self.load(epoch=epoch, weights=weights).sample(images, **options)]
        return made

    def evaluate(self, **options: Any) -> list[dict[str, Any]]:
        """Scores samples; see `job.evaluate`."""
        return evaluate(self.name, bucket=self.bucket, network=self.network, **options)

    def export(self, to: str | Path = "", **options: Any) -> str:
        """Writes a checkpoint as a folder, and returns its URI; see `job.export`."""
        return export(self.name, bucket=self.bucket, to=os.fspath(to), **options)

    def display(self) -> None:
        """Shows the newest sample grid in a notebook, once; a bucket that does not answer costs the picture alone."""
        from IPython.display import Image as Shown
        from IPython.display import display

        from job.runs.layout import ObjectKind
        from job.store import open_store

        with suppress(JobError):
            run = open_store(self.uri)
            grids = [entry.key for entry in run.list(ObjectKind.PICTURE.folder) if entry.key.endswith(".png")]
            if grids and (newest := max(grids)) != self._shown:
                self._shown = newest
                display(Shown(run.read(newest).data))


def _usual_bucket() -> str:
    from job.jobs.targets import target_on

    return target_on("local").usual_bucket


def _run(kind: type[Request], options: Mapping[str, Any]) -> str:
    return run_command(_request(kind, options).argv())


def _by_keyword(kind: type[Request]) -> dict[str, Parameter]:
    """Returns the options of a request by keyword: `stop_after` for `--stop-after`, `from_` for `--from`."""
    found = {}
    for each in (each for options in options_of(kind).values() for each in options):
        option: Option = get_args(each.annotation)[1]
        word = option.flags[0].strip("-").partition("/")[0].replace("-", "_") if option.flags else each.name
        found[f"{word}_" if keyword.iskeyword(word) else word] = each
    return found


def _request(kind: type[R], options: Mapping[str, Any]) -> R:
    """Returns the request of keyword arguments."""
    there, verb = _by_keyword(kind), kind.command[-1] if kind.command else "submit"
    values = {each.name: each.default for each in there.values()}
    for word, value in options.items():
        if word not in there:
            raise BadRequestError(f"{verb} has no option {word!r}{did_you_mean(word, there)}")
        if value is not None:
            values[there[word].name] = _worded(word, value)
    if lacking := [name for name, value in values.items() if value is Parameter.empty]:
        raise BadRequestError(f"{verb} needs {lacking[0]}=")
    return request_of(kind, values)


def _worded(word: str, value: Any) -> Any:
    """Returns a value as its option takes it."""
    if isinstance(value, Mapping):
        from job.config import shown

        return tuple(f"{key}={shown(each)}" for key, each in value.items())
    if word == "network" and isinstance(value, type):
        return name_of(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if word in ("set", "tars"):
        return (value,) if isinstance(value, str) else tuple(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return value

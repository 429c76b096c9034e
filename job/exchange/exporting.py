"""`ddpm export`: writes a checkpoint as a folder for diffusers, or pushes it to the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from job.exchange.card import CARD, PICTURE, Card
from job.exits import BadRequestError, MissingInputError
from job.plan import RunHandle, open_run
from job.progress import Progress, note
from job.runs import pipeline
from job.runs.checkpoints import check_average, choose, opened
from job.runs.drawings import grid_key, label_at
from job.runs.layout import RUNS
from job.runs.retention import reading_chosen
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store, fsspec_configured, open_store


@dataclass(frozen=True)
class ExportRequest:
    """The options of `ddpm export`.

    Attributes:
        bucket: the bucket of the run.
        run: the name of the run.
        to: a new or empty folder, as a path or a URI; empty with `push`.
        push: a repository of the hub, `ORG/NAME`; empty with `to`.
        checkpoint: an epoch, or `latest`.
        weights: `ema`, `ema-STD` or `model`; empty: the run's `sample.weights`.
    """

    bucket: str
    run: str
    to: str = ""
    push: str = ""
    checkpoint: str = "latest"
    weights: str = ""

    def check(self) -> None:
        """Checks what can be checked without the bucket.

        Raises:
            BadRequestError: both or none of `to` and `push`, or the checkpoint is neither an epoch nor `latest`.
        """
        if bool(self.to) == bool(self.push):
            raise BadRequestError("give either --to FOLDER or --push ORG/NAME")
        if not re.fullmatch("[0-9]{1,9}", self.checkpoint) and self.checkpoint != "latest":
            raise BadRequestError(f"--checkpoint {self.checkpoint!r}: use an epoch such as 80, or latest")


@dataclass(frozen=True)
class Export:
    """The objects of an export, by key.

    Attributes:
        files: the weights.
        small: all others; `model_index.json`, which makes them a pipeline, comes last.
        words: the checkpoint, the weights and their size, for people.
    """

    files: dict[str, Path]
    small: dict[str, bytes]
    words: str


def export_run(request: ExportRequest) -> None:
    """Writes a checkpoint of a run as a folder of diffusers, or pushes it to the hub; prints its URI.

    Raises:
        MissingInputError: no such run, checkpoint or weights.
        BadRequestError: diffusers lacks the network, or the folder or the repository has other files.
        BadDataError: the checkpoint is damaged.
        NoPermissionError, BucketAwayError: the hub refuses the push, or does not answer.
        StoppedError: a signal came before the end.
    """
    request.check()
    hub = None
    if request.push:
        with fsspec_configured():
            from job.exchange.hub import Hub

            hub = Hub(request.push)
    stop = Stop().install()
    of_run = open_run(request.bucket, request.run, stop)
    described = pipeline.described(of_run.config, of_run.classes, has_code=True)
    if not described.objects:
        raise BadRequestError(f"run {request.run!r} cannot be exported to diffusers: {described.lacking}")
    target = open_target(request.to, of_run) if request.to else None
    with _opened_export(of_run, request, described) as export:
        if target:
            uri = write_folder(target, request.to, request.run, export, stop)
        else:
            assert hub is not None
            uri = hub.push({**export.files, **export.small}, f"{request.run}, {export.words}", stop)
    print(f"{uri}  ({export.words})")
    if described.lacking:
        note(f"without model_index.json: {described.lacking}; see {CARD}")


@contextmanager
def _opened_export(of_run: RunHandle, request: ExportRequest, described: pipeline.Described) -> Iterator[Export]:
    """Yields the objects of an export; its files are deleted when the context ends."""
    run, config = of_run.run, of_run.config
    if request.weights:
        config = config.updated({"sample.weights": request.weights})
    weights, batch_size = config.sample.weights, config.train.batch_size
    find = partial(choose, run, request.checkpoint, of_run.dataset_images, batch_size)
    with reading_chosen(run, find) as ((ref,), _):
        check_average(run, ref, weights, request.run)
        label = label_at(ref.images_seen, of_run.dataset_images, batch_size)
        with opened(run, ref, (weights,)) as restored:
            paths = restored.files[weights]
            files = dict(zip(pipeline.weights_names(len(paths)), paths, strict=True))
            small = dict(described.objects)
            last = {key: small.pop(key) for key in ("model_index.json",) if key in small}
            if len(files) > 1:
                small[pipeline.INDEX] = _index(files)
            with suppress(ObjectMissingError):
                small[PICTURE] = run.read(grid_key(label, config.sample.name(of_run.first_drawing))).data
            place = request.push or "this folder"
            if of_run.classes and last:
                small[pipeline.PIPELINE_CODE] = (resources.files("job.exchange") / "class_pipeline.py").read_bytes()
            small[CARD] = Card(of_run, ref, weights, place, described.lacking).text(small | last).encode()
            size_bytes = sum(path.stat().st_size for path in paths)
            yield Export(files, small | last, f"{label}, weights {weights}, {size_bytes:,} bytes")


def open_target(to: str, of_run: RunHandle) -> Store:
    """Opens the folder that `--to` names.

    Raises:
        BadRequestError: it lies among the runs of the bucket, and would be listed as one, or be a flaw of one.
    """
    target, runs = open_store(to, of_run.bucket.retry), f"{of_run.bucket.uri}/{RUNS}"
    if f"{target.uri}/".startswith(f"{runs}/"):
        raise BadRequestError(f"--to {to} would be taken for a run or a part of one: name a folder outside of {runs}")
    return target


def write_folder(target: Store, to: str, run: str, export: Export, stop: Stop) -> str:
    """Writes an export of a run to the folder that `--to` names; returns its URI."""
    written: list[str] = []
    sizes = {key: path.stat().st_size for key, path in export.files.items()}
    check_free(target, to, {*export.files, *export.small})
    try:
        with Progress(f"exporting {run}", unit="MB", total=sum(sizes.values()) // 10**6) as bar:
            for key, path in export.files.items():
                stop.check("while exporting", "its files are deleted, and the same command begins again")
                target.upload(path, key)
                written.append(key)
                bar.update(sum(sizes[done] for done in written) // 10**6)
            for key, data in export.small.items():
                target.create(key, data)
                written.append(key)
    except ObjectExistsError:
        said = "another export is there already; name another folder, or an empty one"
        raise BadRequestError(f"--to {to}: {said}") from None
    except BaseException:
        for key in written:
            target.delete(key)
        raise
    return target.uri


def check_free(target: Store, to: str, own: set[str]) -> None:
    """Raises `BadRequestError` if the folder holds other objects than those of a killed export."""
    # A local folder that does not exist cannot be listed.
    with suppress(MissingInputError):
        if strangers := [entry.key for entry in target.list() if entry.key not in own]:
            raise BadRequestError(f"--to {to}: {strangers[0]} is there already; name another folder, or an empty one")


def _index(files: dict[str, Path]) -> bytes:
    """Returns the index that names the file of each tensor."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name.rpartition("/")[2])
    return pipeline.weights_index(sum(path.stat().st_size for path in files.values()), places)

"""`ddpm export`: a checkpoint as a folder for diffusers, or as one commit to the hub of Hugging Face.

Either has a model card: the origin of the weights, the licence of the images, scores and sample code, for people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from importlib import resources
from pathlib import Path

from ddpm.loading import NETWORK_JSON
from job.config import method
from job.config.schema import OwnSection
from job.coordination.sealed import code_version
from job.exits import (
    BadDataError,
    BadRequestError,
    BucketAwayError,
    JobError,
    MissingInputError,
    NoPermissionError,
    needs_extra,
)
from job.progress import Progress, note, printable
from job.requests import ExportRequest
from job.runs import checkpoints
from job.runs.checkpoints import restore
from job.runs.layout import RUNS, CheckpointRef, ObjectKind, located, places_in
from job.runs.retention import reading_chosen
from job.runs.run import RunHandle, Scores, open_run, score_words
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Retry, Store, open_store
from job.store.files import scratch_folder
from job.store.retry import answer, in_thread

CARD, PICTURE = "README.md", "grid.png"
_SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN, with a token that may write"


Objects = dict[str, Path | bytes]
"""The files and contents of an export, by key; `model_index.json`, which makes them a pipeline, comes last."""


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
    hub = Hub(request.push) if request.push else None
    stop = Stop().install()
    of_run = open_run(request.bucket, request.run, stop)
    data, (channels, *_) = of_run.config.data, of_run.pixel_shape
    if data.bits != 8 or channels not in (1, 3):
        what = f"{data.bits} bits in {channels} channels"
        raise BadRequestError(f"run {request.run!r} cannot be exported: others load 8 bits in 1 or 3, and not {what}")
    if isinstance(of_run.config.model, OwnSection):
        described = _described_own(of_run)
    else:
        described = checkpoints.described(of_run.config, of_run.classes, has_code=True)
    if not described.objects:
        raise BadRequestError(f"run {request.run!r} cannot be exported to diffusers: {described.lacking}")
    target = open_target(request.to, of_run) if request.to else None
    with _opened_export(of_run, request, described) as (objects, words):
        if target:
            uri = write_folder(target, request.to, request.run, objects, stop)
        else:
            assert hub is not None
            uri = hub.push(objects, f"{request.run}, {words}", of_run.bucket.retry)
    print(f"{uri}  ({words})")
    if described.lacking and not isinstance(of_run.config.model, OwnSection):
        note(f"without model_index.json: {described.lacking}; see {CARD}")


@contextmanager
def _opened_export(
    of_run: RunHandle, request: ExportRequest, described: checkpoints.Described
) -> Iterator[tuple[Objects, str]]:
    """Yields the objects of an export, and words about them; its files are deleted when the context ends."""
    run, config = of_run.run, of_run.config
    if request.weights:
        config = config.updated({"sample.weights": request.weights})
    weights = config.sample.weights
    with reading_chosen(run, partial(of_run.chosen, request.checkpoint, weights)) as ((ref,), _):
        label = of_run.label(ref.images_seen)
        with scratch_folder("export") as folder:
            paths = restore(run, ref, groups=(weights,), folder=folder).files[weights]
            # The network of a user is none of diffusers.
            drop = "unet/" * isinstance(config.model, OwnSection)
            names = [name.removeprefix(drop) for name in checkpoints.weights_names(len(paths))]
            files = dict(zip(names, paths, strict=True))
            small = dict(described.objects)
            last = {key: small.pop(key) for key in ("model_index.json",) if key in small}
            if len(files) > 1:
                small[checkpoints.INDEX.removeprefix(drop)] = _index(files)
            with suppress(ObjectMissingError):
                small[PICTURE] = run.read(replace(of_run, config=config).grid_key(ref.images_seen)).data
            if of_run.classes and last:
                small[checkpoints.PIPELINE_CODE] = (resources.files("job.exchange") / "class_pipeline.py").read_bytes()
            named = {"place": request.push or "this folder", "lacking": described.lacking}
            small[CARD] = _card(of_run, ref, weights, small | last, **named).encode()
            size_bytes = sum(path.stat().st_size for path in paths)
            yield {**files, **small, **last}, f"{label}, weights {weights}, {size_bytes:,} bytes"


def _described_own(of_run: RunHandle) -> checkpoints.Described:
    """Returns the objects of a network of the user: its file, and all that `ddpm.load` needs beside it.

    Raises:
        BadDataError: the file in the bucket is missing, or is not that of the run.
    """
    config, key = of_run.config, ObjectKind.NETWORK.value
    model, uri = config.model, of_run.run.uri_of(key)
    assert isinstance(model, OwnSection)
    try:
        text = of_run.run.read(key).data
    except ObjectMissingError:
        text = b""
    if sha256(text).hexdigest() != model.sha256:
        raise BadDataError(f"{uri} is missing, or is not the network of the run: put its file {model.file} there")
    said = {
        "network": model.network,
        "sha256": model.sha256,
        "settings": config.network,
        "image_shape": config.image_shape,
        "num_classes": model.num_classes or 0,
        "null_class": method.classes_of(config) > (model.num_classes or 0),
        "augmentation_labels": method.settings_of(config).augmentation.labels,
        "diffusion": asdict(config.diffusion),
        "sampling": asdict(config.sample),
    }
    objects = {NETWORK_JSON: (json.dumps(said, indent=2) + "\n").encode(), key: text}
    return checkpoints.Described(objects | checkpoints.of_run(config, of_run.classes), "it is a network of its own")


def _index(files: dict[str, Path]) -> bytes:
    """Returns the index that names the file of each tensor."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name.rpartition("/")[2])
    return checkpoints.weights_index(sum(path.stat().st_size for path in files.values()), places)


def _card(of_run: RunHandle, ref: CheckpointRef, weights: str, objects: dict[str, bytes], **named: str) -> str:
    """Returns the model card of the weights of a checkpoint, with the metadata that the hub reads."""
    from jinja2 import StrictUndefined, Template

    kind, scheduler = (
        json.loads(objects[key])["_class_name"] if key in objects else ""
        for key in ("model_index.json", checkpoints.SCHEDULER_CONFIG)
    )
    licence, classes = of_run.index.licence if of_run.index else "", of_run.classes
    text = (resources.files("job.exchange") / "card.md").read_text()
    card = Template(text, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return card.render(
        **named,
        run=of_run.run.uri.rpartition("/")[2],
        config=of_run.config,
        index=of_run.index,
        ref=ref,
        weights=weights,
        code_version=code_version(),
        licence=licence,
        # The hub takes no free text as the name of a licence.
        licence_id=re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")[:64],
        scores=_scores(of_run.run, ref, weights),
        kind=kind,
        scheduler=scheduler,
        classes=classes,
        labels=[number % len(classes) for number in range(4)] if classes else [],
        has_picture=PICTURE in objects,
    )


def _scores(run: Store, ref: CheckpointRef, weights: str) -> Iterator[str]:
    """Yields the words of each stored set of scores of these weights; a damaged record must not stop an export."""
    for key, place in places_in(run, ObjectKind.SCORES.folder).items():
        if place.kind is ObjectKind.SCORES:
            with suppress(BadDataError, ObjectMissingError):
                scores = Scores.load(run, key)
                config, of = scores.sample_set, scores.reference
                if (scores.ref, config.weights) == (ref, weights):
                    how = f"{config.count:,} images by {config.sampler} in {config.steps:,} steps"
                    yield f"{how}, against {of}: {score_words(scores.values, scores.floor, of.extractor)}"


def open_target(to: str, of_run: RunHandle) -> Store:
    """Opens the folder that `--to` names.

    Raises:
        BadRequestError: it lies among the runs of the bucket, and would be listed as one, or be a flaw of one.
    """
    target, runs = open_store(to, of_run.bucket.retry), f"{of_run.bucket.uri}/{RUNS}"
    if f"{target.uri}/".startswith(f"{runs}/"):
        raise BadRequestError(f"--to {to} would be taken for a run or a part of one: name a folder outside of {runs}")
    return target


def write_folder(target: Store, to: str, run: str, objects: Objects, stop: Stop) -> str:
    """Writes an export of a run to the folder that `--to` names; returns its URI."""
    written: list[str] = []
    sizes = {key: one.stat().st_size if isinstance(one, Path) else len(one) for key, one in objects.items()}
    check_strangers(target, to, {*objects})
    try:
        with Progress(f"exporting {run}", unit="MB", total=sum(sizes.values()) // 10**6) as bar:
            for key, content in objects.items():
                stop.check("while exporting", "its files are deleted, and the same command begins again")
                if isinstance(content, Path):
                    target.upload(content, key)
                else:
                    target.create(key, content)
                written.append(key)
                bar.update(sum(sizes[done] for done in written) // 10**6)
    except ObjectExistsError:
        said = "another export is there already; name another folder, or an empty one"
        raise BadRequestError(f"--to {to}: {said}") from None
    except BaseException:
        for key in written:
            target.delete(key)
        raise
    return target.uri


def check_strangers(target: Store, to: str, own: set[str]) -> None:
    """Raises `BadRequestError` if the folder holds other objects than those of a killed export."""
    # A local folder that does not exist cannot be listed.
    with suppress(MissingInputError):
        if strangers := [entry.key for entry in target.list() if entry.key not in own]:
            raise BadRequestError(f"--to {to}: {strangers[0]} is there already; name another folder, or an empty one")


class Hub:
    """A model repository of the hub, and the token of this machine. A push is one commit, whole or not at all."""

    def __init__(self, name: str) -> None:
        """Checks the token without a request.

        Args:
            name: `ORG/NAME`, where the first part may be a user.

        Raises:
            BadRequestError: the client is not installed.
            NoPermissionError: this machine has no token, or one that no request can carry.
        """
        with needs_extra("web", "--push"):
            from huggingface_hub import HfApi, get_token
        self._name, self._api, token = name, HfApi(), get_token()
        # The client's error about an odd token would print it.
        if not token or not (token.isascii() and token.isprintable()):
            raise NoPermissionError(f"this machine has no usable token of the hub: {_SIGN_IN}")

    def push(self, objects: Objects, message: str, retry: Retry) -> str:
        """Commits objects to the repository, and returns its URL; a missing repository is made, for its owner alone.

        The objects replace those of an earlier push. Other files stay.

        Args:
            objects: files and contents, by key.
            message: that of the commit.
            retry: its stop ends the wait for the hub.

        Raises:
            BadRequestError: the repository has other files and no export, or the hub refuses the objects.
            NoPermissionError: the token is not valid, or may not write there.
            BucketAwayError: the hub does not answer, or another commit came between.
            StoppedError: a stop was requested.
        """
        try:
            # The client waits for a silent hub for ever: its thread is left behind, and ends with the process.
            return answer(in_thread(self._push, objects, message), retry, self._name)
        except JobError:
            raise
        except Exception as error:
            raise _meaning(error, self._name) from None

    def _push(self, objects: Objects, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        url = str(self._api.create_repo(self._name, private=True, exist_ok=True))
        # A new repository has this file of git.
        there = {*self._api.list_repo_files(self._name)} - {".gitattributes"}
        if checkpoints.RUN_CONFIG not in there and (strangers := sorted(there - objects.keys())):
            raise BadRequestError(
                f"--push {self._name}: {printable(strangers[0]):.100} is there already, and no earlier export: name "
                "another repository, or a new one"
            )
        own, folder = {CARD, PICTURE, checkpoints.PIPELINE_CODE}, CheckpointRef(0, 0).key
        of_a_run = {key for key in there if located(f"{folder}/{key}").kind is ObjectKind.PIPELINE}
        stale = (there & own | of_a_run) - objects.keys()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=key, path_or_fileobj=content) for key, content in objects.items()),
            *(CommitOperationDelete(path_in_repo=key) for key in stale),
        ]
        if self._api.repo_info(self._name).private:
            note(f"{self._name} is private: {url}/settings makes it public")
        self._api.create_commit(self._name, operations, commit_message=message)
        return url


def _meaning(error: Exception, name: str) -> JobError:
    """Returns what an error of the client means to a person."""
    from job.store.remote import cause, one_line

    answered: BaseException = error
    while not hasattr(answered, "response") and answered.__cause__ is not None:
        answered = answered.__cause__
    status = getattr(getattr(answered, "response", None), "status_code", None)
    # The client raises a ValueError for its own refusals, and also for an answer that is no JSON.
    is_refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    said = str(error) if isinstance(error, ValueError) else getattr(answered, "server_message", None)
    reason = printable(one_line(said or cause(error)))
    if status in (401, 402, 403):
        return NoPermissionError(f"the hub does not let this machine write to {name} ({reason}): {_SIGN_IN}")
    if status in (409, 412):
        return BucketAwayError(f"{name} changed during the push ({reason}): the same command begins again")
    if status in (400, 404, 413, 422) or is_refused:
        return BadRequestError(f"the hub refuses the push to {name}: {reason}")
    return BucketAwayError(f"the hub does not answer ({reason}): check the network; the same command begins again")

"""`ddpm export --push`: the hub of Hugging Face, through its own client. A push is one commit, whole or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path

from job.exchange.card import CARD, PICTURE
from job.exits import BadRequestError, BucketAwayError, JobError, NoPermissionError, how_to_install
from job.progress import note, printable, shows_bars
from job.runs.layout import CheckpointRef, ObjectKind, located
from job.runs.pipeline import PIPELINE_CODE, RUN_CONFIG
from job.stop import Stop
from job.store.remote import cause, one_line

_LOOK_SECONDS = 0.2
_OF_GIT = {".gitattributes"}
"""The files of a new repository."""
_SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN, with a token that may write"
_CLIENT = ("huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests")
"""The packages whose errors mean that the hub does not answer; the client has changed its library of HTTP."""


class Hub:
    """A model repository of the hub, and the token of this machine."""

    def __init__(self, name: str) -> None:
        """Checks name and token without a request.

        Args:
            name: `ORG/NAME`, where the first part may be a user.

        Raises:
            BadRequestError: the name is another one, or the client is not installed.
            NoPermissionError: this machine has no token, or one that no request can carry.
        """
        try:
            from huggingface_hub import HfApi, get_token
            from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id
        except ImportError as error:
            raise BadRequestError(f"--push needs more than is installed ({error}): {how_to_install('web')}") from None
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise BadRequestError(f"--push: {printable(one_line(str(error)))}") from None
        if "/" not in name:
            raise BadRequestError(f"--push {name}: put the name of a user or an organisation first: ORG/{name}")
        if not shows_bars():
            disable_progress_bars()
        self._name, self._api = name, HfApi()
        try:
            token = get_token()
        except Exception as error:
            raise _meaning(error, name) or error from None
        # The client's error about an odd token would print it.
        if not token or not (token.isascii() and token.isprintable()):
            raise NoPermissionError(f"this machine has no usable token of the hub: {_SIGN_IN}")

    def push(self, objects: Mapping[str, Path | bytes], message: str, stop: Stop) -> str:
        """Commits objects to the repository, and returns its URL; a missing repository is made, for its owner alone.

        The objects replace those of an earlier push. Other files stay.

        Args:
            objects: files and contents, by key.
            message: that of the commit.
            stop: ends the wait for the hub.

        Raises:
            BadRequestError: the repository has other files and no export, or the hub refuses the objects.
            NoPermissionError: the token is not valid, or may not write there.
            BucketAwayError: the hub does not answer, or another commit came between.
            StoppedError: a stop was requested.
        """
        result = Future[str]()

        def work() -> None:
            try:
                result.set_result(self._push(objects, message))
            except Exception as error:
                result.set_exception(_meaning(error, self._name) or error)

        # The client waits for a silent hub for ever: its thread is left behind, and ends with the process.
        threading.Thread(target=work, name="push", daemon=True).start()
        while not wait([result], _LOOK_SECONDS).done:
            stop.check("while pushing", "a push is a single commit, which the same command makes")
        return result.result()

    def _push(self, objects: Mapping[str, Path | bytes], message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        url = str(self._api.create_repo(self._name, private=True, exist_ok=True))
        there = {*self._api.list_repo_files(self._name)} - _OF_GIT
        if RUN_CONFIG not in there and (strangers := sorted(there - objects.keys())):
            raise BadRequestError(
                f"--push {self._name}: {printable(strangers[0]):.100} is there already, and no earlier export: name "
                "another repository, or a new one"
            )
        stale = [key for key in there - objects.keys() if _is_of_an_export(key)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=key, path_or_fileobj=content) for key, content in objects.items()),
            *(CommitOperationDelete(path_in_repo=key) for key in stale),
        ]
        if self._api.repo_info(self._name).private:
            note(f"{self._name} is private: {url}/settings makes it public")
        self._api.create_commit(self._name, operations, commit_message=message)
        return url


def _is_of_an_export(key: str) -> bool:
    in_a_run = f"{CheckpointRef(0, 0).key}/{key}"
    return key in (CARD, PICTURE, PIPELINE_CODE) or located(in_a_run).kind is ObjectKind.PIPELINE


def _meaning(error: Exception, name: str) -> JobError | None:
    """Returns what an error of the client means to a person; None for an error of the program itself."""
    if isinstance(error, JobError):
        return error
    answered: BaseException = error
    while not hasattr(answered, "response") and answered.__cause__ is not None:
        answered = answered.__cause__
    status = getattr(getattr(answered, "response", None), "status_code", None)
    said = str(error) if isinstance(error, ValueError) else getattr(answered, "server_message", None)
    reason = printable(one_line(said or cause(error)))
    if status == 401:
        return NoPermissionError(f"the hub does not accept the token of this machine ({reason}): {_SIGN_IN}")
    if status in (402, 403):
        return NoPermissionError(f"the token of this machine may not write to {name} ({reason}): {_SIGN_IN}")
    if status in (409, 412):
        return BucketAwayError(f"{name} changed during the push ({reason}): the same command begins again")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return BadRequestError("HF_HUB_OFFLINE keeps the client of the hub from its network: unset it")
    is_refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    if status in (400, 404, 413, 422) or is_refused:
        return BadRequestError(f"the hub refuses the push to {name}: {reason}")
    is_of_client = type(error).__module__.partition(".")[0] in _CLIENT
    if status or is_of_client or isinstance(error, ConnectionError | TimeoutError | RuntimeError | ValueError):
        return BucketAwayError(f"the hub does not answer ({reason}): check the network; the same command begins again")
    return None

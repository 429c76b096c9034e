"""Sends the rows of the metrics also to Weights & Biases or MLflow, through Accelerate's trackers.

These rows leave the bucket. A separate thread sends them, so that a service without an answer does not delay training.
The rows in the bucket are the truth; the program does not send a row again that a tracker did not take.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from job.config import RunConfig
from job.exits import BadRequestError, JobError, NoPermissionError, how_to_install
from job.progress import note
from job.runs.metric_rows import Row

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "ddpm"
CLOSE_SECONDS = 10.0
"""The longest time for the last rows at the end of a run."""


def check_tracker(name: str, *, is_asked_for: bool) -> None:
    """Checks that a tracker has its library, its server's address and its user's login; sends no request for that.

    Args:
        name: the tracker.
        is_asked_for: whether this command asks for it. If only an earlier command did, an error becomes a note.

    Raises:
        BadRequestError, NoPermissionError: something is missing; the message has the remedy.
    """
    try:
        if name == "none":
            return
        if importlib.util.find_spec(name) is None:
            raise BadRequestError(f"--tracker {name} needs more than is installed: {how_to_install(name)}")
        if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise BadRequestError("--tracker mlflow: set MLFLOW_TRACKING_URI to the address of your server")
        if name == "wandb" and not _is_signed_in():
            raise NoPermissionError("--tracker wandb: sign in with `wandb login`, or set WANDB_MODE=offline")
    except JobError as error:
        if is_asked_for:
            raise
        note(f"going on without a tracker: {error}")


def _is_signed_in() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        # There is a key; the service checks it with the first row.
        return True


class Tracking:
    """The tracker of one run; does nothing if the configuration names none."""

    def __init__(self, config: RunConfig, name: str, run_uri: str) -> None:
        """Begins a tracked run, or resumes that of an earlier attempt, in a thread beside training."""
        self._kind, self._is_taking = config.log.tracker, config.log.tracker != "none"
        self._tracker: GeneralTracker | None = None
        if self._is_taking:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tracker")
            begin = _wandb if self._kind == "wandb" else _mlflow
            self._pool.submit(self._trying, lambda: self._begin(begin, config, name, run_uri))
            note(f"the rows of the metrics also go to {self._kind}, which is outside of the bucket")

    def log(self, row: Row) -> None:
        """Sends a row, without waiting for the service."""
        if self._is_taking:
            self._pool.submit(self._trying, lambda: self._tell(dict(row)))

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Ends the tracked run, if the service takes the last rows in time."""
        if self._is_taking:
            with suppress(Exception):
                self._pool.submit(self._trying, self._finish).result(max(0.0, timeout_seconds))
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _trying(self, work: Callable[[], None]) -> None:
        if not self._is_taking:
            return
        try:
            work()
        except Exception as error:
            self._is_taking = False
            said = " ".join(str(error).split())
            note(f"{self._kind} takes no rows, which stay in the bucket ({type(error).__name__}: {said:.200})")

    def _begin(self, begin: Callable[..., GeneralTracker], *about: Any) -> None:
        # The thread that sends rows must also begin the run: MLflow ties a run to its thread.
        self._tracker = begin(*about)

    def _tell(self, row: Row) -> None:
        assert self._tracker is not None
        images_seen = row.pop("images_seen")
        self._tracker.log({name: value for name, value in row.items() if value is not None}, step=images_seen)

    def _finish(self) -> None:
        assert self._tracker is not None
        self._tracker.finish()


def _wandb(config: RunConfig, name: str, run_uri: str) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    # wandb writes files into the working folder by default, which may be read-only.
    os.environ.setdefault("WANDB_DIR", _scratch())
    os.environ.setdefault("WANDB_SILENT", "true")
    # wandb drops rows at old steps, so rows that a resumed run sends again do no harm.
    known = hashlib.sha256(run_uri.encode()).hexdigest()[:16]
    tracker = WandBTracker(PROJECT, id=known, name=name, resume="allow")
    tracker.start()
    tracker.store_init_configuration(_plain(config))
    return tracker


def _mlflow(config: RunConfig, name: str, run_uri: str) -> GeneralTracker:
    import mlflow
    from accelerate.tracking import MLflowTracker

    by_uri = {"ddpm.run": run_uri}
    query = f"tags.`ddpm.run` = '{run_uri}'"
    before = mlflow.search_runs(experiment_names=[PROJECT], filter_string=query, max_results=1, output_format="list")
    known = before[0].info.run_id if before else None
    tracker = MLflowTracker(PROJECT, run_name=name, run_id=known, tags=by_uri)
    tracker.start()
    if known is None:
        # MLflow refuses a parameter whose value a later attempt changed.
        tracker.store_init_configuration(_plain(config))
    return tracker


def _plain(config: RunConfig) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, list) else value for key, value in config.flat().items()}


def _scratch() -> str:
    from job.data.cache import default_cache_dir

    folder = default_cache_dir() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)

"""Sends the rows of the metrics and the sample grids also to Weights & Biases or MLflow.

They leave the bucket. A separate thread sends them, so that a service without an answer does not delay training.
The rows in the bucket are the truth; the program does not send a row again that a tracker did not take, nor one that a
killed attempt sent already.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from job.config import RunConfig
from job.exits import BadRequestError, JobError, NoPermissionError, how_to_install
from job.progress import note
from job.runs.metric_rows import Row, plain_settings
from job.store.files import default_cache_dir

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
    if (lack := _lack(name)) is None:
        return
    if is_asked_for:
        raise lack
    note(f"going on without a tracker: {lack}")


def _lack(name: str) -> JobError | None:
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        return BadRequestError(f"--tracker {name} needs more than is installed: {how_to_install(name)}")
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return BadRequestError("--tracker mlflow: set MLFLOW_TRACKING_URI to the address of your server")
    if name == "wandb" and not _is_signed_in():
        return NoPermissionError("--tracker wandb: sign in with `wandb login`, or set WANDB_MODE=offline")
    return None


def _is_signed_in() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        # There is a key; the service checks it with the first row.
        return True


class Tracking:
    """The tracker of one run; does nothing if the configuration names none."""

    _send: Callable[[Row, int], object]
    _send_grid: Callable[[Image.Image, int], object]
    _finish: Callable[[], object]

    def __init__(self, config: RunConfig, name: str, run_uri: str) -> None:
        """Begins a tracked run, or resumes that of an earlier attempt, in a thread beside training."""
        self._kind, self._is_taking, self._log = config.log.tracker, config.log.tracker != "none", config.log
        self._rows_from = self._grids_from = 0
        self._held: list[Callable[[], object]] | None = None
        """What a service without a network gets once it is committed: it cannot say what an earlier attempt sent."""
        if self._is_taking:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="tracker")
            # The thread that sends rows must also begin the run: MLflow ties a run to its thread.
            begin = self._begin_wandb if self._kind == "wandb" else self._begin_mlflow

            def start() -> None:
                # The launcher said that it goes on without; MLflow without an address writes into the working folder.
                if _lack(self._kind) is not None:
                    self._is_taking = False
                    return
                note(f"the rows of the metrics also go to {self._kind}, which is outside of the bucket")
                begin(plain_settings(config), name, run_uri)

            self._do(start)

    def log(self, row: Row) -> None:
        """Sends a row, without waiting for the service."""
        numbers = {name: value for name, value in row.items() if value is not None and name != "images_seen"}

        def send() -> None:
            if row["images_seen"] >= self._rows_from:
                self._send(numbers, row["images_seen"])

        self._do(lambda: self._later(send))

    def log_grid(self, png: bytes, images_seen: int) -> None:
        """Sends a sample grid, without waiting for the service."""

        def send() -> None:
            if images_seen >= self._grids_from:
                self._send_grid(Image.open(BytesIO(png)), images_seen)

        self._do(lambda: self._later(send))

    def committed(self) -> None:
        """Says that the bucket has a checkpoint with all rows so far."""
        self._do(self._send_held)

    def _later(self, send: Callable[[], object]) -> None:
        send() if self._held is None else self._held.append(send)

    def _send_held(self) -> None:
        held, self._held = self._held or [], None if self._held is None else []
        for send in held:
            send()

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Ends the tracked run, if the service takes the last rows in that time or `CLOSE_SECONDS`."""
        if (last := self._do(lambda: self._finish())) is not None:
            wait([last], max(0.0, min(timeout_seconds, CLOSE_SECONDS)))
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], object]) -> Future[None] | None:
        def attempt() -> None:
            try:
                if self._is_taking:
                    work()
            except Exception as error:
                self._is_taking = False
                said = " ".join(str(error).split())
                note(f"{self._kind} takes no rows, which stay in the bucket ({type(error).__name__}: {said:.200})")

        return self._pool.submit(attempt) if self._is_taking else None

    def _begin_wandb(self, settings: dict[str, Any], name: str, run_uri: str) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        # wandb writes files into the working folder by default, which may be read-only.
        folder = os.environ.get("WANDB_DIR") or default_cache_dir() / "wandb"
        Path(folder).mkdir(parents=True, exist_ok=True)
        # wandb drops rows at old steps, so rows that a resumed run sends again do no harm.
        known, log = hashlib.sha256(run_uri.encode()).hexdigest()[:16], self._log
        run = wandb.init(project=log.project, entity=log.entity, id=known, name=name, resume="allow", dir=folder)
        run.config.update(settings, allow_val_change=True)
        if run.url:
            note(f"wandb shows this run: {run.url}")
            self._rows_from = self._grids_from = run.starting_step
        else:
            note(f"`wandb sync {Path(run.dir).parent}` sends this attempt's rows when there is a network")
            self._held = []
        self._send = lambda numbers, step: run.log(numbers, step=step)
        self._send_grid = lambda grid, step: run.log({"samples": wandb.Image(grid)}, step=step)
        self._finish = run.finish

    def _begin_mlflow(self, settings: dict[str, Any], name: str, run_uri: str) -> None:
        import mlflow

        # Its other stores need a server, and a person who names a folder knows what it is.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_experiment(self._log.project)
        query = f"tags.`ddpm.run` = '{run_uri}'"
        before = mlflow.search_runs(
            experiment_names=[self._log.project], filter_string=query, max_results=1, output_format="list"
        )
        run = mlflow.start_run(before[0].info.run_id if before else None, run_name=name, tags={"ddpm.run": run_uri})
        note(f"mlflow has this run as {run.info.run_id} in {mlflow.get_tracking_uri()}")
        if before:
            client = mlflow.MlflowClient()
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch")]
            self._rows_from = max(steps, default=-1) + 1
            pictures = " ".join(one.path for one in client.list_artifacts(run.info.run_id, "images"))
            self._grids_from = max(map(int, re.findall(r"samples\Wstep\W(\d+)\W", pictures)), default=-1) + 1
        else:
            # MLflow refuses a parameter whose value a later attempt changed.
            mlflow.log_params(settings)
        self._send = lambda numbers, step: mlflow.log_metrics(numbers, step=step)
        self._send_grid = lambda grid, step: mlflow.log_image(grid, key="samples", step=step)
        self._finish = mlflow.end_run

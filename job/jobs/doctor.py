"""`ddpm doctor`: checks in seconds what a job would otherwise miss in its twentieth minute."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from job.exits import Exit, JobError
from job.jobs.backends import backend_for
from job.jobs.backends.base import Check
from job.jobs.backends.target import Target
from job.runs.layout import RUNS
from job.store import Retry, Store, is_remote, open_store

DOCTOR_FOLDER = "doctor"
"""The folder of the bucket in which an object is written, and deleted again."""
TRIAL_SECONDS = 10.0
"""The limit of a request: a late one may arrive after its object was deleted."""


def checks_of(target: Target, bucket: str) -> Iterator[Check]:
    """Yields the checks of all that a job on `target` needs; without those of a bucket if that is empty."""
    if bucket:
        yield from bucket_checks(bucket)
    try:
        with backend_for(target) as backend:
            yield from backend.checks(bucket)
    except JobError as error:
        yield Check.of_error(target.backend, error)


def bucket_checks(uri: str) -> Iterator[Check]:
    """Yields the checks of the credentials, and of all that a job does to a bucket."""
    try:
        store = open_store(uri, Retry(TRIAL_SECONDS))
    except JobError as error:
        yield Check.of_error("credentials", error)
        return
    yield Check("credentials", True, "found" if is_remote(uri) else "a folder of this machine needs none")
    yield Check.of("bucket write", lambda: _write_once_and_delete(store))
    yield Check.of("bucket list", lambda: f"runs found: {len(store.folders(RUNS)):,}")


def report(checks: Iterable[Check], as_json: bool) -> Exit:
    """Prints each check in a line at once, or all as JSON in the end, and returns the first failure's code."""
    done = []
    for check in checks:
        done.append(check)
        if not as_json:
            remedy = f": {check.remedy}" if check.remedy and not check.passed else ""
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<24}  {check.message}{remedy}", flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in done]))
    return next((check.exit_code for check in done if not check.passed), Exit.FINISHED)


def _write_once_and_delete(store: Store) -> str:
    store.check_writable(f"{DOCTOR_FOLDER}/{uuid.uuid4().hex}")
    return f"{store.uri} takes an object, refuses a second writer, and deletes it again"

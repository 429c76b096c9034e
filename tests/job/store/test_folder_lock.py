"""The lock of a folder: a process that sleeps inside holds others up for a bounded time, and is named."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from job.exits import BucketAwayError
from job.store import files, open_store


def test_a_holder_that_sleeps_is_waited_for_a_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.3)
    store = open_store(str(tmp_path))
    version = store.create("a", b"1")
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(BucketAwayError, match=r"\.lock was locked by another process for 0\.3 s: `fuser"):
            store.replace("a", b"2", version)
        assert 0.2 < time.monotonic() - began < 10
    finally:
        os.close(descriptor)
    assert store.replace("a", b"2", version)

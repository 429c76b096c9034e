"""Leases for tests: one that is taken, and one whose holder is far away and silent."""

from __future__ import annotations

import json
from typing import Any

from job.coordination import lease as lease_module
from job.coordination.lease import LEASE_KEY, Lease, ProcessIdentity
from job.stop import NEVER
from job.store import Store
from tests.job.launching import eventually as eventually

QUICK = {"RENEW_SECONDS": 0.1, "AGAIN_SECONDS": 0.05, "WATCH_SECONDS": 0.05}
"""The expiry stays as it is, so that a machine that is busy elsewhere makes no holder look dead."""
Notes = list[str]


def taken(run: Store, floor: int = 0, wait_seconds: float = 0, notes: Notes | None = None) -> Lease:
    return Lease.take(run, floor, wait_seconds, NEVER, (notes if notes is not None else []).append)


def record_in(run: Store) -> dict[str, Any]:
    return json.loads(run.read(LEASE_KEY).data)


def by_somebody_elsewhere(run: Store, fence: int = 4, since: str = "2031-01-01T00:00:00Z") -> bytes:
    """The lease of a holder on another machine, of whom nothing more is heard."""
    elsewhere = ProcessIdentity.of_this_process().model_copy(
        update={"host": "far-away", "pid": 77, "boot_id": "00000000-0000-4000-8000-000000000000"}
    )
    record = lease_module.LeaseRecord(
        fence=fence, holder=f"holder-{since}", renewal=9, released=False, since=since, process=elsewhere
    )
    run.put(LEASE_KEY, record.to_json())
    return record.to_json()

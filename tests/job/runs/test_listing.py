"""The list of a bucket's runs: what it asks of the bucket, and how long that takes where each answer takes a while."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from job.runs.records import LastStatus, Status
from job.store import open_store
from tests.faulty_proxy import FaultyProxy
from tests.job.command_line import environment
from tests.job.runs.leased import leased, write

ROUND_TRIP_SECONDS = 0.3
LIST = """
import sys, time
from job.verbs.run_listing import list_runs
from job.store import open_store
import rich.console, rich.table
# The client library takes half a second to import.
open_store(sys.argv[1])
began = time.monotonic()
list_runs(sys.argv[1])
print(time.monotonic() - began, file=sys.stderr)
"""


def put_runs(bucket: str, folder, count: int) -> None:
    """Runs of three attempts each, with two checkpoints and a status."""
    run = open_store(str(folder / "run"))
    for fence in range(1, 4):
        seen = LastStatus(state="stopped", images_seen=24, updated="2026-01-01T00:00:00Z") if fence > 1 else None
        update = {"previous": fence - 1 or None, "previous_seen": seen}
        run.create(f"attempts/{fence:06d}.json", leased(run, fence).record.model_copy(update=update).to_json())
    write(run, (2, 24), (3, 48))
    status = Status(
        state="stopped",
        fence=3,
        images_seen=48,
        target_images=96,
        epoch=1.0,
        loss=0.5,
        images_per_second=10.0,
        updated="2026-01-01T00:00:00Z",
    )
    run.put("status.json", status.to_json())
    objects = {entry.key: run.read(entry.key).data for entry in run.list()}

    def put(number: int) -> None:
        for key, data in objects.items():
            open_store(bucket).sub(f"runs/run-{number:03d}").put(key, data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(count)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 200])
def test_many_runs_take_few_requests_at_once(gcs_server, gcs_bucket, tmp_path, count):
    put_runs(gcs_bucket, tmp_path, count)
    # The bucket may only be asked by another process: it would share the interpreter with the proxy.
    with FaultyProxy(gcs_server) as proxy:
        proxy.passed = lambda request: (time.sleep(ROUND_TRIP_SECONDS), request)[1]
        done = subprocess.run(
            [sys.executable, "-c", LIST, gcs_bucket],
            env=environment(STORAGE_EMULATOR_HOST=proxy.url),
            capture_output=True,
            text=True,
            check=True,
        )
        rows = done.stdout.splitlines()[1:]
        assert len(rows) == count and all("48/96" in row.split() for row in rows)
        # The names of the runs; then the status of each.
        assert proxy.requests.total() == 1 + count
    # One after the other they would take 60 seconds.
    assert float(done.stderr.split()[0]) < 15

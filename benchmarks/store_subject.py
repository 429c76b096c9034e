"""The participants of `benchmarks.store`, each in a process: a store, or a cloud's own client; and a slow network.

It imports nothing of this checkout but `job.store`, which may be that of an earlier one.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROUND_TRIP_SECONDS = 0.02
BYTES_PER_SECOND = 50e6
"""The bandwidth of each connection at a distance."""
_SLICE_BYTES = 128 << 10
_QUEUED = 64
Operations = tuple[Callable[[str, str], object], Callable[[str, str], object]]
"""Uploads and downloads a whole file by its path and its key."""


def of_store(kind: str, bucket: str) -> Operations:
    """Returns the operations by `job.store`, that of this checkout or an earlier one."""
    from job.store import open_store

    store = open_store(f"{kind}://{bucket}")

    def upload(path: str, key: str) -> None:
        store.delete(key)
        # As a checkpoint's files are.
        store.upload(Path(path), key, fresh=True)

    return upload, lambda path, key: store.download(key, Path(path))


def of_gs(bucket: str) -> Operations:
    """Returns the operations by Google's client, as in its manual."""
    from google.cloud import storage

    blob = storage.Client(project="bench").bucket(bucket).blob
    return (
        lambda path, key: blob(key).upload_from_filename(path, timeout=600),
        lambda path, key: blob(key).download_to_filename(path, timeout=600),
    )


def of_s3(name: str) -> Operations:
    """Returns the operations by Amazon's client, as in its manual."""
    import boto3

    bucket: Any = boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).Bucket(name)
    return bucket.upload_file, lambda path, key: bucket.download_file(key, path)


def of_az(name: str) -> Operations:
    """Returns the operations by Microsoft's client, as in its manual."""
    from azure.storage.blob import ContainerClient

    container = ContainerClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"], name)

    def upload(path: str, key: str) -> None:
        with Path(path).open("rb") as file:
            container.upload_blob(key, file, overwrite=True, max_concurrency=4)

    def download(path: str, key: str) -> None:
        with Path(path).open("wb") as file:
            container.download_blob(key, max_concurrency=4).readinto(file)

    return upload, download


RAW = {"gs": of_gs, "s3": of_s3, "az": of_az}


def work(role: str, kind: str, bucket: str) -> None:
    """Does the operations that its standard input names, and prints the seconds of each."""
    upload, download = RAW[kind](bucket) if role == "raw" else of_store(kind, bucket)
    operations = {"upload": upload, "download": download}
    for line in sys.stdin:
        operation, *words = json.loads(line)
        began = time.perf_counter()
        operations[operation](*words)
        print(time.perf_counter() - began, flush=True)


def network(url: str) -> None:
    """Forwards bytes with the delay and the bandwidth of a distant connection."""
    server = urlsplit(url)
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        client, _ = listener.accept()
        there = socket.create_connection((str(server.hostname), server.port or 80))
        for one, other in ((client, there), (there, client)):
            late: queue.Queue[tuple[float, bytes]] = queue.Queue(_QUEUED)
            threading.Thread(target=_take, args=(one, late), daemon=True).start()
            threading.Thread(target=_give, args=(other, late), daemon=True).start()


def _take(end: socket.socket, late: queue.Queue[tuple[float, bytes]]) -> None:
    data = b"-"
    while data:
        try:
            data = end.recv(_SLICE_BYTES)
        except OSError:
            data = b""
        late.put((time.monotonic() + ROUND_TRIP_SECONDS / 2, data))


def _give(end: socket.socket, late: queue.Queue[tuple[float, bytes]]) -> None:
    free_at = 0.0
    try:
        while True:
            due, data = late.get()
            free_at = max(free_at, due) + len(data) / BYTES_PER_SECOND
            if (wait_seconds := free_at - time.monotonic()) > 0:
                time.sleep(wait_seconds)
            if not data:
                end.shutdown(socket.SHUT_WR)
                return
            end.sendall(data)
    except OSError:
        end.close()


if __name__ == "__main__":
    network(sys.argv[2]) if sys.argv[1] == "network" else work(*sys.argv[1:])

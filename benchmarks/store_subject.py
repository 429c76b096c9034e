"""The subjects of `benchmarks.store`, each in a process: a store, or a cloud's own client; and a slow network.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MIB = 1 << 20
ROUND_TRIP_SECONDS = 0.02
BYTES_PER_SECOND = 50e6
"""The bandwidth of each connection at a distance."""
_SLICE_BYTES = 128 << 10
_QUEUED = 64


class OfStore:
    """The operations by `job.store`, that of this checkout or an earlier one."""

    def __init__(self, kind: str, bucket: str) -> None:
        """Opens the store."""
        from job.store import open_store

        self._store = open_store(f"{kind}://{bucket}")

    def upload(self, path: str, key: str) -> None:
        """Uploads a whole file, as a checkpoint's are."""
        self._store.delete(key)
        self._store.upload(Path(path), key, fresh=True)

    def download(self, path: str, key: str) -> None:
        """Downloads a whole file."""
        self._store.download(key, Path(path))

    def ranges(self, count: str, key: str) -> None:
        """Reads ranges of 1 MiB each, far from each other."""
        with self._store.open(key) as file:
            size_bytes = file.seek(0, 2)
            for number in range(int(count)):
                file.seek(number * (size_bytes - MIB) // int(count))
                assert len(file.read(MIB)) == MIB

    def puts(self, count: str, key: str) -> None:
        """Writes objects of 4 KiB."""
        data = os.urandom(4096)
        for number in range(int(count)):
            self._store.put(f"{key}/{number}", data)

    def gets(self, count: str, key: str) -> None:
        """Reads objects of 4 KiB."""
        for number in range(int(count)):
            assert len(self._store.read(f"{key}/{number}").data) == 4096

    def list(self, count: str, key: str) -> None:
        """Lists a whole folder."""
        assert len(list(self._store.list(key))) == int(count)

    def fill(self, count: str, key: str) -> None:
        """Writes the objects to list."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda number: self._store.put(f"{key}/{number:06d}", b"1"), range(int(count))))


class OfRaw:
    """The same operations by the official client of each cloud, used as in its manual."""

    def __init__(self, kind: str, bucket: str) -> None:
        """Makes the client."""
        self._kind = kind
        if kind == "gs":
            from google.cloud import storage

            self._bucket = storage.Client(project="bench").bucket(bucket)
        elif kind == "s3":
            import boto3

            self._bucket = boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).Bucket(bucket)
        else:
            from azure.storage.blob import ContainerClient

            account = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
            self._bucket = ContainerClient.from_connection_string(account, bucket)

    def upload(self, path: str, key: str) -> None:
        """Uploads a whole file."""
        if self._kind == "gs":
            self._bucket.blob(key).upload_from_filename(path, timeout=600)
        elif self._kind == "s3":
            self._bucket.upload_file(path, key)
        else:
            with Path(path).open("rb") as file:
                self._bucket.upload_blob(key, file, overwrite=True, max_concurrency=4)

    def download(self, path: str, key: str) -> None:
        """Downloads a whole file."""
        if self._kind == "gs":
            self._bucket.blob(key).download_to_filename(path, timeout=600)
        elif self._kind == "s3":
            self._bucket.download_file(key, path)
        else:
            with Path(path).open("wb") as file:
                self._bucket.download_blob(key, max_concurrency=4).readinto(file)

    def ranges(self, count: str, key: str) -> None:
        """Reads ranges of 1 MiB each, far from each other."""
        size_bytes = self._size(key)
        for number in range(int(count)):
            start = number * (size_bytes - MIB) // int(count)
            if self._kind == "gs":
                data = self._bucket.blob(key).download_as_bytes(start=start, end=start + MIB - 1)
            elif self._kind == "s3":
                data = self._bucket.Object(key).get(Range=f"bytes={start}-{start + MIB - 1}")["Body"].read()
            else:
                data = self._bucket.download_blob(key, offset=start, length=MIB).readall()
            assert len(data) == MIB

    def puts(self, count: str, key: str) -> None:
        """Writes objects of 4 KiB."""
        data = os.urandom(4096)
        for number in range(int(count)):
            name = f"{key}/{number}"
            if self._kind == "gs":
                self._bucket.blob(name).upload_from_string(data)
            elif self._kind == "s3":
                self._bucket.put_object(Key=name, Body=data)
            else:
                self._bucket.upload_blob(name, data, overwrite=True)

    def gets(self, count: str, key: str) -> None:
        """Reads objects of 4 KiB."""
        for number in range(int(count)):
            name = f"{key}/{number}"
            if self._kind == "gs":
                data = self._bucket.blob(name).download_as_bytes()
            elif self._kind == "s3":
                data = self._bucket.Object(name).get()["Body"].read()
            else:
                data = self._bucket.download_blob(name).readall()
            assert len(data) == 4096

    def list(self, count: str, key: str) -> None:
        """Lists a whole folder."""
        if self._kind == "gs":
            found: Any = self._bucket.list_blobs(prefix=f"{key}/")
        elif self._kind == "s3":
            found = self._bucket.objects.filter(Prefix=f"{key}/")
        else:
            found = self._bucket.list_blobs(name_starts_with=f"{key}/")
        assert sum(1 for _ in found) == int(count)

    def _size(self, key: str) -> int:
        if self._kind == "gs":
            return int(self._bucket.get_blob(key).size)
        if self._kind == "s3":
            return int(self._bucket.Object(key).content_length)
        return int(self._bucket.get_blob_client(key).get_blob_properties().size)


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


def work() -> None:
    """Does the operations that its standard input names, and prints the seconds of each."""
    _, role, kind, bucket = sys.argv
    subject = OfRaw(kind, bucket) if role == "raw" else OfStore(kind, bucket)
    for line in sys.stdin:
        operation, *words = json.loads(line)
        began = time.perf_counter()
        getattr(subject, operation)(*words)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    network(sys.argv[2]) if sys.argv[1] == "network" else work()

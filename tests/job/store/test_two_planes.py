"""What moves and what decides keep out of each other's way, and nothing waits for what does not come."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import google_crc32c
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fsspec.config import conf

from job.exits import BadRequestError, BucketAwayError, Exit, NoPermissionError, StoppedError
from job.stop import Stop
from job.store import Retry, Store, open_store, retry
from tests.conftest import new_bucket
from tests.faulty_proxy import Fault, FaultyProxy, Request
from tests.job.answering import JsonHandler, serving
from tests.job.command_line import ddpm, ddpm_here, environment, refused
from tests.job.conftest import point_at
from tests.job.store.test_remote import LARGE_BYTES, every_call
from tests.servers import SERVERS

FIRST_MOMENT_SECONDS = 0.5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(LARGE_BYTES))
    return path


@pytest.fixture(params=["reads nothing", "answers nothing"])
def silent_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server that takes connections, and never answers."""
    if request.param == "reads nothing":
        with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    else:
        with FaultyProxy("http://nowhere") as proxy:
            proxy.hang()
            yield proxy.url


def stopped_at(store: Store, stop: Stop, file: Path) -> list[float]:
    """When each operation, all at once, heard of a stop, in seconds since it was asked for."""
    asked_at: list[float] = []

    def ask() -> None:
        asked_at.append(time.monotonic())
        stop.request("SIGTERM")

    def heard_at(call) -> float:
        with pytest.raises(StoppedError):
            call()
        return time.monotonic()

    calls = every_call(store, file).values()
    with ThreadPoolExecutor(len(calls)) as pool:
        threading.Timer(FIRST_MOMENT_SECONDS, ask).start()
        heard = list(pool.map(heard_at, calls))
    return [at - asked_at[0] for at in heard]


def test_stop_is_heard_within_a_second(remote_bucket: str, silent_url: str, file: Path, monkeypatch) -> None:
    stop = Stop(30)
    point_at(silent_url, monkeypatch)
    assert max(stopped_at(open_store(f"{remote_bucket}/runs", Retry(60, stop)), stop, file)) < 1
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.TOO_MANY, Fault.RESET, Fault.SHORT])
def test_one_failure_is_one_request(proxy: FaultyProxy, remote_bucket: str, tmp_path: Path, fault: Fault) -> None:
    """Only our own retry asks again; a library's would outlive a lease."""
    (tmp_path / "file").write_bytes(b"1" * 1000)
    store = open_store(remote_bucket, Retry(0))
    # The first write to a bucket may take its server a while.
    version = open_store(remote_bucket, Retry(20)).create("key", b"0123456789" * 1000)
    calls = every_call(store, tmp_path / "file") | {
        "create": lambda: store.create("new", b"1"),
        "replace": lambda: store.replace("key", b"1", version),
        "upload": lambda: store.upload(tmp_path / "file", "new"),
    }
    if fault is Fault.SHORT:
        # Other answers have nothing that could be missing.
        calls = {name: calls[name] for name in ("read", "download", "open", "list", "folders")}
    # When a connection that was idle is reset, aiohttp takes another one, at once.
    most = 2 if fault is Fault.RESET else 1
    for name, call in calls.items():
        proxy.inject(fault, ".", times=most)
        before = proxy.requests.total()
        with pytest.raises(BucketAwayError):
            call()
        assert proxy.requests.total() - before <= most, name
        proxy.forget()


TOKEN_SECONDS = 3.0


class Tokens(JsonHandler):
    """Google's server of tokens: what it gives is soon to be renewed, and the second one takes its time."""

    given: ClassVar[list[str]]
    delays_seconds: ClassVar[list[float]]
    expires_seconds: ClassVar[list[int]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        number = len(self.given)
        self.given.append(f"token-{number}")
        time.sleep(self.delays_seconds[min(number, len(self.delays_seconds) - 1)])
        expires_seconds = self.expires_seconds[min(number, len(self.expires_seconds) - 1)]
        self.say(200, {"access_token": f"token-{number}", "expires_in": expires_seconds})


@contextmanager
def signed_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, delays_seconds: list[float], expires_seconds: list[int]
) -> Iterator[type[Tokens]]:
    """A service account's key, whose tokens come from a server of ours."""
    about = {"given": [], "delays_seconds": delays_seconds, "expires_seconds": expires_seconds}
    with serving(handler := type("OwnTokens", (Tokens,), about)) as url:
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {"type": "service_account", "client_email": "job@project.iam.gserviceaccount.com", "token_uri": url}
        (folder / "key.json").write_text(json.dumps(account | {"private_key": key.decode(), "project_id": "project"}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "key.json"))
        endpoint = os.environ["STORAGE_EMULATOR_HOST"]
        # With an emulator nobody signs in.
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        monkeypatch.setitem(conf, "gs", {"endpoint_url": endpoint})
        yield handler


def renewals(store: Store, until: threading.Event) -> list[float]:
    """How long each renewal of a lease took, in seconds, until then."""
    version, took = store.create("lease", b"0"), []
    while not until.is_set():
        began = time.monotonic()
        version = store.replace("lease", str(began).encode(), version)
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    return took


def test_lease_outlives_the_fetch_of_tokens(gcs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with signed_in(tmp_path, monkeypatch, [0, TOKEN_SECONDS, 0], [200, 3600]) as tokens:
        store, is_over = open_store(gcs_bucket), threading.Event()
        store.put("image", b"1")
        threading.Timer(TOKEN_SECONDS, is_over.set).start()
        with ThreadPoolExecutor(1) as pool:
            took = pool.submit(renewals, store, is_over)
            while not is_over.is_set():
                began = time.monotonic()
                store.read("image")
                assert time.monotonic() - began < 1
        assert len(took.result()) > TOKEN_SECONDS / 0.5
        assert max(took.result()) < 1
        time.sleep(0.5)
        store.read("image")
        assert tokens.given == ["token-0", "token-1"]


def test_stop_ends_wait_for_tokens(gcs_bucket: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(30)
    with signed_in(file.parent, monkeypatch, [TOKEN_SECONDS], [3600]):
        assert max(stopped_at(open_store(gcs_bucket, Retry(60, stop)), stop, file)) < 1


def test_refused_token_is_fetched_again(gcs_bucket: str, gcs_server: str, tmp_path: Path, monkeypatch) -> None:
    refused = {"token-0"}

    def refusing(request: Request) -> bytes | None:
        named = {name.lower(): value for name, value in request.headers}
        token = named.get("authorization", "").removeprefix("Bearer ")
        body = b'{"error": {"code": 401, "message": "Invalid Credentials"}}'
        head = f"HTTP/1.1 401 No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        return head + body if token in refused or not token else None

    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.instead = refusing
        with signed_in(tmp_path, monkeypatch, [0], [3600]) as tokens:
            store = open_store(gcs_bucket)
            (tmp_path / "large").write_bytes(bytes(LARGE_BYTES))
            calls = every_call(store, tmp_path / "large")
            for name in ("upload", "put", "list", "download"):
                refused.add(tokens.given[-1] if tokens.given else "")
                before = len(tokens.given)
                calls[name]()
                assert len(tokens.given) == before + (1 if before else 2)
            refused |= {f"token-{number}" for number in range(100)}
            with pytest.raises(NoPermissionError, match="no usable Google credentials"):
                store.read("key")


@pytest.mark.slow
def test_large_uploads_delay_no_lease(gcs_bucket: str, gcs_server: str, tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "large").open("wb") as large:
        large.truncate(MOVED_BYTES)
    # The server of the tests answers nobody while it takes so much.
    taken = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\nConnection: close\r\n\r\n{"generation": "1"}'
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.instead = lambda request: taken if len(request.body) > MOVED_BYTES else None
        store, is_over = open_store(gcs_bucket), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            took = pool.submit(renewals, store, is_over)
            store.upload(tmp_path / "large", "large")
            is_over.set()
    assert len(took.result()) > 10
    assert max(took.result()) < 1


MOVED_BYTES, MOST_ABOVE_BYTES = 600 * 10**6, 64 << 20
MOVE = """
import json, re, sys, threading
from pathlib import Path
from job.store import open_store

def held_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def watch():
    while not is_over.wait(0.02):
        held.append(held_bytes())

store, (small, large, down) = open_store(sys.argv[1]), map(Path, sys.argv[2:])
above = {}
for path in (small, large):
    moves = {
        "up": lambda: store.upload(path, path.name),
        "in parts": lambda: store.upload(path, "own-" + path.name, fresh=True),
        "down": lambda: store.download(path.name, down),
    }
    for name, move in moves.items():
        before, is_over = held_bytes(), threading.Event()
        held = [before]
        watching = threading.Thread(target=watch)
        watching.start()
        move()
        is_over.set()
        watching.join()
        above[name] = max(held) - before
    assert down.stat().st_size == path.stat().st_size
    down.unlink()
print(json.dumps(above))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_large_object_takes_little_memory(remote_bucket: str, tmp_path: Path) -> None:
    for name, size_bytes in (("small", 1 << 20), ("large", MOVED_BYTES)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size_bytes)
    words = [sys.executable, "-c", MOVE, remote_bucket, *(str(tmp_path / name) for name in ("small", "large", "down"))]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout).values()) < MOST_ABOVE_BYTES


def test_large_upload_is_one_conditional_request(gcs_bucket: str, gcs_server: str, file: Path, monkeypatch) -> None:
    # What gcsfs takes for the end of a content is part of this one.
    file.write_bytes(b"\r\n--==0==--" * 200_000)
    seen: list[Request] = []
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.instead = lambda request: seen.append(request) if "/upload/" in request.target else None
        store = open_store(gcs_bucket)
        store.upload(file, "large")
        store.download("large", file.with_name("out"))
    assert file.with_name("out").read_bytes() == file.read_bytes()
    (request,) = seen
    assert "uploadType=multipart" in request.target
    assert "ifGenerationMatch=0" in request.target
    checksum = base64.b64encode(google_crc32c.Checksum(file.read_bytes()).digest()).decode()
    assert json.loads(request.body.split(b"\r\n\r\n")[1].split(b"\r\n--")[0])["crc32c"] == checksum


@pytest.mark.parametrize("which", ["gs", "s3-moto"])
def test_bucket_without_conditions_is_refused(which: str, request, monkeypatch, tmp_path: Path) -> None:
    """Before anything is computed: a proxy on the way drops what only the first writer may do."""
    uri = new_bucket(which, request, monkeypatch, tmp_path)
    with FaultyProxy(str(request.getfixturevalue("gcs_server" if which == "gs" else "moto_server"))) as proxy:
        point_at(proxy.url, monkeypatch)
        open_store(uri).check_writable("probe")
        proxy.passed = without_condition
        with pytest.raises(BadRequestError, match=r"lets a second writer overwrite the first.*honours If-None-Match"):
            open_store(uri).check_writable("probe")
        assert list(open_store(uri).list()) == []


def without_condition(request: Request) -> Request:
    headers = tuple((name, value) for name, value in request.headers if name.lower() != "if-none-match")
    return Request(request.method, request.target.replace("ifGenerationMatch", "x"), headers, request.body)


def test_a_local_bucket_imports_no_cloud(tmp_path: Path) -> None:
    script = """
import sys
from job.store import open_store
store = open_store(sys.argv[1])
store.create("a", b"1")
store.read("a"), list(store.list())
clouds = {"fsspec", "gcsfs", "google.cloud", "botocore", "obstore", "aiohttp", "requests"}
print(sorted(clouds & set(sys.modules)))
"""
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert child.stdout == "[]\n"


SAYING = """
import sys
from job.store import open_store
store = open_store(sys.argv[1])
version = store.create("small", b"1")
store.put("large", bytes(3 << 20))
print(store.read("small").data, len(store.read("large").data), [entry.key for entry in store.list()])
store.delete("small")
"""


@pytest.mark.parametrize("way", ["one variable", "a variable each", "a file"])
def test_configuration_of_fsspec_applies(remote_bucket: str, way: str, started, tmp_path: Path, monkeypatch) -> None:
    """Where the bucket is, and who pays, comes from fsspec's variables or its file; no other says it."""
    scheme = remote_bucket.partition("://")[0]
    asked: list[Request] = []
    with FaultyProxy(started(scheme)) as proxy:
        proxy.instead = lambda request: asked.append(request)
        options, folder = SERVERS[scheme].options(proxy.url), tmp_path / "config"
        folder.mkdir()
        variables = {
            "one variable": {f"FSSPEC_{scheme.upper()}": json.dumps(options)},
            "a variable each": {f"FSSPEC_{scheme}_{name}".upper(): str(value) for name, value in options.items()},
            "a file": {},
        }[way]
        if way == "a file":
            (folder / "conf.json").write_text(json.dumps({scheme: options}))
        for name in SERVERS[scheme].variables(""):
            if not name.startswith("AWS_ACCESS") and not name.startswith("AWS_SECRET"):
                monkeypatch.delenv(name, raising=False)
        env = environment(**variables, FSSPEC_CONFIG_DIR=str(folder))
        words = [sys.executable, "-c", SAYING, remote_bucket]
        child = subprocess.run(words, check=False, capture_output=True, text=True, env=env)
    assert child.stdout == "b'1' 3145728 ['large', 'small']\n", child.stderr
    assert asked
    if scheme == "gs":
        assert all("userProject=my-project" in request.target for request in asked)
    if scheme == "s3":
        assert all(dict(request.headers)["x-amz-request-payer"] == "requester" for request in asked)


def test_invalid_fsspec_configuration_is_one_line(tmp_path: Path, monkeypatch) -> None:
    words = r"fsspec's configuration \(~/.config/fsspec/\*.json, FSSPEC_… variables\) is not valid"
    for uri, its in (("s3://bucket", {"endpoint_url": 5}), ("https://host/images", {"client_kwargs": 5})):
        monkeypatch.setitem(conf, uri.partition(":")[0], its)
        line = refused(ddpm_here("data", "pack", uri, "name", "--size", 16, "--bucket", tmp_path), Exit.BAD_CONFIG)
        assert re.search(words, line)
    # fsspec reads its variables when it is imported.
    for uri, variables in (("gs://bucket", {"FSSPEC_GS": '{"token":'}), ("sftp://host/images", {"FSSPEC_SFTP": "[1]"})):
        script = "import sys; from job.store import open_to_read; open_to_read(sys.argv[1])"
        child = [sys.executable, "-c", script, uri]
        done = subprocess.run(child, env=environment(**variables), capture_output=True, text=True, check=False)
        assert re.search(f"BadConfigError: {words}", done.stderr)
    for name, content in (("conf.json", '["a"]'), ("conf.ini", "[gs\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        done = ddpm("data", "list", "--bucket", "gs://bucket", FSSPEC_CONFIG_DIR=str(folder))
        assert re.search(words, refused(done, Exit.BAD_CONFIG))


@pytest.mark.parametrize("silent_url", ["reads nothing"], indirect=True)
@pytest.mark.parametrize("which", ["az", "s3"])
def test_wait_for_tokens_ends(which: str, silent_url: str, tmp_path: Path, monkeypatch) -> None:
    """Google's is above."""
    monkeypatch.setattr(retry, "SILENCE_SECONDS", 0.5)
    (tmp_path / "token").write_text("a token of the pod")
    variables = {
        "az": {
            **dict.fromkeys(("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"), "somebody"),
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_AUTHORITY_HOST": silent_url.replace("http:", "https:"),
        },
        "s3": {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/job",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ENDPOINT_URL_STS": silent_url,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }[which]
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(BucketAwayError, match="timed out"):
        open_store(f"{which}://bucket", Retry(1)).read("key")
    assert time.monotonic() - began < 5


class RefusingTokens(JsonHandler):
    """A login server that knows nobody, or an Azure that has trouble with its own."""

    status: ClassVar[int]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say(self.status, {"error": "invalid_client", "error_description": "Invalid secret: top-secret"})


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(401, NoPermissionError, "no usable Azure credentials .*az login"), (503, BucketAwayError, "is away")],
)
def test_refused_sign_in_to_azure_is_named(status, error, words, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "token").write_text("a token of the pod")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    principal = dict.fromkeys(("AZURE_CLIENT_ID", "AZURE_TENANT_ID"), "somebody")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    with serving(type("Server", (RefusingTokens,), {"status": status})) as url:
        for secret in ({"AZURE_CLIENT_SECRET": "top-secret"}, {"AZURE_FEDERATED_TOKEN_FILE": str(tmp_path / "token")}):
            with monkeypatch.context() as patch:
                for name, value in {**principal, **secret, "AZURE_AUTHORITY_HOST": url}.items():
                    patch.setenv(name, value)
                with pytest.raises(error, match=words) as caught:
                    open_store("az://bucket", Retry(0.1)).read("key")
            assert "top-secret" not in str(caught.value)


def test_azure_cli_signs_in(azure_container: str, azurite_server: str, tmp_path: Path, monkeypatch) -> None:
    """Whoever has signed in with it; Azurite takes a token at https:// only, so the request is looked at."""
    asked: list[Request] = []
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / ".azure").mkdir()
    (tmp_path / ".azure" / "azureProfile.json").write_text("{}")
    token = {"accessToken": "its-token", "expiresOn": "2100-01-01 00:00:00.000000", "tokenType": "Bearer"}
    with FaultyProxy(azurite_server) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.url}/devstoreaccount1")
        proxy.instead = lambda request: asked.append(request)
        for answer, words in (
            (f"echo '{json.dumps(token | {'subscription': 's', 'tenant': 't'})}'", "grant the account|credentials"),
            ("echo 'ERROR: Please run az login' >&2; exit 1", "no usable Azure credentials"),
        ):
            (tmp_path / "az").write_text(f"#!/bin/sh\n{answer}\n")
            (tmp_path / "az").chmod(0o755)
            with pytest.raises(NoPermissionError, match=words):
                open_store(azure_container, Retry(0)).read("key")
    assert [dict(request.headers)["authorization"] for request in asked] == ["Bearer its-token"]

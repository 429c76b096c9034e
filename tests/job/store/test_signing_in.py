"""Who asks a bucket, and by which settings: credentials, tokens that come late, fsspec's configuration, libraries."""

from __future__ import annotations

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
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fsspec.config import conf

from job import exits
from job.exits import BadRequestError, BucketAwayError, Exit, JobError, NoPermissionError
from job.stop import Stop
from job.store import KINDS, Retry, Store, open_store, retry
from job.store.base import Entry
from tests.faulty_proxy import FaultyProxy, Request
from tests.job.answering import JsonHandler, serving
from tests.job.command_line import ddpm, ddpm_here, environment, raised, refused
from tests.job.launching import lasting
from tests.job.store.test_faults import LARGE_BYTES, seconds_after_stop
from tests.job.store.test_store import all_raise, every_call
from tests.servers import SECRET, SERVERS

TOKEN_SECONDS = 3.0


class Tokens(JsonHandler):
    """A server of tokens. Each answer is a status, the seconds after which it comes, and those until it expires."""

    given: ClassVar[list[str]]
    answers: ClassVar[list[tuple[int, float, int]]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        number = len(self.given)
        self.given.append(f"token-{number}")
        status, delay_seconds, expires_seconds = self.answers[min(number, len(self.answers) - 1)]
        time.sleep(delay_seconds)
        refusal = {"error": "invalid_client", "error_description": "Invalid secret: top-secret"}
        token = {"access_token": f"token-{number}", "expires_in": expires_seconds}
        self.say(status, token if status == 200 else refusal)


def giving(*answers: tuple[int, float, int]) -> type[Tokens]:
    return type("OwnTokens", (Tokens,), {"given": [], "answers": answers})


@contextmanager
def signed_in(folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: type[Tokens]) -> Iterator[None]:
    """A service account's key, whose tokens come from a server of ours."""
    with serving(tokens) as url:
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {"type": "service_account", "client_email": "job@project.iam.gserviceaccount.com", "token_uri": url}
        (folder / "key.json").write_text(json.dumps(account | {"private_key": key.decode(), "project_id": "project"}))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "key.json"))
        monkeypatch.setitem(conf, "gs", {"endpoint_url": os.environ["STORAGE_EMULATOR_HOST"]})
        # With an emulator nobody signs in.
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        yield


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
    """The first token is soon to be renewed, and the second one takes its time."""
    tokens = giving((200, 0, 200), (200, TOKEN_SECONDS, 3600), (200, 0, 3600))
    with signed_in(tmp_path, monkeypatch, tokens):
        store, is_over = open_store(gcs_bucket), threading.Event()
        store.put("image", b"1")
        threading.Timer(TOKEN_SECONDS, is_over.set).start()
        with ThreadPoolExecutor(1) as pool:
            took = pool.submit(renewals, store, is_over)
            while not is_over.is_set():
                with lasting(at_most=1):
                    store.read("image")
        assert len(took.result()) > TOKEN_SECONDS / 0.5
        assert max(took.result()) < 1
        time.sleep(0.5)
        store.read("image")
        assert tokens.given == ["token-0", "token-1"]


@pytest.mark.slow
def test_large_uploads_delay_no_lease(gcs_bucket: str, gcs_server: str, tmp_path: Path, monkeypatch) -> None:
    size_bytes = 600 * 10**6
    with (tmp_path / "large").open("wb") as large:
        large.truncate(size_bytes)
    # The server of the tests answers nobody while it takes so much.
    taken = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\nConnection: close\r\n\r\n{"generation": "1"}'
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.instead = lambda request: taken if len(request.body) > size_bytes else None
        store, is_over = open_store(gcs_bucket), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            took = pool.submit(renewals, store, is_over)
            store.upload(tmp_path / "large", "large")
            is_over.set()
    assert len(took.result()) > 10
    assert max(took.result()) < 1


def test_stop_ends_wait_for_tokens(gcs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(30)
    (tmp_path / "file").write_bytes(b"1")
    with signed_in(tmp_path, monkeypatch, giving((200, TOKEN_SECONDS, 3600))):
        assert seconds_after_stop(open_store(gcs_bucket, Retry(60, stop)), stop, tmp_path / "file") < 1


def test_refused_token_is_fetched_again(gcs_bucket: str, gcs_server: str, tmp_path: Path, monkeypatch) -> None:
    unknown, tokens = {"token-0"}, giving((200, 0, 3600))

    def refusing(request: Request) -> bytes | None:
        named = {name.lower(): value for name, value in request.headers}
        token = named.get("authorization", "").removeprefix("Bearer ")
        body = b'{"error": {"code": 401, "message": "Invalid Credentials"}}'
        head = f"HTTP/1.1 401 No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        return head + body if token in unknown or not token else None

    (tmp_path / "large").write_bytes(bytes(LARGE_BYTES))
    with FaultyProxy(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        proxy.instead = refusing
        with signed_in(tmp_path, monkeypatch, tokens):
            calls = every_call(open_store(gcs_bucket), tmp_path / "large")
            for name in ("upload", "put", "list", "download"):
                unknown.add(tokens.given[-1] if tokens.given else "")
                before = len(tokens.given)
                calls[name]()
                assert len(tokens.given) == before + (1 if before else 2)
            unknown |= {f"token-{number}" for number in range(100)}
            raised(NoPermissionError, "no usable Google credentials", calls["read"])


OWNER = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
ROLE = {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/job", "AWS_WEB_IDENTITY_TOKEN_FILE": "TOKEN"}
ROLE |= {"AWS_ENDPOINT_URL_STS": "SILENT", "AWS_DEFAULT_REGION": "us-east-1"}
SOMEBODY = dict.fromkeys(("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_STORAGE_ACCOUNT_NAME"), "somebody")
SECRETLY, BY_FILE = {"AZURE_CLIENT_SECRET": "top-secret"}, {"AZURE_FEDERATED_TOKEN_FILE": "TOKEN"}
LOGIN, A_URL = "AZURE_AUTHORITY_HOST", "AWS_ENDPOINT_URL must be the URL of"
SETTINGS: list[tuple[str, dict[str, str], type[JobError], str]] = [
    ("gs", {}, NoPermissionError, "gcloud auth application-default login"),
    ("s3", {}, NoPermissionError, r"bucket: no usable AWS credentials \(NoCred.*AWS_ACCESS_KEY_ID"),
    ("s3", {"AWS_PROFILE": "nobody"}, NoPermissionError, "ProfileNotFound"),
    ("s3", OWNER | {"AWS_ENDPOINT_URL": "owner:top-secret@somewhere"}, BadRequestError, A_URL),
    ("s3", OWNER | {"AWS_ENDPOINT_URL_S3": "http://"}, BadRequestError, A_URL),
    ("s3", OWNER | {"AWS_ENDPOINT_URL": "http://owner:top-secret@127.0.0.1:1"}, BadRequestError, "without a user and"),
    ("s3", OWNER | {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"}, BucketAwayError, "is away"),
    ("s3", OWNER | {"AWS_DEFAULT_REGION": "no region"}, BadRequestError, "check the AWS settings"),
    ("s3", ROLE, BucketAwayError, "timed out"),
    ("az", SOMEBODY | SECRETLY | {LOGIN: "SILENT TLS"}, BucketAwayError, "timed out"),
    *(
        ("az", SOMEBODY | way | {LOGIN: server}, error, words)
        for way in (SECRETLY, BY_FILE)
        for server, error, words in (
            ("KNOWS NOBODY", NoPermissionError, "no usable Azure credentials .*az login"),
            ("BROKEN", BucketAwayError, "is away"),
        )
    ),
]


@pytest.mark.parametrize(("scheme", "variables", "error", "words"), SETTINGS)
def test_wrong_settings_are_named(scheme: str, variables, error, words: str, tmp_path: Path, monkeypatch) -> None:
    """In time, also where a login server keeps silent, and without the passwords in them."""
    monkeypatch.setattr(retry, "SILENCE_SECONDS", 0.5)
    (tmp_path / "token").write_text("a token of the pod")
    for name in [name for server in SERVERS.values() for name in server.variables("")]:
        monkeypatch.delenv(name, raising=False)
    nothing = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    nothing |= dict.fromkeys(("HOME", "CLOUDSDK_CONFIG"), str(tmp_path))
    nothing |= dict.fromkeys(("AWS_EC2_METADATA_DISABLED", "NO_GCE_CHECK"), "true")
    with (
        socket.create_server(("127.0.0.1", 0), backlog=200) as silent,
        serving(giving((401, 0, 0))) as refusing,
        serving(giving((503, 0, 0))) as broken,
    ):
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        places = {"TOKEN": str(tmp_path / "token"), "KNOWS NOBODY": refusing, "BROKEN": broken}
        places |= {"SILENT": f"http://{address}", "SILENT TLS": f"https://{address}"}
        for name, value in (nothing | variables).items():
            monkeypatch.setenv(name, places.get(value, value))
        began = time.monotonic()
        line = raised(error, words, lambda: open_store(f"{scheme}://bucket", Retry(1)).read("key"))
    assert time.monotonic() - began < 5
    assert f"{scheme}://bucket" in line
    assert "top-secret" not in line


def test_wrong_s3_rights_are_named(seaweedfs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"2")
    version = open_store(seaweedfs_bucket).create("key", b"1")
    for variable, name, words in (
        ("AWS_ACCESS_KEY_ID", "reader", rf"no permission.*s3:ListBucket on {seaweedfs_bucket}"),
        ("AWS_ACCESS_KEY_ID", "quite-another", r"no usable AWS credentials \([A-Za-z]+\): run"),
        ("AWS_SECRET_ACCESS_KEY", "quite-another", r"no usable AWS credentials \([A-Za-z]+\): run"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, name)
            store = open_store(seaweedfs_bucket)
        calls = every_call(store, file, "key", version)
        if name == "reader":
            assert list(store.list()) == [Entry("key", 1)]
            upload = {"upload": partial(store.upload, file, "part")}
            calls = upload | {"replace": calls["replace"], "delete": calls["delete"]}
        for line in all_raise(NoPermissionError, words, calls.values()):
            assert "quite-another" not in line
            assert SECRET not in line
    assert open_store(seaweedfs_bucket).read("key").data == b"1"


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
    token |= {"subscription": "s", "tenant": "t"}
    with FaultyProxy(azurite_server) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.url}/devstoreaccount1")
        proxy.instead = lambda request: asked.append(request)
        gives = f"echo '{json.dumps(token)}'"
        refuses = "echo 'ERROR: Please run az login' >&2; exit 1"
        for answer, words in ((gives, "grant the account|credentials"), (refuses, "no usable Azure credentials")):
            (tmp_path / "az").write_text(f"#!/bin/sh\n{answer}\n")
            (tmp_path / "az").chmod(0o755)
            raised(NoPermissionError, words, open_store(azure_container, Retry(0)).read, "key")
    assert [dict(request.headers)["authorization"] for request in asked] == ["Bearer its-token"]


SAYING = """
import sys
from job.store import open_store
store = open_store(sys.argv[1])
version = store.create("small", b"1")
store.put("large", bytes(3 << 20))
print(store.read("small").data, len(store.read("large").data), [entry.key for entry in store.list()])
store.delete("small")
stream = store.open("large")
print(stream.read(5))
"""


@pytest.mark.parametrize("way", ["one variable", "a variable each", "a file"])
def test_configuration_of_fsspec_applies(remote_bucket: str, way: str, started, tmp_path: Path, monkeypatch) -> None:
    """Where the bucket is, and who pays, comes from fsspec's variables or its file; a process with it ends quietly."""
    scheme, folder = remote_bucket.partition("://")[0], tmp_path / "config"
    asked: list[Request] = []
    folder.mkdir()
    with FaultyProxy(started(scheme)) as proxy:
        proxy.instead = lambda request: asked.append(request)
        options, variables = SERVERS[scheme].options(proxy.url), {"FSSPEC_CONFIG_DIR": str(folder)}
        if way == "one variable":
            variables[f"FSSPEC_{scheme.upper()}"] = json.dumps(options)
        elif way == "a variable each":
            variables |= {f"FSSPEC_{scheme}_{name}".upper(): str(value) for name, value in options.items()}
        else:
            # What is true is the project of the options.
            named = {"requester_pays": True, "project": "my-project"} if scheme == "gs" else {}
            (folder / "conf.json").write_text(json.dumps({scheme: options | named}))
        for name in SERVERS[scheme].variables(""):
            if not name.startswith(("AWS_ACCESS", "AWS_SECRET")):
                monkeypatch.delenv(name, raising=False)
        words = [sys.executable, "-W", "default", "-c", SAYING, remote_bucket]
        child = subprocess.run(words, check=False, capture_output=True, text=True, env=environment(**variables))
    assert (child.stdout, child.stderr) == ("b'1' 3145728 ['large', 'small']\nb'\\x00\\x00\\x00\\x00\\x00'\n", "")
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


def test_missing_cloud_library_names_its_install(tmp_path: Path, monkeypatch) -> None:
    """Where the program is installed without a checkout."""
    monkeypatch.setattr(exits, "__file__", str(tmp_path / "job" / "exits.py"))
    for kind in KINDS:
        monkeypatch.delitem(sys.modules, kind.store.partition(":")[0], raising=False)
        monkeypatch.setitem(sys.modules, SERVERS[kind.schemes[0]].library, None)
        how = f"{sys.executable} -m pip install 'ddpm-job[{kind.extra}] @ file:///PATH/TO/ITS/WHEEL.whl'"
        raised(BadRequestError, f"{re.escape(how)}$", open_store, f"{kind.schemes[0]}://bucket")

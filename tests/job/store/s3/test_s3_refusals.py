"""What S3 and its libraries say no to, and in which words a person learns it; on each server that the tests have."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from job.exits import BadRequestError, BucketAwayError, Exit, JobError, MissingInputError, NoPermissionError
from job.store import Entry, ObjectMissingError, Retry, Store, open_store
from tests.conftest import SECRET
from tests.job.store.proxy import Proxy, every_call
from tests.job.store.s3.test_s3 import refusal

FORBIDDEN = "User: arn:aws:iam::123456789012:user/trainer is not authorized to perform: s3:PutObject on the bucket"


ECHO = f"The Credential=owner/20261125 with the secret {SECRET} is not known"


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
@pytest.mark.parametrize(
    ("status", "code", "message", "error", "words"),
    [
        (403, "AccessDenied", FORBIDDEN, NoPermissionError, r"no permission s3:PutObject \(AccessDenied\): grant the "),
        (401, "Unauthorized", ECHO, NoPermissionError, r"no permission \(Unauthorized\): grant the account in use"),
        (403, "InvalidAccessKeyId", ECHO, NoPermissionError, r"no usable AWS credentials \(InvalidAccessKeyId\): run"),
        (403, "SignatureDoesNotMatch", ECHO, NoPermissionError, r"credentials \(SignatureDoesNotMatch\)"),
        (400, "ExpiredToken", ECHO, NoPermissionError, r"credentials \(ExpiredToken\): run `aws configure`"),
        (400, "AuthorizationHeaderMalformed", ECHO, NoPermissionError, r"\(AuthorizationHeaderMalformed\)"),
        (403, "RequestTimeTooSkewed", ECHO, NoPermissionError, "this machine's clock is wrong"),
        (400, "InvalidRequest", "No such bucket type", BadRequestError, "refused with 400: No such bucket type"),
        (501, "NotImplemented", "A header is not known", BadRequestError, "refused with 501: A header is not known"),
        (503, "SlowDown", "Please reduce your request rate.", BucketAwayError, "away for 0.5 s"),
        (500, "InternalError", "We encountered an internal error.", BucketAwayError, "away for 0.5 s"),
        (429, "TooManyRequests", "Slower", BucketAwayError, "away for 0.5 s"),
    ],
)
def test_refusals_are_told_in_a_line(
    proxy: Proxy, s3_bucket: str, file: Path, status: int, code: str, message: str, error: type[JobError], words: str
) -> None:
    proxy.instead = lambda data: refusal(data, status, code, message)

    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(error, match=words) as caught:
            call()
        return str(caught.value)

    with ThreadPoolExecutor(16) as pool:
        store = open_store(s3_bucket, Retry(0.5 if error is BucketAwayError else 10))
        for line in pool.map(refused, every_call(store, file)):
            assert s3_bucket in line
            assert "\n" not in line
            assert SECRET not in line
            assert "owner" not in line
            assert len(line) < 450
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "AccessDenied", NoPermissionError, r"no permission s3:GetObject \(AccessDenied\)"),
        (400, "InvalidRequest", BadRequestError, "refused with 400: without s3:GetObject this is invalid"),
        (404, "NoSuchKey", ObjectMissingError, "no object at"),
    ],
)
def test_refused_content(
    proxy: Proxy, store: Store, file: Path, status: int, code: str, error: type[JobError], words: str
) -> None:
    store.upload(file, "part")
    stream = store.open("part")
    answer = refusal(b"GET", status, code, "without s3:GetObject this is invalid")
    proxy.instead = lambda data: answer if re.match(rb"GET /\S+/part", data) else None
    for read in (lambda: store.download("part", file.with_name("out")), stream.read):
        with pytest.raises(error, match=words) as caught:
            read()
        assert store.uri_of("part") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_missing_bucket_is_not_a_missing_object(s3_server: str, file: Path) -> None:
    store = open_store("s3://no-such-bucket/runs")
    for call in every_call(store, file):
        with pytest.raises(MissingInputError, match="no bucket s3://no-such-bucket: check the name") as error:
            call()
        assert not isinstance(error.value, ObjectMissingError)
        assert error.value.exit_code == Exit.MISSING_INPUT


@pytest.mark.parametrize("s3_server", ["seaweedfs"], indirect=True)
def test_who_may_only_read_is_told_so(s3_bucket: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(s3_bucket).create("key", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    store = open_store(s3_bucket)
    assert store.read("key").data == b"1"
    assert list(store.list()) == [Entry("key", 1)]
    writes: list[Callable[[], object]] = [
        lambda: store.create("new", b"1"),
        lambda: store.put("key", b"2"),
        lambda: store.replace("key", b"2", store.read("key").version),
        lambda: store.upload(file, "part"),
        lambda: store.delete("key"),
    ]
    for write in writes:
        with pytest.raises(NoPermissionError, match=rf"no permission.*s3:ListBucket on {s3_bucket}") as error:
            write()
        assert error.value.exit_code == Exit.NO_PERMISSION
    assert store.read("key").data == b"1"


@pytest.mark.parametrize("s3_server", ["seaweedfs"], indirect=True)
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_but_not_repeated(
    s3_bucket: str, file: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "quite-another")
    for call in every_call(open_store(s3_bucket), file):
        with pytest.raises(NoPermissionError, match=r"no usable AWS credentials \([A-Za-z]+\): run") as error:
            call()
        assert "quite-another" not in str(error.value)
        assert SECRET not in str(error.value)


def test_missing_credentials_are_told_how_to_get(
    aws_credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NoPermissionError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as error:
        open_store("s3://bucket")
    assert "s3://bucket: no usable AWS credentials (none were found)" in str(error.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NoPermissionError, match="ProfileNotFound"):
        open_store("s3://bucket")


@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        ("AWS_ENDPOINT_URL", "owner:top-secret@somewhere", BadRequestError, "AWS_ENDPOINT_URL must be the URL of"),
        ("AWS_ENDPOINT_URL_S3", "http://", BadRequestError, "AWS_ENDPOINT_URL must be the URL of"),
        ("AWS_ENDPOINT_URL", "http://owner:top-secret@127.0.0.1:1", BadRequestError, "without a user and password"),
        ("AWS_ENDPOINT_URL", "http://no-such-host.invalid", BucketAwayError, "away for 0.5 s"),
        ("AWS_DEFAULT_REGION", "no region", BadRequestError, "check the AWS settings"),
    ],
)
def test_wrong_settings_are_told_without_the_passwords_in_them(
    variable: str,
    value: str,
    error: type[JobError],
    words: str,
    aws_credentials: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=words) as caught:
        open_store("s3://bucket", Retry(0.5)).read("key")
    assert "s3://bucket" in str(caught.value)
    assert "top-secret" not in str(caught.value)


def test_the_endpoint_for_s3_alone_comes_first(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    open_store(s3_bucket, Retry(1)).create("key", b"1")


def test_what_is_no_key_is_left_out_of_listings(s3_bucket: str) -> None:
    client = boto3.client("s3")
    for key in ("folder/", "folder/object", "tab\t", ".hidden", "folder/.tmp-1"):
        client.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key, Body=b"")
    store = open_store(s3_bucket)
    assert list(store.list()) == [Entry("folder/object", 0)]
    assert store.folders() == ["folder"]


def test_objects_have_the_type_a_browser_needs(s3_bucket: str, file: Path) -> None:
    store = open_store(s3_bucket)
    store.put("report.html", b"<p>")
    store.upload(file, "grid.png")
    store.upload(file, "shard.tar.gz")
    client = boto3.client("s3")
    heads = {
        key: client.head_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key)
        for key in ("report.html", "grid.png", "shard.tar.gz")
    }
    assert {key: (head["ContentType"], head.get("ContentEncoding")) for key, head in heads.items()} == {
        "report.html": ("text/html", None),
        "grid.png": ("image/png", None),
        "shard.tar.gz": ("application/x-tar", None),
    }


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "s3:// names no bucket: use s3://BUCKET"),
        ("s3://UPPER", "names no bucket"),
        ("s3://b", "names no bucket"),
        ("s3://user@bucket/x", "has a user or password in it"),
        ("s3://bucket/../other", "cannot be an object's key"),
        ("s3://bucket//folder", "cannot be an object's key"),
    ],
)
def test_uris_that_name_no_bucket(uri: str, words: str, aws_credentials: None) -> None:
    with pytest.raises(BadRequestError, match=words):
        open_store(uri)


def test_without_the_library_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["botocore"] = None
from job.exits import BadRequestError
from job.store import open_store
try:
    open_store("s3://bucket")
except BadRequestError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "pip install 'ddpm-job[s3]'" in child.stdout

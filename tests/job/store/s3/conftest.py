"""A line to each S3 server that the tests have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from job.store import Retry, Store, open_store
from tests.job.store.proxy import Proxy


@pytest.fixture
def proxy(s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: Proxy, s3_bucket: str) -> Store:
    return open_store(s3_bucket, Retry(10))

"""Compute Engine's preemption notice, which requests a stop of the process."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from job.stop import Stop

_NOTICE = "instance/preempted"
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_NO_ETAG = "0"
"""Requests the present value (cloud.google.com/compute/docs/metadata/querying-metadata)."""
_HOLD_SECONDS = 60
_PAUSE_SECONDS = 1.0
"""Between two requests to the metadata server: a notice comes 30 s, or only 15, before the end."""


def watch_for_preemption(stop: Stop) -> None:
    """Watches for the machine's notice in a daemon thread, which requests `stop`; does nothing on other machines."""
    if host := _metadata_host():
        threading.Thread(target=_watch_notice, args=(stop, host), name=_NOTICE, daemon=True).start()


def _metadata_host() -> str:
    """Returns the metadata server of Compute Engine, or the one that the environment names; empty elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with suppress(OSError):
        if _PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return ""


def _watch_notice(stop: Stop, host: str) -> None:
    """Waits for the notice; errors of the server do not end the wait."""
    from http.client import HTTPException
    from urllib.parse import quote
    from urllib.request import ProxyHandler, Request, build_opener

    # A proxy would return the notice of its own machine.
    direct, etag = build_opener(ProxyHandler({})), _NO_ETAG
    while not stop():
        query = f"wait_for_change=true&last_etag={quote(etag)}&timeout_sec={_HOLD_SECONDS}"
        url = f"http://{host}/computeMetadata/v1/{_NOTICE}?{query}"
        with suppress(OSError, HTTPException, ValueError):
            # The answer comes when the value has another etag, or after a minute.
            asked = Request(url, headers={"Metadata-Flavor": "Google"})
            with direct.open(asked, timeout=_HOLD_SECONDS + 15) as answer:
                found, etag = answer.read(1024).strip(), answer.headers.get("ETag", _NO_ETAG)
            if found == b"TRUE":
                stop.request(f"the machine's notice {_NOTICE}=TRUE")
        # Also after an answer: a server that does not wait must not get requests without end.
        time.sleep(_PAUSE_SECONDS)

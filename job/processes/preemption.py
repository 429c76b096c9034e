"""Compute Engine's notice that a machine is about to be taken away; it asks the process to stop."""

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
"""Asks for a value as it is (cloud.google.com/compute/docs/metadata/querying-metadata)."""
_HOLD_SECONDS = 60
_PAUSE_SECONDS = 1.0
"""Between two attempts to reach the metadata server: a notice comes 30 s, or even 15, before the end."""


def watch_for_preemption(stop: Stop) -> None:
    """Has the machine's notice ask `stop`, from a thread that no exit waits for; does nothing elsewhere."""
    if host := _metadata_host():
        threading.Thread(target=_watch_notice, args=(stop, host), name=_NOTICE, daemon=True).start()


def _metadata_host() -> str:
    """The metadata server, if this is a machine of Compute Engine or the environment names one."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with suppress(OSError):
        if _PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return ""


def _watch_notice(stop: Stop, host: str) -> None:
    """Waits for the notice, through all errors of the server."""
    from http.client import HTTPException
    from urllib.parse import quote
    from urllib.request import ProxyHandler, Request, build_opener

    # A proxy would ask for the notice of its own machine.
    direct, etag = build_opener(ProxyHandler({})), _NO_ETAG
    while not stop():
        query = f"wait_for_change=true&last_etag={quote(etag)}&timeout_sec={_HOLD_SECONDS}"
        url = f"http://{host}/computeMetadata/v1/{_NOTICE}?{query}"
        with suppress(OSError, HTTPException, ValueError):
            # It answers as soon as the value has another etag, or after a minute.
            asked = Request(url, headers={"Metadata-Flavor": "Google"})
            with direct.open(asked, timeout=_HOLD_SECONDS + 15) as answer:
                found, etag = answer.read(1024).strip(), answer.headers.get("ETag", _NO_ETAG)
            if found == b"TRUE":
                stop.request(f"the machine's notice {_NOTICE}=TRUE")
        # Also after an answer: a server that does not know how to wait must not be asked without end.
        time.sleep(_PAUSE_SECONDS)

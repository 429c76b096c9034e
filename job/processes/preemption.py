"""Compute Engine's notices that a machine is about to be taken away; they ask the process to stop."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from job.stop import Stop

_NOTICES = (
    ("instance/preempted", "TRUE", True),
    # It comes up to an hour ahead: an attempt that begins on the machine meanwhile has to make use of it.
    ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", False),
)
"""Name and value of each, and whether it counts if it is there from the beginning."""
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_NO_ETAG = "0"
"""Asks for a value as it is (cloud.google.com/compute/docs/metadata/querying-metadata)."""
_HOLD_SECONDS = 60
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 5.0
"""Between two attempts to reach the metadata server: a notice comes 30 s, or even 15, before the end."""


def watch_for_preemption(stop: Stop) -> None:
    """Has the machine's notices ask `stop`, from threads that no exit waits for; does nothing elsewhere."""
    if host := _metadata_host():
        for resource, value, counts_at_once in _NOTICES:
            arguments = (stop, host, resource, value, counts_at_once)
            threading.Thread(target=_watch_notice, args=arguments, name=resource, daemon=True).start()


def _watch_notice(stop: Stop, host: str, resource: str, value: str, counts_at_once: bool) -> None:
    """Waits for a metadata value, through all errors of the server."""
    found, etag, pause_seconds = value if not counts_at_once else "", _NO_ETAG, _PAUSE_SECONDS
    while not stop():
        try:
            before, (found, etag) = found, _changed_metadata(host, resource, etag)
        except OSError:
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
        else:
            if found == value != before:
                stop.request(f"the machine's notice {resource}={value}")
            pause_seconds = _PAUSE_SECONDS
        # Also after an answer: a server that does not know how to wait must not be asked without end.
        time.sleep(pause_seconds)


def _metadata_host() -> str:
    """The metadata server, if this is a machine of Compute Engine or the environment names one."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with suppress(OSError):
        if _PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return ""


def _changed_metadata(host: str, resource: str, etag: str) -> tuple[str, str]:
    """A value and its etag, as soon as that is another one than `etag`, or after a minute.

    Raises:
        OSError: the server did not answer, or with something else.
    """
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import quote

    path = f"/computeMetadata/v1/{resource}?wait_for_change=true&last_etag={quote(etag)}&timeout_sec={_HOLD_SECONDS}"
    try:
        with closing(HTTPConnection(host, timeout=_HOLD_SECONDS + 15)) as connection:
            connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"{host} answered {response.status}")
            return response.read(1024).decode(errors="replace").strip(), response.headers.get("ETag", _NO_ETAG)
    except (HTTPException, ValueError) as error:
        raise OSError(f"{host}: {error}") from error

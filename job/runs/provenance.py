"""Where a picture comes from, written into the picture itself: a bucket's PNGs and GIFs can be checked and told apart.

The record is the text of a PNG's last chunk (tEXt, PNG 3rd edition, section 11.3.3.2) or of a GIF's last comment
extension (GIF89a, section 24), which viewers skip and other tools show. It holds the picture's key, so that two that
were swapped are found out, and the SHA-256 of all bytes but its own; its own are compared with what they must be.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType

from pydantic import Field

from job.code_version import code_version
from job.exits import BadDataError
from job.runs.records import attempt_id
from job.sealed import Sealed
from job.store import ObjectMissingError, Store

_KEYWORD = b"ddpm-provenance\0"
_PNG_HEAD, _PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_GIF_HEAD, _GIF_TAIL = b"GIF89a", b";"
_GIF_BLOCK_BYTES = 255


class Provenance(Sealed):
    """Where one picture comes from."""

    key: str
    """Below its run; of a dataset's contact sheet, below the bucket."""
    fence: int | None = Field(default=None, ge=1)
    """Of the attempt whose weights it shows."""
    attempt: str = ""
    """The id of that attempt, which tells runs apart."""
    images_seen: int | None = Field(default=None, ge=0)
    code_version: str
    content_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the picture without this record."""


def put_picture(
    store: Store, key: str, picture: bytes, *, fence: int | None = None, images_seen: int | None = None
) -> None:
    """Puts a picture with its provenance at `key`, whatever was there before; for the rest see `stamped`.

    Args:
        store: the run's folder; of a dataset's contact sheet, the bucket.
        key: where it goes.
        picture: the file, without provenance.
        fence: see `stamped`.
        images_seen: see `stamped`.
    """
    attempt = attempt_id(store, fence) if fence is not None else ""
    store.put(key, stamped(key, picture, fence=fence, attempt=attempt, images_seen=images_seen))


def stamped(key: str, picture: bytes, *, fence: int | None, images_seen: int | None, attempt: str = "") -> bytes:
    """The picture with its provenance in it.

    Args:
        key: where it is to lie.
        picture: a finished PNG or GIF, without provenance.
        fence: of the attempt whose weights it shows; none for a picture that shows no weights.
        attempt: its id.
        images_seen: by these weights.
    """
    sha256 = hashlib.sha256(picture).hexdigest()
    record = Provenance(
        key=key,
        fence=fence,
        attempt=attempt,
        images_seen=images_seen,
        code_version=code_version(),
        content_sha256=sha256,
    )
    return _joined(picture, record.to_json())


def read_provenance(data: bytes, uri: str) -> Provenance:
    """Checks a picture against the provenance in it, which it returns; `uri` is where the bytes came from.

    Raises:
        BadDataError: it has none, or is not as it was made; the message names it.
    """
    rotten = f"{uri} is rotten: it does not match the provenance in it"
    start, end = data.rfind(_KEYWORD), len(data) - len(_PNG_TAIL if data.startswith(_PNG_HEAD) else _GIF_TAIL)
    if start < 0:
        raise BadDataError(f"{uri} holds no provenance: it is rotten, or was put there by something else")
    if data.startswith(_PNG_HEAD):
        start -= len(b"SIZEtEXt")
        text = data[start + len(b"SIZEtEXt") : end - len(b"CRC_")]
    else:
        start -= len(b"!\xfeS")
        text = _unblocked(data[start + len(b"!\xfe") : end])
    content, text = data[:start] + data[end:], text.removeprefix(_KEYWORD)
    try:
        whole = start > 0 and _joined(content, text) == data
    except ValueError:
        whole = False
    if not whole:
        raise BadDataError(rotten)
    record = Provenance.from_json(text, uri)
    if hashlib.sha256(content).hexdigest() != record.content_sha256:
        raise BadDataError(rotten)
    return record


def picture_problems(store: Store, key: str, attempt_ids: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    """What is wrong with the picture at `key`: nothing, or one line that names it.

    Args:
        store: the run's folder.
        key: where the picture lies.
        attempt_ids: of the run's attempts, by fence, as far as they are known.
    """
    uri = store.uri_of(key)
    try:
        record = read_provenance(store.read(key).data, uri)
    except ObjectMissingError:
        return [f"{uri} is missing"]
    except BadDataError as error:
        return [str(error)]
    if record.key != key:
        return [f"{uri} is not in its place: it was made as {record.key}"]
    if record.attempt and record.attempt != attempt_ids.get(record.fence or 0, record.attempt):
        return [f"{uri} belongs to another run: attempt {record.fence} of this one did not make it"]
    return []


def _joined(picture: bytes, record: bytes) -> bytes:
    """The picture with the record before its last bytes, which end every PNG and every GIF.

    Raises:
        ValueError: it is neither.
    """
    text = _KEYWORD + record
    if picture.startswith(_PNG_HEAD) and picture.endswith(_PNG_TAIL):
        chunk = b"tEXt" + text
        stamp, tail = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk)), _PNG_TAIL
    elif picture.startswith(_GIF_HEAD) and picture.endswith(_GIF_TAIL):
        blocks = (text[i : i + _GIF_BLOCK_BYTES] for i in range(0, len(text), _GIF_BLOCK_BYTES))
        stamp, tail = b"!\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0", _GIF_TAIL
    else:
        raise ValueError("neither a PNG nor a GIF")
    return picture.removesuffix(tail) + stamp + tail


def _unblocked(blocks: bytes) -> bytes:
    """The text of a GIF's sub-blocks; of damaged ones, anything."""
    text = b""
    while blocks and (size := blocks[0]):
        text, blocks = text + blocks[1 : 1 + size], blocks[1 + size :]
    return text

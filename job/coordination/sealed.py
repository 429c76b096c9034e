"""Small JSON objects that carry the SHA-256 of their own canonical form, so that a reader detects a flipped bit."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from job import __version__
from job.exits import BadDataError
from job.progress import all_printable, printable
from job.store.base import ObjectMissingError, Store

SHA256_PATTERN = r"^[0-9a-f]{64}$"
PACKAGES = ("ddpm", "job")
MOMENT_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def _moment(text: str) -> str:
    # The parser also takes times without a zone: only an equal text proves UTC and whole seconds.
    if datetime.fromisoformat(text).strftime(MOMENT_FORMAT) != text:
        raise ValueError(f"{text!r} is not in UTC, or not to the second")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""A time in UTC that `datetime.fromisoformat` reads, so that a reader refuses a record with month 13."""


def utc_now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).strftime(MOMENT_FORMAT)


def utc_text(iso: str) -> str:
    """Returns a time in ISO 8601 of any zone as one in UTC, to the second."""
    return datetime.fromisoformat(iso).astimezone(UTC).strftime(MOMENT_FORMAT)


@cache
def code_version() -> str:
    """Returns `0.1.0+3f2a9c1b`: the version, and a hash of the names and bytes of all modules and presets."""
    root, sha256 = Path(__file__).parents[2], hashlib.sha256()
    paths = (path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in (".py", ".yaml"))
    for path in sorted(paths):
        source = path.read_bytes()
        sha256.update(f"{path.relative_to(root)}\0{len(source)}\0".encode() + source)
    return f"{__version__}+{sha256.hexdigest()[:8]}"


class RecordPart(BaseModel):
    """A part of a record: it has exactly these fields, and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedObject(RecordPart):
    """The key, size and hash of an object, as a record names it."""

    key: str
    size_bytes: int = Field(gt=0)
    sha256: str = Field(pattern=SHA256_PATTERN)

    @classmethod
    def of(cls, key: str, content: bytes | Path) -> Self:
        """Returns the record of an object with this content, or with that of a local file."""
        if isinstance(content, bytes):
            return cls(key=key, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        with content.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(key=key, size_bytes=content.stat().st_size, sha256=sha256)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def read(self, store: Store) -> bytes:
        """Returns the content.

        Raises:
            BadDataError: it is missing or corrupt; the message names it.
        """
        try:
            data = store.read(self.key).data
        except ObjectMissingError:
            raise BadDataError(f"{store.uri_of(self.key)} is missing, though a record names it") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BadDataError(f"{store.uri_of(self.key)} is corrupt: its SHA-256 is not the one in its record")
        return data


class Sealed(RecordPart):
    """A record with its own hash, `sha256`: that of the canonical JSON (sorted keys) of every other field."""

    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")

    def to_json(self) -> bytes:
        """Returns the bytes to store, with the hash filled in."""
        document = self.model_dump(mode="json")
        return _bytes(document | {"sha256": _digest_of(document)})

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> Self:
        """Parses the bytes of `to_json`; `uri` names the object for messages.

        Raises:
            BadDataError: the object is something else, or corrupt; the message names it.
        """
        try:
            document = json.loads(data)
            # The bytes must match too: `1e-5` and `1E-5` differ by one bit, and have the same value.
            intact = document["sha256"] == _digest_of(document) and _bytes(document) == data
            shown = all_printable(document)
        except (ValueError, TypeError, KeyError, RecursionError):
            intact = False
        if not intact:
            raise BadDataError(f"{uri} is corrupt: it does not match its own SHA-256")
        try:
            record = cls.model_validate(document)
            return record if shown == document else cls.model_validate(shown)
        except ValidationError as error:
            first = error.errors()[0]
            field = printable(".".join(map(str, first["loc"])))
            raise BadDataError(f"{uri} is of another version of the program ({field}: {first['msg']})") from None

    @classmethod
    def load(cls, store: Store, key: str) -> Self:
        """Reads a record and checks it against its own hash.

        Raises:
            BadDataError: the object is something else, or corrupt; the message names it.
            ObjectMissingError: the object is missing.
        """
        return cls.from_json(store.read(key).data, store.uri_of(key))

    @classmethod
    def load_made(cls, store: Store, key: str) -> Self | None:
        """Reads the record that a command makes; None before.

        Raises:
            BadDataError: it is damaged; the message says that the command makes it again after its deletion.
        """
        try:
            return cls.load(store, key)
        except ObjectMissingError:
            return None
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes it again") from None


def _digest_of(document: dict[str, Any]) -> str:
    content = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()

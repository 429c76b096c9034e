"""An S3 bucket, of Amazon's or of any server that knows conditional writes (If-None-Match and If-Match).

Every object carries the crc32c of its whole content in its metadata: S3's own checksum of an object that went up in
parts is one of the parts, and servers differ in what they keep. S3's own guards each request on the way up.
"""

from __future__ import annotations

import base64
import hashlib
import io
import mimetypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
from botocore.exceptions import ClientError
from fsspec.spec import AbstractBufferedFile

from job.exits import BucketAwayError
from job.store.base import (
    Blob,
    ConflictError,
    Entry,
    ObjectExistsError,
    ObjectMissingError,
    Store,
    folder_key,
    is_key,
    validated_key,
    validated_new_key,
)
from job.store.files import crc32c_of, os_errors, temporary_beside
from job.store.s3_client import Bucket
from job.store.s3_errors import code_of, damaged, is_passing, status_of

__all__ = ["Bucket", "S3Store"]

_CRC32C = "ddpm-crc32c"
_PART_BYTES = 8 << 20
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 4
_UPLOAD_ATTEMPTS = 3
_RANGE_BYTES = 8 << 20
_LISTINGS_AT_ONCE = 16


class S3Store(Store):
    """Objects of a bucket whose names begin with a prefix. Versions are ETags."""

    def __init__(self, bucket: Bucket, prefix: str = "") -> None:
        """The store of everything below the folder `prefix`."""
        super().__init__(f"{bucket.uri}/{prefix}")
        self._bucket = bucket
        self._prefix = folder_key(prefix)

    def sub(self, prefix: str) -> S3Store:
        """A folder in the same bucket."""
        return S3Store(self._bucket, f"{self._prefix}{validated_key(prefix)}")

    def read(self, key: str) -> Blob:
        """One request; the ETag comes with the bytes."""
        name, content = self._name(key), io.BytesIO()
        with self._errors(key):
            answer = self._bucket.get(name, content.write)
            self._verify(key, answer, content)
        return Blob(content.getvalue(), answer["ETag"])

    def create(self, key: str, data: bytes) -> str:
        """A write on the condition that there is no object yet."""
        with self._errors(key):
            try:
                return self._write(key, data, IfNoneMatch="*")
            except ClientError as error:
                if status_of(error) != 412:
                    raise
                if version := self._own_write(key, data):
                    return version
                raise ObjectExistsError(f"{self.uri_of(key)} exists already: somebody else was first") from None

    def replace(self, key: str, data: bytes, version: str) -> str:
        """A write on the condition that the ETag is `version`."""
        with self._errors(key):
            try:
                return self._write(key, data, IfMatch=version)
            except ClientError as error:
                if status_of(error) != 412 and code_of(error) != "NoSuchKey":
                    raise
                if own_version := self._own_write(key, data):
                    return own_version
                raise ConflictError(f"{self.uri_of(key)} has changed or is gone: somebody else wrote it") from None

    def put(self, key: str, data: bytes) -> None:
        """A write on no condition."""
        with self._errors(key):
            self._write(key, data)

    def upload(self, path: Path, key: str) -> None:
        """One request up to 8 MiB, else parts, four at a time; the bucket compares the crc32c declared with each."""
        self._name(validated_new_key(key))
        with os_errors(path):
            file = path.open("rb")
        with file, os_errors(path), self._errors(key):
            crc32c, size_bytes = _encoded(crc32c_of(file)), file.tell()
            for _ in range(_UPLOAD_ATTEMPTS):
                try:
                    if size_bytes <= _PART_BYTES:
                        self._write(key, os.pread(file.fileno(), size_bytes, 0), IfNoneMatch="*")
                    else:
                        self._write_parts(key, file, size_bytes, crc32c)
                    return
                except ClientError as error:
                    if status_of(error) not in (409, 412) and code_of(error) != "NoSuchUpload":
                        raise
                # Without an object the refusal came from another writer who failed: S3 wants the parts once more.
                with suppress(ObjectMissingError):
                    there = self._head(key)
                    if (there["ContentLength"], there["Metadata"].get(_CRC32C)) == (size_bytes, crc32c):
                        return
                    raise ObjectExistsError(
                        f"{self.uri_of(key)} exists already with other content: somebody else was first"
                    )
            raise BucketAwayError(f"{self.uri_of(key)}: others kept writing and deleting it: try again")

    def download(self, key: str, path: Path) -> None:
        """One stream of one version, compared with the crc32c that was uploaded with it."""
        there = self._head(key)
        with os_errors(path), self._errors(key), temporary_beside(path) as (temporary, file):
            self._bucket.get(self._name(key), file.write, stop=there["ContentLength"], version=there["ETag"])
            file.flush()
            self._verify(key, there, file)
            temporary.replace(path)

    def open(self, key: str) -> BinaryIO:
        """Reads ranges of one version."""
        there = self._head(key)

        def fetch(start: int, stop: int) -> bytes:
            content = io.BytesIO()
            with self._errors(key):
                self._bucket.get(self._name(key), content.write, start=start, stop=stop, version=there["ETag"])
            return content.getvalue()

        return cast(BinaryIO, _Ranges(fetch, there["ContentLength"]))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Pages of a thousand, put in order: directory buckets and some servers list in an order of their own."""
        start = f"{self._prefix}{folder_key(prefix)}"
        with self._bucket.errors.about(self.uri):
            entries = [
                Entry(content["Key"].removeprefix(self._prefix), content["Size"])
                for page in self._pages(start)
                for content in page.get("Contents", [])
            ]
        return iter(sorted((entry for entry in entries if is_key(entry.key)), key=lambda entry: entry.key))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """What S3 calls common prefixes, each looked into: some servers go on listing a folder that was emptied."""
        start = f"{self._prefix}{folder_key(prefix)}"

        def has_objects(name: str) -> bool:
            return bool(self._bucket.call("list_objects_v2", Prefix=f"{start}{name}/", MaxKeys=1).get("Contents"))

        with self._bucket.errors.about(self.uri), ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
            found = [
                folder["Prefix"].removeprefix(start).removesuffix("/")
                for page in self._pages(start, Delimiter="/")
                for folder in page.get("CommonPrefixes", [])
            ]
            names = sorted(name for name in found if is_key(name))
            return [name for name, there in zip(names, pool.map(has_objects, names), strict=True) if there]

    def delete(self, key: str) -> None:
        """Deletes whatever version there is."""
        with suppress(ObjectMissingError), self._errors(key):
            self._bucket.call("delete_object", Key=self._name(key))

    def exists(self, key: str) -> bool:
        """Asks for the headers alone."""
        try:
            self._head(key)
        except ObjectMissingError:
            return False
        return True

    def _errors(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.errors.about(self.uri_of(key))

    def _name(self, key: str) -> str:
        return f"{self._prefix}{validated_key(key)}"

    def _head(self, key: str) -> dict[str, Any]:
        name = self._name(key)
        with self._errors(key):
            try:
                return self._bucket.call("head_object", Key=name, ChecksumMode="ENABLED")
            except ClientError as error:
                if not is_passing(error) and status_of(error) not in (404, 412):
                    # A HEAD request is answered with a bare number; this one tells wrong keys from missing rights.
                    self._bucket.call("get_object", Key=name, Range="bytes=0-0")
                raise

    def _pages(self, start: str, **arguments: str) -> Iterator[dict[str, Any]]:
        page = self._bucket.call("list_objects_v2", Prefix=start, **arguments)
        yield page
        while page["IsTruncated"]:
            token = page["NextContinuationToken"]
            page = self._bucket.call("list_objects_v2", Prefix=start, ContinuationToken=token, **arguments)
            yield page

    def _write(self, key: str, data: bytes, **condition: str) -> str:
        name, crc32c = self._name(validated_new_key(key)), _encoded(google_crc32c.value(data))
        answer = self._bucket.call(
            "put_object", Key=name, Body=data, ChecksumCRC32C=crc32c, **_described(key, crc32c), **condition
        )
        if not _arrived(answer, data):
            self._bucket.call("delete_object", Key=name, IfMatch=answer["ETag"])
            raise damaged(self.uri_of(key))
        return answer["ETag"]

    def _write_parts(self, key: str, file: BinaryIO, size_bytes: int, crc32c: str) -> None:
        """Sends a file in parts, of which nothing is visible until the last request puts them together."""
        part_bytes = max(_PART_BYTES, -(-size_bytes // _MOST_PARTS))
        upload = {"Key": self._name(key)}
        upload["UploadId"] = self._bucket.call(
            "create_multipart_upload", **upload, ChecksumAlgorithm="CRC32C", **_described(key, crc32c)
        )["UploadId"]

        def send(number: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), part_bytes, (number - 1) * part_bytes)
            checksum = {"ChecksumCRC32C": _encoded(google_crc32c.value(data))}
            answer = self._bucket.call("upload_part", **upload, PartNumber=number, Body=data, **checksum)
            if not _arrived(answer, data):
                raise damaged(self.uri_of(key))
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-size_bytes // part_bytes) + 1)))
            self._bucket.call("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        except Exception as error:
            if not is_passing(error):
                # Parts that are left behind cost money; a bucket that is away cannot be told so.
                with suppress(Exception):
                    self._bucket.once("abort_multipart_upload", **upload)
            raise

    def _own_write(self, key: str, data: bytes) -> str | None:
        """The object's version if it holds `data`: a write whose answer was lost is refused when it is repeated."""
        with suppress(ObjectMissingError):
            there = self.read(key)
            return there.version if there.data == data else None
        return None

    def _verify(self, key: str, answer: dict[str, Any], content: BinaryIO) -> None:
        """Compares what came down with what was declared when it went up, or else with what the server knows of it."""
        content.seek(0)
        if crc32c := answer["Metadata"].get(_CRC32C) or _crc32c_kept(answer):
            whole = _encoded(crc32c_of(content)) == crc32c
        elif md5 := _md5_kept(answer):
            digest = hashlib.file_digest(cast(Any, content), lambda: hashlib.md5(usedforsecurity=False))
            whole = digest.hexdigest() == md5
        else:
            whole = True
        if not whole:
            raise damaged(self.uri_of(key))


class _Ranges(AbstractBufferedFile):
    """A seekable file over a function that fetches the bytes from `start` to `stop`; it reads ahead."""

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._fetch_range = fetch
        super().__init__(None, "", "rb", block_size=_RANGE_BYTES, cache_type="readahead", size=size_bytes)


def _described(key: str, crc32c: str) -> dict[str, Any]:
    """What is kept with an object: its type for a browser that shows a report or a picture, and its checksum."""
    return {"ContentType": mimetypes.guess_type(key)[0] or "application/octet-stream", "Metadata": {_CRC32C: crc32c}}


def _arrived(answer: dict[str, Any], data: bytes) -> bool:
    """Whether what a server stored is what was sent; one that repeats the checksum has compared it itself."""
    md5 = None if "ChecksumCRC32C" in answer else _md5_kept(answer)
    return md5 is None or hashlib.md5(data, usedforsecurity=False).hexdigest() == md5


def _crc32c_kept(answer: dict[str, Any]) -> str | None:
    """The server's crc32c of the whole object, if it is not one of the checksums of parts."""
    of_parts = "-" in answer["ETag"] and answer.get("ChecksumType") != "FULL_OBJECT"
    return None if of_parts else answer.get("ChecksumCRC32C")


def _md5_kept(answer: dict[str, Any]) -> str | None:
    """The MD5 of an object's content, which its ETag is, unless it came in parts or is encrypted with a key."""
    etag = answer["ETag"].strip('"')
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return None if "-" in etag or encrypted else etag


def _encoded(crc32c: int) -> str:
    """The checksum as S3 writes it."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()

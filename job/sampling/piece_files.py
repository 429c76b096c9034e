"""Pieces of drawn images on their way to the bucket, while the next ones are drawn; and back, to be looked at."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType

import numpy as np
from PIL import Image

from ddpm import figures
from job.code_version import code_version
from job.data.images import declared_size, decode
from job.data.shards import ShardWriter, shard_name
from job.exits import BadDataError, StoppedError
from job.runs import records
from job.sampling.pieces import Batch, PieceFile, PieceRecord, piece_name, record_key
from job.stop import NEVER, Stop
from job.store import ObjectExistsError
from job.store.files import os_errors
from job.store.scratch import scratch_folder

UPLOADS = 16
POLL_SECONDS = 0.05
SAME_LEVELS = 8.0
"""Mean difference, of 255, by which an image that another machine rounded otherwise may differ."""

Images = np.ndarray


def commit_piece(batch: Batch, number: int, images: Images) -> bool:
    """Uploads uint8 [n, H, W, C] as a piece and creates its record; whether it was this process that made the piece.

    Raises:
        BadDataError: something else lies where the piece should.
    """
    seeds = batch.drawing.seeds(number)
    save = _save_shard if batch.drawing.save == "shards" else _save_pngs
    record = PieceRecord(
        number=number,
        first_seed=seeds[0],
        images=len(seeds),
        files=save(batch, number, images),
        drawing=batch.drawing,
        attempt=uuid.uuid4().hex,
        created=records.utc_now(),
        code_version=code_version(),
    )
    try:
        batch.store.create(record_key(number), record.to_json())
    except ObjectExistsError:
        batch.load(number)
        return False
    return True


def read_images(batch: Batch, record: PieceRecord, images: int) -> Images:
    """The first images of a piece: uint8 [n, H, W, C].

    Raises:
        BadDataError: an object of it is missing or damaged; the message names it.
    """
    drawing = batch.drawing
    is_shard = drawing.save == "shards"
    found: list[Images] = []
    for file in record.files if is_shard else record.files[:images]:
        data = batch.store.read(file.name).data
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise BadDataError(
                f"{batch.store.uri_of(file.name)} is rotten: its SHA-256 is not the one in its record. Delete both, "
                "and the same command makes this piece again"
            )
        try:
            found += [decode(png, drawing.channels) for png in (_shard_pngs(data) if is_shard else [data])]
        except BadDataError as error:
            raise BadDataError(f"{batch.store.uri_of(file.name)}: {error}") from None
    return np.stack(found[:images])


class PieceWriter:
    """Commits pieces in a thread of its own, in order. At most two are on their way; then `submit` waits.

    A stop lets what is on its way arrive, for as long as there is time.
    """

    def __init__(self, batch: Batch, stop: Stop = NEVER) -> None:
        """Starts the thread. `batch` is where the pieces belong; `stop` is asked while the main thread waits."""
        self.made_images = 0
        self._batch, self._stop = batch, stop
        self._queue: Queue[tuple[int, Images]] = Queue(maxsize=1)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="piece-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        while self._thread.is_alive() and not self._is_late():
            self._thread.join(POLL_SECONDS)
        if error is not None:
            return
        self._raise_error()
        if self._thread.is_alive():
            raise StoppedError("stopped before the last piece was in the bucket")

    def submit(self, number: int, images: Images) -> None:
        """Queues a piece, uint8 [n, H, W, C].

        Raises:
            StoppedError: there was no time left for it.
            JobError: an earlier piece could not be committed.
        """
        while True:
            self._raise_error()
            try:
                self._queue.put((number, images), timeout=POLL_SECONDS)
            except Full:
                if self._is_late():
                    raise StoppedError("stopped before the last piece was in the bucket") from None
            else:
                return

    def _is_late(self) -> bool:
        return self._stop() and self._stop.seconds_left_to_save() <= 0

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            is_last = self._closing.is_set()
            try:
                number, images = self._queue.get(timeout=0 if is_last else POLL_SECONDS)
                if commit_piece(self._batch, number, images):
                    self.made_images += len(images)
            except Empty:
                if is_last:
                    return
            except BaseException as error:
                self._error = error
                return


def _save_shard(batch: Batch, number: int, images: Images) -> tuple[PieceFile, ...]:
    drawing, key = batch.drawing, f"{piece_name(number)}.tar"
    with scratch_folder("piece") as folder:
        path = folder / shard_name(number)
        with os_errors(path):
            writer = ShardWriter(path)
            for seed, image in zip(drawing.seeds(number), images, strict=True):
                writer.add(drawing.image_name(seed), _encoded(image), drawing.label(seed))
            shard, _ = writer.finish()
        try:
            batch.store.upload(path, key)
        except ObjectExistsError:
            # The same images, rounded otherwise on another machine. It may be about to be committed: it stays.
            there = folder / "there.tar"
            batch.store.download(key, there)
            return (_adopted_shard(batch, number, key, there, images),)
    return (PieceFile(name=key, bytes=shard.bytes, sha256=shard.sha256),)


def _adopted_shard(batch: Batch, number: int, key: str, path: Path, images: Images) -> PieceFile:
    drawing = batch.drawing
    expected = [f"{drawing.image_name(seed)}.png" for seed in drawing.seeds(number)]
    try:
        with tarfile.open(path, "r:") as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
    except tarfile.TarError:
        names = []
    if names != expected:
        raise _not_ours(batch, key)
    data = path.read_bytes()
    for png, image in zip(_shard_pngs(data), images, strict=True):
        _check_same(batch, key, png, image)
    return PieceFile(name=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _save_pngs(batch: Batch, number: int, images: Images) -> tuple[PieceFile, ...]:
    drawing = batch.drawing

    def save(seed: int, image: Images) -> PieceFile:
        key, data = f"{piece_name(number)}/{drawing.image_name(seed)}.png", _encoded(image)
        try:
            batch.store.create(key, data)
        except ObjectExistsError:
            # As with a shard: the same image, rounded otherwise.
            data = batch.store.read(key).data
            _check_same(batch, key, data, image)
        return PieceFile(name=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    with ThreadPoolExecutor(UPLOADS) as pool:
        return tuple(pool.map(save, drawing.seeds(number), images))


def _encoded(image: Images) -> bytes:
    return figures.png(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))


def _check_same(batch: Batch, key: str, png: bytes, image: Images) -> None:
    """Raises unless `png` shows `image`, uint8 [H, W, C]: what a killed process left may have rotted since."""
    size = batch.drawing.size
    with suppress(BadDataError):
        # The size first: a decoder would take the memory for whatever the image claims.
        if declared_size(png) == (size, size):
            there = decode(png, batch.drawing.channels).astype(np.int16)
            if there.shape == image.shape and np.abs(there - image).mean() <= SAME_LEVELS:
                return
    raise _not_ours(batch, key)


def _not_ours(batch: Batch, key: str) -> BadDataError:
    return BadDataError(f"{batch.store.uri_of(key)} is not what belongs there, or damaged: delete it and start again")


def _shard_pngs(data: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = (tar.extractfile(member) for member in tar if member.isfile() and member.name.endswith(".png"))
        return [file.read() for file in files if file is not None]

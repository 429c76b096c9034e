"""What a node keeps of a dataset: every image decoded once where they fit, else the encoded shards that are due.

`ShardSource` fetches shards, verified, and decodes their images by threads. The two caches on top of it give the same
images for the same indices. Neither holds memory that grows with the dataset: what they keep lies in files, which all
processes of the node share.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from job.data.ahead import STOP_POLL_SECONDS, in_order
from job.data.images import Recipe, RejectedImageError, codec_versions, decode, decode_latents, prepare
from job.data.order import Int64s, Order
from job.data.shards import OFFSETS_DTYPE, DatasetIndex, Record, first_damaged
from job.exits import BadConfigError, BadDataError, BadRequestError, DiskFullError, JobError, MissingInputError
from job.stop import NEVER, Stop
from job.store import Store, open_to_read, split_uri
from job.store.files import os_errors, temporary_beside

Uint8s = npt.NDArray[np.uint8]
Fetched = TypeVar("Fetched")

_IS_FILLED = 1 << 32
_DOWNLOADS = 4
_CHOOSERS = 8
"""Shards from which a few images are read at a time: these wait for the bucket, and not for a processor."""
_READ_AT_A_TIME = 32


def default_cache_dir() -> Path:
    """`$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`.

    Raises:
        BadRequestError: none of them is set, and the user has no home.
    """
    folder = os.environ.get("DDPM_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/ddpm"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:
        raise BadRequestError("this user has no home folder: set DDPM_CACHE to a folder on a local disk") from None


def open_cache(
    bucket: Store,
    key: str,
    index: DatasetIndex,
    *,
    cache_dir: Path,
    budget_bytes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Stop = NEVER,
) -> ImageCache:
    """Opens a node's cache of the dataset at `key`; processes of one node that open it share its files and the work.

    Returns when every image is decoded, if these fit the budget; at once otherwise.

    Args:
        bucket: where the dataset lies.
        key: its folder, `datasets/NAME-SIZE`.
        index: its index.
        cache_dir: folder on a local disk; the dataset's part of it is named after `index.dataset_id`.
        budget_bytes: how much of that disk images may take.
        progress: called with images decoded so far, and all.
        stop: asked many times a second.

    Raises:
        StoppedError: `stop` said so; what has been decoded is kept.
        DiskFullError: the images fit the budget but not the disk.
        BadDataError: the bucket's shards are not what was packed.
    """
    source = ShardSource(bucket, key, index, cache_dir / index.dataset_id, stop=stop)
    if index.decoded_bytes <= budget_bytes:
        return DecodedCache(source, progress)
    return ShardCache(source, budget_bytes)


class ShardSource:
    """The shards of one dataset, as a node sees them; thread-safe.

    They lie beside the index or, of tars that were indexed in place, where these were.

    Attributes:
        index: what the dataset is.
        folder: this dataset's part of the node's cache, shared by all processes of the node.
        starts: index of each shard's first image, and N, int64 [shards + 1].
        is_local: whether all shards are files of this machine, which are read where they lie.
        threads: how many images are decoded at a time.
        stop: whether this process is to stop.
    """

    def __init__(
        self, bucket: Store, key: str, index: DatasetIndex, folder: Path, threads: int | None = None, stop: Stop = NEVER
    ) -> None:
        """Opens the stores of the shards of the dataset at `key`, and touches none of them.

        Raises:
            BadRequestError: a URI that no store speaks, or a recipe that makes no sense.
            NoPermissionError: no credentials for its bucket were found, as far as that is known before asking it.
        """
        self.index, self.folder, self.stop = index, folder, stop
        self.threads = threads or os.cpu_count() or 1
        self.starts: Int64s = np.cumsum([0, *(shard.images for shard in index.shards)])
        self._bucket, self._key = bucket, key
        retry, folders = bucket.retry.elsewhere(), {split_uri(shard.uri)[0] for shard in index.shards if shard.uri}
        self._foreign = {folder: open_to_read(folder, retry) for folder in folders}
        self.is_local = all(store.uri.startswith("/") for store in self._foreign.values() or [bucket])
        self._recipe = _recipe(index) if index.is_foreign else None
        self._decoders = ThreadPoolExecutor(self.threads, "decode")
        self._made = "indexed" if index.is_foreign else "packed"
        self._mend = f"restore it, or {'index' if index.is_foreign else 'pack'} the dataset anew"
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raises `StoppedError` if this process is to stop."""
        self.stop.check(f"while reading the images of {self._bucket.uri}/{self._key}; what has been read is kept")

    @cached_property
    def records(self) -> np.ndarray:
        """Offset tables of all shards, memory-mapped, OFFSETS_DTYPE [N]; fetched first unless they are here.

        Raises:
            BadDataError: one in the bucket is not as it was packed.
        """
        path, hashes = self.folder / "offsets", [shard.offsets_sha256 for shard in self.index.shards]
        with os_errors(path):
            # A file that is too short for them cannot be mapped.
            with suppress(FileNotFoundError, ValueError):
                records = np.memmap(path, OFFSETS_DTYPE, "r", shape=(self.index.images,))
                tables = (records[first:last] for first, last in pairwise(self.starts))
                if [hashlib.sha256(table.tobytes()).hexdigest() for table in tables] == hashes:
                    return np.asarray(records)
            with temporary_beside(path) as (temporary, file):
                for table in self._ahead(self.read_table, range(len(hashes))):
                    file.write(table.tobytes())
                file.flush()
                temporary.replace(path)
            return np.asarray(np.memmap(path, OFFSETS_DTYPE, "r"))

    def read_table(self, shard: int) -> np.ndarray:
        """The offset table of a shard as it lies in the bucket, OFFSETS_DTYPE [images].

        Raises:
            BadDataError: it is not as it was packed.
        """
        packed = self.index.shards[shard]
        key = f"{self._key}/{packed.offsets_name}"
        uri, data = self._bucket.uri_of(key), self._bucket.read(key).data
        is_whole = len(data) == packed.images * OFFSETS_DTYPE.itemsize
        if not is_whole or hashlib.sha256(data).hexdigest() != packed.offsets_sha256:
            raise BadDataError(f"{uri} is not the table that was {self._made}: {self._mend}")
        table, classes = np.frombuffer(data, OFFSETS_DTYPE), len(self.index.classes)
        # An index may vouch for any table.
        are_classes = not classes or 0 <= table["label"].min() <= table["label"].max() < classes
        if not are_classes or table["offset"].max() >= packed.bytes:
            raise BadDataError(f"{uri} points beyond its shard or its classes: {self._mend}")
        return table

    def place(self, shard: int) -> tuple[Store, str]:
        """The store that holds a shard's tar, and its key there."""
        packed = self.index.shards[shard]
        if not packed.uri:
            return self._bucket, f"{self._key}/{packed.name}"
        folder, name = split_uri(packed.uri)
        return self._foreign[folder], name

    def uri(self, shard: int) -> str:
        """Where a shard's tar lies."""
        store, key = self.place(shard)
        return store.uri_of(key)

    def open_there(self, shard: int) -> BinaryIO:
        """A stream over a shard's tar where it lies, of which nothing is verified."""
        store, key = self.place(shard)
        return store.open(key)

    def fetch(self, shards: Iterable[int]) -> Iterator[tuple[int, Path]]:
        """Yields each shard with a verified file of its bytes, fetching a few ahead. To be called under the lock.

        Raises:
            BadDataError: the bucket's shard is not the one that was packed.
        """
        incoming = self.folder / "incoming"
        # Whoever holds the lock knows that what lies here was left by a process that died.
        shutil.rmtree(incoming, ignore_errors=True)
        with os_errors(incoming):
            incoming.mkdir(exist_ok=True)
        return self._ahead(lambda shard: (shard, self.verified(shard, incoming)), shards)

    def verified(self, shard: int, incoming: Path) -> Path:
        """A file whose SHA-256 is that of the shard in the index.

        It is the shard itself if that is a file of this machine, else a download to `incoming`, which is the caller's.

        Raises:
            BadDataError: it is not the shard that was packed; the first damaged image is named, if its table is there.
            ObjectMissingError: it is not there.
        """
        packed, (store, key) = self.index.shards[shard], self.place(shard)
        if self.is_local:
            # An index is written by anybody: a pipe that it names would be waited for in vain.
            self.open_there(shard).close()
            path = Path(store.uri_of(key))
        else:
            path = incoming / packed.name
            store.download(key, path)
        with os_errors(path), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == packed.sha256:
                return path
            damage = ""
            with suppress(JobError):
                damage = f"; {first_damaged(file, self.read_table(shard))}"
        raise BadDataError(f"{store.uri_of(key)} holds other bytes than were {self._made}{damage}: {self._mend}")

    def read_into(
        self, out: Uint8s, indices: Int64s, open_shard: Callable[[int], AbstractContextManager[BinaryIO]]
    ) -> None:
        """Reads images `indices` and decodes them, a few at a time in each thread.

        Args:
            out: uint8 [b, H, W, C].
            indices: int64 [b].
            open_shard: opens the file of a shard; called in the threads.

        Raises:
            BadDataError: an image is not the one that was packed, or damaged, or of another size.
            StoppedError: this process is to stop.
        """
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows, records = (indices - self.starts[shards]).tolist(), self.records[indices].tolist()

        def read_some(places: list[int]) -> None:
            shard = int(shards[places[0]])
            with open_shard(shard) as file:
                for place in places:
                    out[place] = self.read_image(shard, rows[place], records[place], file)

        def parts() -> Iterator[list[int]]:
            for shard in np.unique(shards):
                places = np.flatnonzero(shards == shard).tolist()
                yield from (places[at : at + _READ_AT_A_TIME] for at in range(0, len(places), _READ_AT_A_TIME))

        for _ in in_order(self._decoders, read_some, parts(), 2 * self.threads, self.check):
            pass

    def read_image(self, shard: int, row: int, record: Record, file: BinaryIO) -> Uint8s:
        """Image `row` of a shard, of which `record` says where in `file` it lies; raises as `read_into`."""
        offset, size_bytes, _, checksum = record
        file.seek(offset)
        encoded, wrong = file.read(size_bytes), f"it is not as it was {self._made}"
        try:
            if google_crc32c.value(encoded) == checksum:
                if self._recipe is not None:
                    return prepare(encoded, self._recipe)
                decoder = decode_latents if self.index.encoding else decode
                return decoder(encoded, self.index.channels, self.index.size)
        except RejectedImageError as error:
            wrong = f"it {error}"
        except BadDataError as error:
            wrong = str(error)
        raise BadDataError(f"{self.uri(shard)}, image {row} (at byte {offset}): {wrong}: {self._mend}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder against all other threads and processes of the node; a holder's death frees it.

        Raises:
            StoppedError: this process is to stop while another holds it.
        """
        path = self.folder / "lock"
        with os_errors(path):
            try:
                held = FileLock(path, poll_interval=STOP_POLL_SECONDS).acquire(cancel_check=self.stop)
            except Timeout:
                self.check()
                raise
        with held:
            yield

    def close(self) -> None:
        """Ends the decoding threads."""
        self._decoders.shutdown(cancel_futures=True)

    def _ahead(self, work: Callable[[int], Fetched], shards: Iterable[int]) -> Iterator[Fetched]:
        pool = ThreadPoolExecutor(_DOWNLOADS, "fetch")
        try:
            yield from in_order(pool, work, shards, _DOWNLOADS, self.check)
        finally:
            # A download cannot be cut short; a process that must stop does not wait for it.
            pool.shutdown(wait=False, cancel_futures=True)


class ImageCache:
    """Images of a dataset by index. Each is read where it lies in the bucket; the caches below keep them on a disk."""

    def __init__(self, source: ShardSource) -> None:
        """Fetches the offset tables, unless they are there."""
        self.index, self._source = source.index, source
        self._labels = source.records["label"]

    def read(self, indices: Int64s, out: Uint8s | None = None) -> Uint8s:
        """Images `indices`, uint8 [b, H, W, C], or latents as `decode_latents`; fastest in an `out` that is used again.

        Raises:
            BadDataError: the bucket's shard is not what was packed, or one of its images is damaged.
        """
        if out is None:
            out = np.empty((len(indices), *self.index.image_shape), np.uint8)
        self._read(indices, out)
        return out

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        self._source.read_into(out, indices, self._source.open_there)

    def labels(self, indices: Int64s) -> Int64s:
        """Classes of the images, int64 [b]; -1 without classes."""
        return self._labels[indices].astype(np.int64)

    def prefetch(self, order: Order, image_number: int) -> None:
        """Says that a run is about to read from `image_number` on; cheap to call for each batch."""
        return

    def close(self) -> None:
        """Ends its threads; what is on disk stays."""
        self._source.close()


class DecodedCache(ImageCache):
    """All images as one memory-mapped array [N, H, W, C] in `images`, filled shard by shard.

    `checksums` holds a little-endian uint64 per image, 2^32 + its CRC-32C once it is there. Whatever a killed process
    or a power failure leaves in the two files, the checksums find it out and it is mended. Each image that is read is
    compared as well, at about a microsecond: who else writes to the cache meanwhile costs speed, and teaches nothing.
    """

    def __init__(self, source: ShardSource, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Checks what is there and decodes what is missing; one process does, others wait. Raises as `open_cache`."""
        super().__init__(source)
        self._images_path, self._filled_path = source.folder / "images", source.folder / "checksums"
        try:
            if self._missing():
                with source.lock():
                    _allocate(self._images_path, self.index.decoded_bytes)
                    _allocate(self._filled_path, 8 * self.index.images)
                    self._fill(self._missing(), progress)
        except BaseException:
            source.close()
            raise
        # As in the other cache.
        source.stop, self._is_harmed = NEVER, False
        # From here on images are read in random order, of which reading ahead would make a multiple.
        self._file.madvise(mmap.MADV_RANDOM)

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        # "raise" would make numpy fill a buffer of its own first.
        np.take(self._images, indices, axis=0, out=out, mode="clip")
        if _checksums(out) != self._filled[indices].tolist():
            if not self._is_harmed:
                said = "is no longer what was decoded: reading such images from the bucket; the next start mends it"
                logging.getLogger(__name__).warning(f"{self._images_path} {said}")
            self._is_harmed = True
            super()._read(indices, out)

    def _missing(self) -> list[int]:
        """Maps the files and returns the shards whose images are not in them, or not intact."""
        shards, threads = range(len(self.index.shards)), self._source.threads
        shape = self.index.images, *self.index.image_shape
        try:
            with os_errors(self._images_path), self._images_path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._images: Uint8s = np.frombuffer(self._file, np.uint8).reshape(shape)
                self._filled = np.memmap(self._filled_path, "<u8", "r", shape=(self.index.images,))
        # They are not there, or not of their size.
        except (MissingInputError, ValueError):
            return list(shards)

        def is_intact(shard: int) -> bool:
            filled = self._block(self._filled, shard)
            return bool(filled.all()) and _checksums(self._block(self._images, shard)) == filled.tolist()

        with ThreadPoolExecutor(threads) as pool:
            intact = in_order(pool, is_intact, shards, 2 * threads, self._source.check)
            return [shard for shard, is_there in zip(shards, intact, strict=True) if not is_there]

    def _block(self, images: np.ndarray, shard: int) -> np.ndarray:
        return images[self._source.starts[shard] : self._source.starts[shard + 1]]

    def _fill(self, missing: list[int], progress: Callable[[int, int], None]) -> None:
        images = np.asarray(np.memmap(self._images_path, np.uint8, "r+", shape=self._images.shape))
        filled = np.memmap(self._filled_path, "<u8", "r+")
        done = self.index.images - sum(self.index.shards[shard].images for shard in missing)
        progress(done, self.index.images)
        for shard, path in self._source.fetch(missing):
            block, indices = self._block(images, shard), np.arange(*self._source.starts[shard : shard + 2])
            self._source.read_into(block, indices, lambda _, path=path: _shard_file(path))  # type: ignore[misc]
            self._block(filled, shard)[:] = _checksums(block)
            if not self._source.is_local:
                path.unlink()
            done += len(block)
            progress(done, self.index.images)


class ShardCache(ImageCache):
    """Verified shards in the folder `shards`, the least recently used evicted first; images are decoded at each read.

    The processes of a node share the files and the budget, and change what is there under one lock. None keeps a shard
    open from one read to the next, so that an evicted one gives its place on disk back, while a reader that has just
    opened it reads on. From a bucket that is a folder, shards are read where they lie, and nothing is kept.
    """

    def __init__(self, source: ShardSource, budget_bytes: int) -> None:
        """Keeps at most `budget_bytes` of shards, or one if that is less."""
        super().__init__(source)
        self._budget_bytes = budget_bytes
        self._folder = source.folder / "shards"
        with os_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
        # A batch on its way is delivered, so that training stops between steps, where all processes agree, and saves.
        source.stop = NEVER
        self._verified = cache(lambda shard: source.verified(shard, self._folder))
        self._block: tuple[int, int] | None = None
        self._due: tuple[int, ...] = ()
        self._prefetcher = ThreadPoolExecutor(1, "prefetch")

    def _read(self, indices: Int64s, out: Uint8s) -> None:
        try:
            self._source.read_into(out, indices, self._open)
        except BadDataError:
            # What has rotted on this disk since it was fetched is the bucket's no longer: fetch it anew.
            with self._source.lock():
                for shard in np.searchsorted(self._source.starts, indices, side="right") - 1:
                    self._path(shard).unlink(missing_ok=True)
            self._source.read_into(out, indices, self._open)

    def _open(self, shard: int) -> BinaryIO:
        """A shard's file, fetched if it is not here; each image that is read from it is compared with its checksum."""
        if self._source.is_local:
            return _shard_file(self._verified(shard))
        while True:
            with suppress(MissingInputError):
                file = _shard_file(self._path(shard))
                os.utime(file.fileno())
                return file
            self._fetch([shard])

    def _path(self, shard: int) -> Path:
        return self._folder / self.index.shards[shard].name

    def _fetch(self, shards: list[int]) -> None:
        with self._source.lock(), os_errors(self._folder):
            # Another process may have fetched them while this one waited.
            missing = [shard for shard in shards if not self._path(shard).exists()]
            self._make_room(missing)
            for shard, path in self._source.fetch(missing):
                path.replace(self._path(shard))

    def _make_room(self, missing: list[int]) -> None:
        """Evicts shards, those that are not due and were not read for longest first, until `missing` fit the budget."""
        due = {self._path(shard) for shard in self._due}
        files = sorted(self._folder.iterdir(), key=lambda path: (path in due, path.stat().st_mtime_ns))
        excess_bytes = sum(path.stat().st_size for path in files) - self._budget_bytes
        excess_bytes += sum(self.index.shards[shard].bytes for shard in missing)
        for path in files:
            if excess_bytes <= 0:
                break
            excess_bytes -= path.stat().st_size
            path.unlink()

    def prefetch(self, order: Order, image_number: int) -> None:
        """Fetches in the background, soonest needed first, as many of the coming shards as the budget holds.

        Raises:
            BadConfigError: the shards of one block are more than the budget holds, so that nearly every image would
                cost the transfer of a shard.
        """
        block = order.block_of(image_number)
        if block == self._block or self._source.is_local:
            return
        if self._block is None:
            self._check_fits(order)
        # The rest of an epoch and the next one name all shards.
        upcoming = dict.fromkeys(islice(order.upcoming_shards(image_number), 2 * len(self.index.shards)))
        sums_bytes = accumulate(self.index.shards[shard].bytes for shard in upcoming)
        fitting = [sum_bytes for sum_bytes in sums_bytes if sum_bytes <= self._budget_bytes]
        self._block, self._due = block, tuple(islice(upcoming, len(fitting)))
        self._prefetcher.submit(self._prefetch, self._due)

    def _prefetch(self, due: tuple[int, ...]) -> None:
        # An error ends up unread in the future: whoever needs the shard meets it again, and reports it.
        missing = (shard for shard in due if not self._path(shard).exists())
        while (group := list(islice(missing, _DOWNLOADS))) and self._due is due:
            self._fetch(group)

    def _check_fits(self, order: Order) -> None:
        sizes = [shard.bytes for shard in self.index.shards]
        total_bytes, block_images = sum(sizes), order.block_images or self.index.images
        # A block begins and ends within a shard.
        block_bytes = min(total_bytes, total_bytes * block_images // self.index.images + 2 * max(sizes))
        if block_bytes > self._budget_bytes:
            raise BadConfigError(
                f"dataset {self.index.name} is shuffled in blocks of {block_images:,} images, more than it caches: set "
                f"data.cache_gigabytes={np.ceil(block_bytes / 1e8) / 10:g}, or begin a run with a smaller "
                "data.shuffle_block_images"
            )

    def close(self) -> None:
        """Ends its threads; a download that is under way is waited for."""
        self._due = ()
        self._prefetcher.shutdown(cancel_futures=True)
        super().close()


def chosen_images(bucket: Store, key: str, index: DatasetIndex) -> ImageCache:
    """For a few images that a person wants to see: no shard of the dataset at `key` is fetched for them."""
    return ImageCache(ShardSource(bucket, key, index, default_cache_dir() / index.dataset_id, threads=_CHOOSERS))


def _recipe(index: DatasetIndex) -> Recipe:
    """What is done to each image of tars that were indexed in place."""
    if index.codecs != codec_versions():
        logging.getLogger(__name__).warning(
            f"dataset {index.name} was indexed with {index.codecs}, and not {codec_versions()}: last bits may differ"
        )
    return Recipe(index.size, index.crop, index.resize_filter, index.channels, min_side=1)


def _shard_file(path: Path) -> BinaryIO:
    with os_errors(path):
        return path.open("rb", buffering=0)


def _allocate(path: Path, size_bytes: int) -> None:
    """Makes a file take its place on disk now: one with holes is SIGBUS when the disk is full later."""
    where = f"{path} ({size_bytes:,} bytes; DDPM_CACHE moves it, data.cache_gigabytes limits it)"
    try:
        with os_errors(where), path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            os.truncate(file.fileno(), size_bytes)
    except DiskFullError:
        path.unlink(missing_ok=True)
        raise


def _checksums(images: Uint8s) -> list[int]:
    """What is noted of them."""
    return [_IS_FILLED | google_crc32c.value(image) for image in images]

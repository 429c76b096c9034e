"""Where the shards of a dataset lie: beside its index, or, of tars that were indexed in place, where these were."""

from __future__ import annotations

from pathlib import Path

from job.data.shards import DatasetIndex
from job.exits import MissingInputError
from job.store import Store, open_store


class Places:
    """The tar of each shard: its store, key and URI."""

    def __init__(self, bucket: Store, key: str, index: DatasetIndex) -> None:
        """Opens the stores of the shards of the dataset at `key`, and touches none of them.

        Foreign stores wait for a bucket that is away as `bucket` does.

        Raises:
            BadRequestError: a URI that no store speaks.
            NoPermissionError: no credentials for its bucket were found.
        """
        self._bucket, self._key, self._index = bucket, key, index
        folders = {split_uri(shard.uri)[0] for shard in index.shards if shard.uri}
        self._foreign = {folder: open_store(folder, bucket.retry.elsewhere()) for folder in folders}

    @property
    def is_local(self) -> bool:
        """Whether all shards are files of this machine, which are read where they lie."""
        stores = self._foreign.values() or [self._bucket]
        return all(store.uri.startswith("/") for store in stores)

    def of(self, number: int) -> tuple[Store, str]:
        """The store that holds a shard's tar, and its key there."""
        shard = self._index.shards[number]
        if not shard.uri:
            return self._bucket, f"{self._key}/{shard.name}"
        folder, name = split_uri(shard.uri)
        return self._foreign[folder], name

    def uri(self, number: int) -> str:
        """For messages."""
        store, key = self.of(number)
        return store.uri_of(key)

    def path(self, number: int) -> Path:
        """The file of a shard that is local.

        Raises:
            MissingInputError: it is not there.
        """
        store, key = self.of(number)
        # An index is written by anybody: a pipe that it names would be waited for in vain.
        if not store.exists(key):
            raise MissingInputError(f"no object at {store.uri_of(key)}: restore it, or make the dataset anew")
        with store.open(key) as file:
            return Path(file.name)


def split_uri(uri: str) -> tuple[str, str]:
    """The folder and the name of an object."""
    folder, _, name = uri.rpartition("/")
    return folder or "/", name

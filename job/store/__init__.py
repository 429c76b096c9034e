"""Object storage: what we ask of a bucket (`base`), and who answers (`local`, `gcs`)."""

from job.store.base import Blob, ConflictError, Entry, ObjectExistsError, ObjectMissingError, Store

__all__ = ["Blob", "ConflictError", "Entry", "ObjectExistsError", "ObjectMissingError", "Store", "open_store"]


def open_store(uri: str) -> Store:
    """Opens `gs://BUCKET[/PREFIX]`, `file:///PATH` or a plain path.

    Backends are imported only when asked for, so that a local run needs no cloud library.

    Raises:
        BadRequestError: a scheme nobody here speaks, or a backend whose extra is not installed.
    """
    raise NotImplementedError

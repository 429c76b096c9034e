"""Reads checkpoints of other programs without executing anything in them.

A folder of diffusers has a configuration. The names of the tensors identify a `.pt` or `.safetensors`: Ho et al.'s
networks as pesser/pytorch_diffusion and the DDIM authors keep them, and dome272's and ErenGurs'.
"""

from __future__ import annotations

import errno
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm import interop
from ddpm.image_size import ImageSize
from ddpm.interop import NoCounterpartError
from job.config import LARGEST_FILE_BYTES
from job.exits import BadDataError, BadRequestError, JobError, MissingInputError
from job.progress import note, printable
from job.runs.checkpoints import ID2LABEL, RUN_CONFIG, SCHEDULER_CONFIG
from job.store import Retry, is_remote, open_store, open_to_read, split_uri, without_queries
from job.store.files import os_errors, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[str, "Tensor"]
"""Tensors by name."""

FOLDERS = ("unet_ema/", "unet/", "")
"""The places of the network in a folder of diffusers: averages first, flat folders last."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MOST_JSON_BYTES = 1 << 24
"""The largest size of a configuration, or of the index of weights in several files."""
DOME_SIZE = 64
"""The usual size in pixels of the networks of dome272 and ErenGurs, whose files do not state it."""
_DEEPEST = 3
_DOME_SETTINGS = {
    "sample.sampler": "ddpm",
    "sample.steps": 1000,
    "sample.grid": "leading",
    "sample.variance": "fixed_large",
    "sample.clip": False,
}
"""The sampling settings of both programs."""


@dataclass(frozen=True)
class OtherCheckpoint:
    """A network of another program, in terms of this one.

    Attributes:
        what: kind and origin, for people.
        settings: the known settings of its network and process, by dotted key; and `out_channels` of a U-Net.
        tensors: its tensors by the names of our network's parameters.
        classes: the names of its classes; empty if it states none.
        run_config: the configuration of the run of ours that it is of, as it is; None without one.
    """

    what: str
    settings: dict[str, Any]
    tensors: Named
    classes: tuple[str, ...] = ()
    run_config: bytes | None = None


@dataclass(frozen=True)
class _Source:
    """A folder or a file, on the disk or in a bucket."""

    where: str
    names: frozenset[str]
    """The names of the files in a folder, relative to it; empty for a file."""
    fetch: Callable[[str], Path]
    """Returns the local path of a file by its name, after a download if needed."""


@contextmanager
def opened_checkpoint(
    source: str, size: ImageSize | None, retry: Retry, *, with_config: bool
) -> Iterator[OtherCheckpoint]:
    """Opens the checkpoint at `source`; its tensors may need their files until the context ends.

    Args:
        source: a path, or a URI of an object or a folder in a bucket.
        size: of its images, if the checkpoint does not state it.
        retry: the retries for its bucket.
        with_config: whether to read the configuration of a run of ours.

    Raises:
        MissingInputError: nothing lies at `source`.
        BadDataError: the checkpoint is damaged, would execute code, or has a network without a counterpart here.
    """
    with _opened_source(source, retry) as found:
        try:
            read = _of_diffusers(found, with_config) if found.names else _of_file(found.where, found.fetch(""), size)
        except JobError:
            raise
        # Files of strangers cause anything from KeyError to OverflowError in readers; each means the same here.
        except Exception as error:
            said = str(error) if isinstance(error, NoCounterpartError) else f"{type(error).__name__}: {error}"
            raise BadDataError(f"{found.where} cannot be imported: {printable(said):.300}") from None
        yield read


@contextmanager
def _opened_source(source: str, retry: Retry) -> Iterator[_Source]:
    nothing = MissingInputError(
        f"nothing lies at {without_queries(source)}: name a folder of diffusers, a .pt or a .safetensors"
    )
    with scratch_folder("import") as scratch:
        if not is_remote(source):
            # A cache of the hub consists of links, which a store would refuse: local files are read directly.
            path = Path(open_store(source, retry).uri)
            with os_errors(path):
                names = frozenset(str(file.relative_to(path)) for file in path.glob("**/*") if file.is_file())
                # Reading a pipe could wait for ever, and a device has no end.
                if not (names or path.is_file()):
                    raise nothing
            yield _Source(str(path), names, lambda name: path / name if name else path)
            return
        folder, last = split_uri(source.rstrip("/"))
        if not folder.endswith("://") and (store := open_to_read(folder, retry)).exists(last):
            names = frozenset[str]()
        else:
            store, last = open_to_read(source, retry), ""
            if not (names := frozenset(entry.key for entry in store.list())):
                raise nothing

        def fetch(name: str) -> Path:
            store.download(name or last, path := scratch / (name or last))
            return path

        yield _Source(store.uri_of(last) if last else store.uri, names, fetch)


def _of_diffusers(source: _Source, with_config: bool) -> OtherCheckpoint:
    folder = next((folder for folder in FOLDERS if f"{folder}config.json" in source.names), None)
    if folder is None:
        raise BadDataError(
            f"{source.where} is not a folder of diffusers: it has neither unet/config.json nor config.json. For "
            "another program name the .pt file itself"
        )
    config = _json(source, f"{folder}config.json")
    schedulers = (SCHEDULER_CONFIG, SCHEDULER_CONFIG.rpartition("/")[2])
    scheduler = next((_json(source, name) for name in schedulers if name in source.names), None)
    has_config = RUN_CONFIG in source.names
    return OtherCheckpoint(
        "a UNet2DModel of diffusers",
        settings_of_diffusers(config, scheduler),
        interop.with_names_of_today(_weights(source, folder)),
        classes=_class_names(source) if ID2LABEL in source.names else (),
        run_config=_bytes(source, RUN_CONFIG, LARGEST_FILE_BYTES) if has_config and with_config else None,
    )


def settings_of_diffusers(unet: dict[str, Any], scheduler: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the settings that the configurations of a `UNet2DModel` and a scheduler of diffusers state.

    Raises:
        NoCounterpartError: they state something else that has no counterpart here.
    """
    settings = _unet_settings(interop.unet_options(unet))
    if scheduler is not None:
        settings |= {f"diffusion.{key}": value for key, value in interop.process_options(scheduler).items()}
        settings |= {f"sample.{key}": value for key, value in interop.sample_options(scheduler).items()}
    return settings


def _class_names(source: _Source) -> tuple[str, ...]:
    names = _json(source, ID2LABEL)
    try:
        return tuple(printable(names.pop(str(number))) for number in range(len(names)))
    except (KeyError, TypeError):
        raise BadDataError(
            f'{source.where}/{ID2LABEL} does not name each class by its number, as in {{"0": "forest", "1": "sea"}}: '
            "correct it, or delete it"
        ) from None


@contextmanager
def opened_autoencoder(source: str, retry: Retry) -> Iterator[tuple[dict[str, Any], Named]]:
    """Opens an autoencoder of diffusers, alone or in a pipeline: its configuration and weights.

    Raises:
        MissingInputError: nothing lies at `source`.
        BadDataError: the autoencoder is damaged, or would execute code.
    """
    with _opened_source(source, retry) as found:
        folder = next((folder for folder in ("vae/", "") if f"{folder}config.json" in found.names), None)
        if folder is None:
            raise BadDataError(f"{found.where} is not an autoencoder of diffusers: it has no config.json")
        try:
            named = interop.with_names_of_today(_weights(found, folder))
        except NoCounterpartError as error:
            raise BadDataError(f"{found.where} is not an autoencoder: {error}") from None
        yield _json(found, f"{folder}config.json"), named


def _unet_settings(options: interop.Options) -> dict[str, Any]:
    """Returns the settings of a configuration for these arguments of `UNet`."""
    rest = {"num_classes": 0, **options}
    settings = {"data.size": rest.pop("image_size").stated, "data.channels": rest.pop("in_channels")}
    settings["out_channels"] = rest.pop("out_channels")
    return settings | {"model.kind": "unet"} | {f"model.{key}": value for key, value in rest.items()}


def _weights(source: _Source, folder: str) -> Named:
    """Returns all tensors of a network of diffusers, from one file, or from several with an index."""
    for name in (f"{folder}{name}" for name in WEIGHTS):
        parts = [name] if name in source.names else []
        if not parts and (index := f"{name}.index.json") in source.names:
            places = _json(source, index).get("weight_map", {})
            parts = sorted({f"{folder}{part}" for part in dict(places).values()})
            if strangers := [part for part in parts if part not in source.names]:
                raise BadDataError(f"{source.where}/{strangers[0]} is missing, though {index} names it")
        if parts:
            loaded = [_averages_first(_tensors(f"{source.where}/{part}", source.fetch(part)))[0][1] for part in parts]
            return {name: tensor for named in loaded for name, tensor in named.items()}
    raise BadDataError(f"{source.where} has no weights: it lacks {folder}{WEIGHTS[0]} and {folder}{WEIGHTS[1]}")


def _json(source: _Source, name: str) -> dict[str, Any]:
    try:
        document = json.loads(_bytes(source, name, MOST_JSON_BYTES))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BadDataError(f"{source.where}/{name} is not a JSON object such as diffusers writes")
    return document


def _bytes(source: _Source, name: str, most: int) -> bytes:
    path = source.fetch(name)
    with os_errors(path), path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BadDataError(f"{source.where}/{name} is larger than {most >> 10:,} KiB, as no such file is")
    return content


def _of_file(where: str, path: Path, size: ImageSize | None) -> OtherCheckpoint:
    candidates = [(key, interop.without_prefixes(found)) for key, found in _averages_first(_tensors(where, path))]
    for key, tensors in candidates:
        if found := _known(tensors, size):
            if key:
                note(f"{where}: taking its {printable(key):.80}")
            return found
    if any(name.startswith("down_blocks.") for _, tensors in candidates for name in tensors):
        raise BadRequestError(f"{where} is of diffusers: name its folder, which has the config.json")
    named = ", ".join(list(candidates[0][1])[:3])
    raise NoCounterpartError(f"its tensors ({named:.200}, …) belong to an unknown network")


def _known(tensors: Named, size: ImageSize | None) -> OtherCheckpoint | None:
    """Returns the network with tensors of these names; None if it is unknown."""
    process = {"diffusion.schedule": "linear", "diffusion.timesteps": 1000, "diffusion.prediction": "epsilon"}
    if "temb.dense.0.weight" in tensors:
        named = interop.from_ho(tensors)
        return OtherCheckpoint("a U-Net of Ho et al.", process | _unet_settings(interop.ho_options(named, size)), named)
    if "inc.double_conv.0.weight" not in tensors:
        return None
    settings = process | _DOME_SETTINGS | {"model.kind": "dome", "model.num_classes": 0}
    settings |= {
        "data.size": size.stated if size else DOME_SIZE,
        "data.channels": (channels := tensors["inc.double_conv.0.weight"].shape[1]),
    }
    settings["out_channels"] = channels
    if (labels := tensors.get("label_emb.weight")) is not None:
        # That program adds nothing to the timestep without a class, as a last embedding of zeros does: guidance works.
        settings |= {"model.num_classes": len(labels), "model.label_dropout": 0.1}
        tensors = tensors | {"label_emb.weight": interop.with_null_class(labels)}
    return OtherCheckpoint("a U-Net of dome272's ddpm", settings, tensors)


def _averages_first(loaded: Any) -> list[tuple[str, Named]]:
    """Returns the sets of named tensors in a loaded file, averages first, each with its place in the file."""
    import torch

    found: list[tuple[str, Named]] = []
    walked: set[int] = set()

    def walk(part: Any, path: tuple[str, ...]) -> None:
        # Without this check, lists that contain each other would be walked for ever.
        if id(part) in walked or len(path) > _DEEPEST:
            return
        walked.add(id(part))
        if isinstance(part, list | tuple):
            # The DDIM authors' list ends with the average.
            part = dict(reversed([*enumerate(part)]))
        if isinstance(part, Mapping):
            if named := {key: value for key, value in part.items() if isinstance(key, str) and torch.is_tensor(value)}:
                found.append((".".join(path), named))
            for key, value in part.items():
                walk(value, (*path, str(key)))

    walk(loaded, ())
    if not found:
        raise NoCounterpartError("it holds no tensors by name")
    return sorted(found, key=lambda each: not re.search(r"(?i)(^|[._])(ema|average)", each[0]))


def _tensors(where: str, path: Path) -> Any:
    """Returns the content of a file, with its tensors on the CPU.

    Raises:
        BadDataError: the file is damaged, or would execute code.
    """
    import torch
    from safetensors.torch import load_file

    with os_errors(path), warnings.catch_warnings(action="ignore"):
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            _check_not_compressed(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        # Damaged files cause anything from EOFError to AssertionError in readers; each means the same here.
        except Exception as error:
            # A truncated zip makes PyTorch seek to a place before its beginning, which the system refuses.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise BadDataError(
                    f"{where} is a pickle that would execute {asked[1]:.100}; nothing of it was executed. Save only "
                    "its tensors, as a state_dict, and import that"
                ) from None
            raise BadDataError(
                f"{where} is truncated, damaged, or not a checkpoint of torch.save or safetensors; nothing of it was "
                "executed"
            ) from None


def _check_not_compressed(path: Path) -> None:
    """Raises for a compressed archive: PyTorch compresses nothing, and such a small file could fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than it is")

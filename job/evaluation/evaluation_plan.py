"""What an evaluation finds before it begins. Needs no tensors, so that errors come at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import PurePosixPath

from job.data.shards import REFERENCES, DatasetIndex, dataset_key
from job.evaluation.extractors import Extractor, LocatedExtractor, locate_extractor
from job.evaluation.feature_folder import FeatureFolder
from job.exits import BadDataError, BadRequestError, how_to_install
from job.pieces import WHOLE, Slice
from job.plan import Plan, RunHandle
from job.requests import EvaluateRequest
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.scores import Reference, Scores
from job.sampling.sampling_plan import SamplePlan, plan_sampling, plan_sets
from job.sampling.sets import SampleSet, piece_images
from job.stop import NEVER, Stop
from job.store import ObjectMissingError

FEWEST_IMAGES = 12
"""Of each side: `ddpm.metrics` looks for five neighbours of each, also among half of the real ones."""


@dataclass(frozen=True)
class EvaluatePlan:
    """A run, the network that sees its images, and how many are drawn and compared."""

    request: EvaluateRequest
    sampling: SamplePlan
    found: LocatedExtractor
    reference: Reference

    @property
    def index(self) -> DatasetIndex:
        """Of the run's dataset."""
        assert self.sampling.index is not None
        return self.sampling.index

    def check_metrics(self) -> None:
        """Returns if all metrics that are wanted can be told.

        Raises:
            BadRequestError: the network has no classes, or the run no bound.
        """
        chosen, config = {*self.request.chosen_metrics}, self.sampling.config
        if self.request.metrics and "is" in chosen and not self.found.extractor.has_classes:
            raise BadRequestError(
                f"--metrics is: {self.found.extractor.title} comes without its classes here; --extractor mobilenet has "
                "some, and its score is told as cs-mobilenet"
            )
        why = "independent noise, and diffusion.offset_noise is set" if config.diffusion.offset_noise else ""
        why = f"pixels, and {self.index.name} holds latents" if self.index.encoding else why
        if self.request.metrics and "bpd" in chosen and why:
            raise BadRequestError(f"--metrics bpd: the bound is about {why}")

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """What is to be drawn and scored: each checkpoint as often as was asked for, its manifest read once."""
        found = []
        for repeat in range(self.request.repeats):
            request = replace(self.sampling.request, first_seed=repeat * self.request.count)
            found += [Evaluation(self, one) for one in plan_sets(replace(self.sampling, request=request))]
        return sorted(found, key=lambda each: each.images.ref)


@dataclass(frozen=True)
class Evaluation:
    """Images of a checkpoint that are to be scored; only their features are kept."""

    plan: EvaluatePlan
    images: SampleSet

    @property
    def fingerprint(self) -> str:
        """Of all that decides the scores."""
        drawing = self.images.drawing.model_dump(mode="json", exclude={"save"})
        return _hash_of({"drawing": drawing, "reference": self.plan.reference.model_dump()})

    @property
    def batch(self) -> str:
        """Name of its folder."""
        return f"{self.images.name}-{self.plan.reference.extractor}-{self.fingerprint[:8]}"

    @property
    def folder(self) -> FeatureFolder:
        """Features of the images."""
        drawing, key = self.images.drawing, PurePosixPath(ObjectKind.SCORES.key(batch=self.batch))
        store = self.images.run.sub(str(key.parent))
        return FeatureFolder(store, self.fingerprint, drawing.count, drawing.piece_images, self.images.share)

    @property
    def ref(self) -> CheckpointRef:
        """Whose images they are."""
        return self.images.ref

    def scores(self) -> Scores | None:
        """What came of it, if it was done before.

        Raises:
            BadDataError: the record is rotten.
        """
        try:
            return Scores.load(self.images.run, ObjectKind.SCORES.key(batch=self.batch))
        except ObjectMissingError:
            return None
        except BadDataError as error:
            raise BadDataError(f"{error}; delete it, and the same command makes it again") from None


def plan_evaluation(request: EvaluateRequest, stop: Stop = NEVER) -> EvaluatePlan:
    """Finds the run, its dataset, its checkpoints and the network that sees images. Writes nothing.

    Raises:
        MissingInputError: no such run, dataset or checkpoint, or the network's weights are nowhere.
        BadRequestError: fewer images than the metrics need, a metric that the network has not, or as `plan_sampling`.
        BadConfigError: as `plan_sampling`.
    """
    sampling = plan_sampling(request.sampling, stop)
    index = sampling.pictures()
    if index is None:
        raise BadRequestError(
            f"run {request.run!r} was imported without a dataset, and there is nothing to compare its images with: "
            "import it once more, under another name, with --dataset"
        )
    found = locate_extractor(request.extractor, sampling.bucket, request.extractor_file)
    references = min(index.images, request.references)
    if request.count < FEWEST_IMAGES or references < FEWEST_IMAGES:
        raise BadRequestError(
            f"{request.count:,} images against {references:,} real ones of {index.name}: scores need {FEWEST_IMAGES} "
            "of each at least, and say something from a thousand on"
        )
    plan = EvaluatePlan(request, sampling, found, reference_of(index, found.extractor, references))
    plan.check_metrics()
    return plan


def check_formulas() -> None:
    """Raises `BadRequestError` if what computes scores is not installed."""
    if find_spec("torch_fidelity") is None:
        raise BadRequestError(f"scores need more than is installed (torch-fidelity): {how_to_install('evaluate')}")


def check_scores(plan: Plan) -> None:
    """Returns if the scores that a run wants while it trains can be computed, or it wants none.

    Raises:
        MissingInputError: the network's weights are nowhere.
        BadRequestError: its dataset has too few images, or what computes scores is not installed.
    """
    if not plan.config.evaluate.every_epochs:
        return
    check_formulas()
    locate_extractor(plan.config.evaluate.extractor, plan.bucket)
    if plan.index.images < FEWEST_IMAGES:
        raise BadRequestError(
            f"evaluate.every_epochs: {plan.index.name} has {plan.index.images:,} images; scores need {FEWEST_IMAGES}"
        )


def reference_of(index: DatasetIndex, extractor: Extractor, images: int) -> Reference:
    """What is compared with: so many images of a dataset at most, as a network sees them."""
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


def reference_folder(of_run: RunHandle, reference: Reference, share: Slice = WHOLE) -> FeatureFolder:
    """Features of the real images, which all runs on this dataset share."""
    fingerprint = _hash_of(reference.model_dump())
    name = f"{REFERENCES}/{reference.extractor}-{reference.images}-{fingerprint[:12]}"
    store = of_run.bucket.sub(f"{dataset_key(reference.dataset, reference.size)}/{name}")
    return FeatureFolder(store, fingerprint, reference.images, piece_images(reference.images), share)


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

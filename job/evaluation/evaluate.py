"""`ddpm evaluate`: draws, sees and scores on all processes. Images never touch a disk; their features do, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpm import metrics
from ddpm.catalogue import METRICS
from ddpm.generation import Sampling
from job.config import method
from job.data.order import Order
from job.data.shards import dataset_key, load_index
from job.evaluation.evaluation_plan import EvaluatePlan, Evaluation, reference_folder
from job.evaluation.feature_folder import Named
from job.evaluation.validation import validation_row
from job.exits import BadDataError
from job.pieces import WHOLE, Advance, Made, Slice
from job.plan import RunHandle
from job.processes.ranks import meet
from job.progress import Progress
from job.runs.layout import ObjectKind
from job.runs.scores import Reference, Scores, score_name
from job.sampling.draw import prepared
from job.sampling.painter import Painter
from job.sealed import code_version, utc_now
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError

if TYPE_CHECKING:
    from ddpm.features import ExtractorOutput

See = Callable[[torch.Tensor], "ExtractorOutput"]
SEE_IMAGES = 50
"""Real images that each process sees at a time."""


def run_evaluation(plan: EvaluatePlan, stop: Stop = NEVER) -> None:
    """Scores what was planned, and prints a table for each checkpoint. Collective.

    Raises:
        BadDataError: a checkpoint, a record or the network's file is damaged; the message names it.
        StoppedError: whole pieces are saved, and the same command goes on.
    """
    ranks = meet(stop)
    # `prepared` keeps the checkpoints until all scores are printed: a run that trains would retire them.
    with prepared(plan.sampling, ranks, stop) as (sampling_plan, painter, sampling):
        plan = replace(plan, sampling=sampling_plan)
        batches = ranks.on_main(lambda: [one.batch for one in plan.evaluations if one.scores() is None])
        todo = [one for one in plan.evaluations if one.batch in batches]
        if todo:
            see, share = plan.found.load(painter.device), todo[0].images.share
            real = references(plan.sampling, plan.reference, painter, see, share)
            for evaluation in todo:
                _draw_features(evaluation, painter, sampling, see)
            folders = [reference_folder(plan.sampling, plan.reference), *(evaluation.folder for evaluation in todo)]
            if missing := ranks.on_main(lambda: sum(len(folder.pieces.missing()) for folder in folders)):
                others = f"{missing:,} pieces are to come from other machines, of which the last one scores"
                ranks.on_main(lambda: print(f"{plan.request.run}  (slice {plan.request.slice} is done: {others})"))
                return
            if real is None:
                real = references(plan.sampling, plan.reference, painter, see, share)
            for evaluation in todo:
                painter.load(plan.sampling.run, evaluation.ref, plan.sampling.sample.weights)
                _score(evaluation, painter, real or {})
        ranks.on_main(lambda: print("\n\n".join(tables(plan))))


def references(
    of_run: RunHandle, reference: Reference, painter: Painter, see: See, share: Slice = WHOLE
) -> Named | None:
    """Returns the features of the real images on the main process, {} on the others; makes what is missing. Collective.

    None while other machines are still making some.
    """
    folder, ranks = reference_folder(of_run, reference, share), painter.ranks

    def make(piece: int, advance: Advance) -> Made:
        parts, numbers = [], folder.numbers(piece)
        for start in range(0, len(numbers), SEE_IMAGES):
            painter.check_stopped()
            some = chosen[numbers[start : start + SEE_IMAGES]]
            parts.append(seen(see, images.read(some), painter.device))
            advance(len(some))
        return folder.made(piece, joined(parts))

    if not ranks.on_main(folder.pieces.missing):
        # A damaged piece is deleted, and missing then.
        with suppress(BadDataError):
            return ranks.only_on_main(folder.load) or {}
    chosen = Order((reference.of_images,), seed=0).indices(np.arange(folder.count))
    images = of_run.opened_images(painter.stop, index=of_run.pictures())
    folder.pieces.make_missing(make, f"looking at {reference.dataset}", stop=painter.stop, ranks=ranks)
    return None if ranks.on_main(folder.pieces.missing) else ranks.only_on_main(folder.load) or {}


def _draw_features(evaluation: Evaluation, painter: Painter, sampling: Sampling, see: See) -> None:
    """Draws the images of a checkpoint and keeps what the network sees in them. Collective."""
    plan, images, folder = evaluation.plan.sampling, evaluation.images, evaluation.folder
    evaluations, batch_size = painter.evaluations_of(sampling), plan.sample.batch_size

    def make(piece: int, advance: Advance) -> Made:
        first, parts, numbers = images.drawing.first_seed, [], folder.numbers(piece)
        for start in range(0, len(numbers), batch_size):
            some = [first + number for number in numbers[start : start + batch_size]]

            def after_evaluation(*_: object, count: int = len(some)) -> None:
                painter.check_stopped()
                advance(count / evaluations)

            drawn = painter.draw_alone(some, sampling, after_evaluation)
            parts.append(seen(see, drawn, painter.device))
        return folder.made(piece, joined(parts))

    painter.load(plan.run, evaluation.ref, plan.sample.weights)
    folder.pieces.make_missing(make, images.name, stop=painter.stop, ranks=painter.ranks)


def _score(evaluation: Evaluation, painter: Painter, real: Named) -> None:
    """Scores the images of a checkpoint, whose weights the painter has. Collective."""
    bound = _bits_per_dim(evaluation, painter)
    painter.ranks.on_main(lambda: _publish(evaluation, real, bound, painter.stop))


def _bits_per_dim(evaluation: Evaluation, painter: Painter) -> tuple[float | None, int]:
    """The bound on images that nobody learnt from, if there are any, else on learnt ones; on how many. Collective."""
    plan = evaluation.plan
    config, index = plan.sampling.config, plan.index
    if config.diffusion.offset_noise or index.encoding:
        return None, 0
    if index.held_out:
        index = load_index(plan.sampling.bucket, dataset_key(index.held_out, index.size))
    images = plan.sampling.opened_images(painter.stop, index=index)
    row = validation_row(
        painter, images, method.objective_of(config), config.log.validate_images, plan.sampling.sample.batch_size
    )
    return row["val_bits_per_dim"], min(config.log.validate_images, index.images)


def _publish(evaluation: Evaluation, real: Named, bound: tuple[float | None, int], stop: Stop) -> None:
    """Computes the scores, writes them down, and removes the features that they are of."""
    plan, images = evaluation.plan, evaluation.images
    try:
        drawn = evaluation.folder.load()
    except ObjectMissingError:
        # An equal evaluation that was faster has removed them.
        if evaluation.scores() is None:
            raise
        return
    values, floor, floor_images = scored(tuple(metrics.COMPARISONS), drawn, real, stop, f"scoring {images.name}")
    if "logits" in drawn:
        # It grows with the number of images.
        for scores, logits in ((values, drawn["logits"]), (floor, real["logits"][: floor_images[0]])):
            scores["is"], scores["is_std"] = metrics.inception_score(logits)
    if bound[0] is not None:
        values["bpd"] = bound[0]
    record = Scores(
        drawing=images.drawing,
        reference=plan.reference,
        values=values,
        floor=floor,
        floor_images=floor_images,
        bits_per_dim_images=bound[1],
        held_out=bool(plan.index.held_out),
        batch=evaluation.batch,
        created=utc_now(),
        code_version=code_version(),
    )
    # Whoever else saw the last piece come writes the same scores, at another moment.
    with suppress(ObjectExistsError):
        images.run.create(ObjectKind.SCORES.key(batch=evaluation.batch), record.to_json())
    evaluation.folder.delete()


def scored(
    chosen: Sequence[str], drawn: Named, real: Named, stop: Stop, title: str
) -> tuple[dict[str, float], dict[str, float], tuple[int, int]]:
    """The scores of drawn images, those of as many real ones against the others, and how many these are.

    Raises:
        StoppedError: this process was asked to stop.
    """
    reals = real["features"]
    count = min(len(drawn["features"]), len(reals) // 2)
    values: dict[str, float] = {}
    floor: dict[str, float] = {}
    with Progress(title, total=2 * len(chosen), unit="metrics") as bar:
        pairs = ((values, drawn["features"], reals), (floor, reals[:count], reals[count:]))
        for number, (scores, ours, theirs) in enumerate(pairs):
            for done, metric in enumerate(chosen, 1):
                stop.check("while scoring")
                scores.update(metrics.compared((metric,), ours, theirs))
                bar.update(number * len(chosen) + done)
    return values, floor, (count, len(reals) - count)


@torch.inference_mode()
def seen(see: See, images: np.ndarray, device: torch.device) -> Named:
    """What a network sees in uint8 [n, H, W, C]."""
    features, logits = see(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
    found = {"features": features} if logits is None else {"features": features, "logits": logits}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def joined(parts: list[Named]) -> Named:
    """The features of several batches, in their order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tables(plan: EvaluatePlan) -> Iterator[str]:
    """What a person is told of each checkpoint: the protocol, and the scores beside those of real images."""
    for ref, group in groupby(plan.evaluations, key=lambda each: each.ref):
        found = [scores for evaluation in group if (scores := evaluation.scores())]
        first, sampling = found[0], plan.sampling
        drawing, extractor = first.drawing, plan.found.extractor
        against = "{:,} real images against {:,}".format(*first.floor_images)
        seeds = f"seeds from {' and '.join(f'{one.drawing.first_seed:,}' for one in found)}"
        what = f"{sampling.run.uri.rpartition('/')[2]}, {sampling.label(ref)}"
        lines = [
            f"{what}: {drawing.count:,} images, {sampling.how()}, weights {drawing.weights}, {seeds}",
            f"against {first.reference}, seen by {extractor.title}, {extractor.how}",
            f"{'':<20}{'drawn':>22}  {against}",
        ]
        for name in _told(plan, first.values):
            of_sets = [one.values[name] for one in found]
            # The bound is about no drawn image: it is the same for all sets.
            is_drawn = name != "bpd" and len(of_sets) > 1
            spread = stdev(of_sets) if is_drawn else first.values.get(f"{name}_std")
            told = f"{fmean(of_sets):.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
            real = f"{first.floor[name]:.4g}" if name in first.floor else ""
            lines.append(f"{score_name(name, extractor.name):<20}{told:>22}  {real}")
        if "bpd" in first.values and "bpd" in plan.request.chosen_metrics:
            whose = "that nobody learnt from" if first.held_out else "that were learnt"
            lines.append(f"(bpd: the variational bound on {first.bits_per_dim_images:,} images {whose})")
        if len(found) > 1:
            lines.append(f"(± is the deviation over {len(found)} sets of seeds)")
        elif any(f"{name}_std" in first.values for name in _told(plan, first.values)):
            lines.append("(± is the deviation over parts of one set; --repeats 3 tells that over sets of seeds)")
        if drawing.count < 10_000 and "fid" in plan.request.chosen_metrics:
            lines.append("(a Fréchet distance of fewer than 10,000 images compares with no published one)")
        yield "\n".join(lines)


def _told(plan: EvaluatePlan, values: dict[str, float]) -> list[str]:
    chosen = plan.request.chosen_metrics
    return [name for metric in chosen for name in METRICS[metric].scores or (metric,) if name in values]

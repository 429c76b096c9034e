"""`ddpm evaluate`: samples, extracts features and scores on all processes. It stores features, never images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpm import figures, metrics
from ddpm.catalogue import METRICS
from ddpm.generation import Sampling, beginning
from job.config import method
from job.data.order import Order
from job.data.shards import dataset_key, load_index
from job.evaluation.evaluation_plan import COUNTS, CPU_SECONDS, EvaluatePlan, Evaluation, reference_folder
from job.evaluation.feature_folder import Named
from job.evaluation.validation import validation_row
from job.exits import BadDataError
from job.pieces import IF_NONE_RUNS, WHOLE, Advance, Made, Slice
from job.plan import RunHandle
from job.processes.ranks import Ranks, meet
from job.progress import Progress, note
from job.runs.drawings import Reference, Scores, score_name
from job.runs.layout import ObjectKind
from job.runs.outlook import duration
from job.sampling.draw import prepared
from job.sampling.painter import Painter
from job.sealed import code_version, utc_now
from job.stop import NEVER, Stop
from job.store import ObjectExistsError, ObjectMissingError

if TYPE_CHECKING:
    from ddpm.features import ExtractorFunction

REAL_BATCH_IMAGES = 50
"""Real images per batch on each process."""


def run_evaluation(plan: EvaluatePlan, stop: Stop = NEVER) -> None:
    """Scores the planned checkpoints, and prints a table for each. Collective.

    Raises:
        BadDataError: a checkpoint, a record or the network's file is damaged; the message names it.
        StoppedError: whole pieces are saved, and the same command resumes.
    """
    ranks = meet(stop)
    # `prepared` marks the checkpoints until all scores are printed: without it training could retire them.
    with prepared(plan.sampling, ranks, stop) as (sampling_plan, painter, sampling):
        # Slices share one number of samples; the same command goes on with the number that it began with.
        is_free = plan.request.count is None and not plan.request.slice and painter.device.type == "cpu"
        plans = [replace(plan, sampling=sampling_plan, count=n) for n in (COUNTS if is_free else (plan.count,))]
        begun = ranks.on_main(
            lambda: [n for n, each in enumerate(plans) if any(one.is_begun() for one in each.evaluations)][:1]
        )
        plans = [plans[n] for n in begun] or plans
        plan = plans[0]
        unscored = ranks.on_main(lambda: [one.name for one in plan.evaluations if one.scores() is None])
        if unscored:
            extract, check = plan.located.load(painter.device), painter.check_stopped
            plan = plans[ranks.on_main(lambda: _fitting(plans, painter, sampling, extract))]
            todo = [one for one in plan.evaluations if not begun or one.name in unscored]
            share = todo[0].sample_set.share
            real = real_features(plan.sampling, plan.reference, extract, ranks, stop=stop, check=check, share=share)
            for evaluation in todo:
                _draw_features(evaluation, painter, sampling, extract)
            folders = [reference_folder(plan.sampling, plan.reference), *(evaluation.folder for evaluation in todo)]
            if missing := ranks.on_main(lambda: sum(len(folder.pieces.missing()) for folder in folders)):
                others = f"{missing:,} pieces are to come from other machines; {IF_NONE_RUNS}"
                ranks.on_main(lambda: print(f"{plan.request.run}  (slice {plan.request.slice} is done: {others})"))
                return
            if real is None:
                # Other machines have made the last of them meanwhile.
                real = real_features(plan.sampling, plan.reference, extract, ranks, stop=stop, check=check, share=share)
            for evaluation in todo:
                painter.load(plan.sampling.run, evaluation.ref, plan.sampling.sample.weights)
                _score(evaluation, painter, real or {})
        ranks.on_main(lambda: print("\n\n".join(tables(plan))))


def _fitting(plans: Sequence[EvaluatePlan], painter: Painter, sampling: Sampling, extract: ExtractorFunction) -> int:
    """Returns the number of the first plan that fits into `CPU_SECONDS`, or of the last, and prints its duration."""
    drawing, looking = seconds_per_image(painter, sampling, extract)
    pieces = reference_folder(plans[0].sampling, plans[0].reference).pieces
    real_images = sum(pieces.sizes[piece] for piece in pieces.missing())
    seconds = [len(plan.evaluations) * plan.count * (drawing + looking) for plan in plans]
    chosen = next((n for n, each in enumerate(seconds) if each <= CPU_SECONDS), len(plans) - 1)
    real = f", and {duration(real_images * looking / 3600)} for {real_images:,} real ones" if real_images else ""
    more = "; --count sets another number" if len(plans) > 1 else ""
    note(f"expected: {duration(seconds[chosen] / 3600)} for {plans[chosen].count:,} images{real}{more}")
    return chosen


def seconds_per_image(painter: Painter, sampling: Sampling, extract: ExtractorFunction) -> tuple[float, float]:
    """Measures how long all processes take to draw an image, and to compute its features."""
    seeds, points = torch.arange(8, device=painter.device), sampling.points(painter.process)
    denoise, x = painter.denoiser(seeds, sampling), beginning(points, painter.noise_of(seeds))
    for _ in ("to warm up", "to measure"):
        # Latents are decoded once, and on a GPU only a copy waits for the result.
        times = [time.monotonic()]
        x_start = denoise(x, points[len(points) // 2]).cpu().to(painter.device)
        times.append(time.monotonic())
        images = figures.to_uint8(painter.pixels(x_start))
        times.append(time.monotonic())
        features_of(extract, images, painter.device)
        times.append(time.monotonic())
    evaluating, decoding, looking = np.diff(times) / painter.ranks.world_size / len(seeds)
    return painter.evaluations_of(sampling) * evaluating + decoding, looking


def real_features(
    of_run: RunHandle,
    reference: Reference,
    extract: ExtractorFunction,
    ranks: Ranks,
    *,
    stop: Stop,
    check: Callable[[], object],
    share: Slice = WHOLE,
) -> Named | None:
    """Makes the missing features of the real images of this machine's slice, and loads all of them. Collective.

    `check` is called now and then, and raises to stop.

    Returns:
        All features on the main process, {} on the others; None while other machines are still making some.
    """
    folder = reference_folder(of_run, reference, share)

    def make(piece: int, advance: Advance) -> Made:
        parts, numbers = [], folder.numbers(piece)
        for start in range(0, len(numbers), REAL_BATCH_IMAGES):
            check()
            some = chosen[numbers[start : start + REAL_BATCH_IMAGES]]
            parts.append(features_of(extract, images.read(some), ranks.device))
            advance(len(some))
        return folder.made(piece, joined(parts))

    if not ranks.on_main(folder.pieces.missing):
        # Loading deletes a damaged piece, which is made again below.
        with suppress(BadDataError):
            return ranks.only_on_main(folder.load) or {}
    chosen = Order((reference.of_images,), seed=0).indices(np.arange(folder.count))
    images = of_run.opened_images(stop, index=of_run.pictures())
    folder.pieces.make_missing(make, f"looking at {reference.dataset}", stop=stop, ranks=ranks)
    if ranks.on_main(folder.pieces.missing):
        return None
    return ranks.only_on_main(folder.load) or {}


def _draw_features(evaluation: Evaluation, painter: Painter, sampling: Sampling, extract: ExtractorFunction) -> None:
    """Samples the images of a checkpoint and stores their features. Collective."""
    plan, sample_set, folder = evaluation.plan.sampling, evaluation.sample_set, evaluation.folder

    def make(piece: int, advance: Advance) -> Made:
        seeds = [sample_set.drawing.first_seed + number for number in folder.numbers(piece)]
        batches = painter.draw_batches(seeds, sampling, plan.sample.batch_size, advance)
        return folder.made(piece, joined([features_of(extract, drawn, painter.device) for drawn in batches]))

    painter.load(plan.run, evaluation.ref, plan.sample.weights)
    folder.pieces.make_missing(make, sample_set.name, stop=painter.stop, ranks=painter.ranks)


def _score(evaluation: Evaluation, painter: Painter, real: Named) -> None:
    """Scores the images of the checkpoint that the painter has loaded. Collective."""
    bound = _bits_per_dim(evaluation, painter)
    painter.ranks.on_main(lambda: _publish(evaluation, real, bound, painter.stop))


def _bits_per_dim(evaluation: Evaluation, painter: Painter) -> tuple[float | None, int]:
    """Returns the bound on held-out images, else on training images, and the number of images. Collective."""
    plan = evaluation.plan
    config, index = plan.sampling.config, plan.index
    if config.diffusion.offset_noise or index.encoding:
        return None, 0
    if index.held_out:
        index = load_index(plan.sampling.bucket, dataset_key(index.held_out, index.size))
    images = plan.sampling.opened_images(painter.stop, index=index)
    row = validation_row(
        painter,
        images,
        method.objective_of(config.model_copy(update={"sample": plan.sampling.sample})),
        count=config.log.validate_images,
        batch_size=plan.sampling.sample.batch_size,
    )
    return row["val_bits_per_dim"], min(config.log.validate_images, index.images)


def _publish(evaluation: Evaluation, real: Named, bound: tuple[float | None, int], stop: Stop) -> None:
    """Computes and stores the scores, and deletes the features of the samples."""
    plan, sample_set = evaluation.plan, evaluation.sample_set
    try:
        drawn = evaluation.folder.load()
    except ObjectMissingError:
        # An equal evaluation that was faster has deleted the features.
        if evaluation.scores() is None:
            raise
        return
    values, floor, floor_images = scored(tuple(metrics.COMPARISONS), drawn, real, stop, f"scoring {sample_set.name}")
    if "logits" in drawn:
        # The inception score grows with the number of images, so both sides get the same number.
        for scores, logits in ((values, drawn["logits"]), (floor, real["logits"][: floor_images[0]])):
            scores["is"], scores["is_std"] = metrics.inception_score(logits)
    if bound[0] is not None:
        values["bpd"] = bound[0]
    record = Scores(
        drawing=sample_set.drawing,
        reference=plan.reference,
        values=values,
        floor=floor,
        floor_images=floor_images,
        bits_per_dim_images=bound[1],
        held_out=bool(plan.index.held_out),
        batch=evaluation.name,
        created=utc_now(),
        code_version=code_version(),
    )
    # Another machine that found no piece missing may write the same scores at another time.
    with suppress(ObjectExistsError):
        sample_set.run.create(ObjectKind.SCORES.key(batch=evaluation.name), record.to_json())
    evaluation.folder.delete()


def scored(
    chosen: Sequence[str], drawn: Named, real: Named, stop: Stop, title: str
) -> tuple[dict[str, float], dict[str, float], tuple[int, int]]:
    """Returns the scores of samples, those of real images against other real images, and the numbers of the latter.

    Raises:
        StoppedError: a stop was requested.
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
def features_of(extract: ExtractorFunction, images: np.ndarray, device: torch.device) -> Named:
    """Returns the features of images, uint8 [n, H, W, C]."""
    features, logits = extract(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
    found = {"features": features} if logits is None else {"features": features, "logits": logits}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def joined(parts: list[Named]) -> Named:
    """Returns the features of several batches, in their order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tables(plan: EvaluatePlan) -> Iterator[str]:
    """Yields a text for each checkpoint: the protocol, and the scores beside those of real images."""
    for ref, group in groupby(plan.evaluations, key=lambda each: each.ref):
        found = [scores for evaluation in group if (scores := evaluation.scores())]
        first, sampling = found[0], plan.sampling
        drawing, extractor = first.drawing, plan.located.extractor
        against = "{:,} real images against {:,}".format(*first.floor_images)
        seeds = f"seeds from {' and '.join(f'{one.drawing.first_seed:,}' for one in found)}"
        what = f"{sampling.run.uri.rpartition('/')[2]}, {sampling.label(ref)}"
        lines = [
            f"{what}: {drawing.count:,} images, {sampling.how()}, weights {drawing.weights}, {seeds}",
            f"against {first.reference}, seen by {extractor.title}, {extractor.how}",
            f"{'':<20}{'drawn':>22}  {against}",
        ]
        for name in _shown_scores(plan, first.values):
            of_sets = [one.values[name] for one in found]
            # The bound does not depend on the samples: it is the same for all sets.
            is_drawn = name != "bpd" and len(of_sets) > 1
            spread = stdev(of_sets) if is_drawn else first.values.get(f"{name}_std")
            score = f"{fmean(of_sets):.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
            real = f"{first.floor[name]:.4g}" if name in first.floor else ""
            lines.append(f"{score_name(name, extractor.name):<20}{score:>22}  {real}")
        if "bpd" in first.values and "bpd" in plan.request.chosen_metrics:
            kind = "held-out images" if first.held_out else "training images"
            lines.append(f"(bpd: the variational bound on {first.bits_per_dim_images:,} {kind})")
        if len(found) > 1:
            lines.append(f"(± is the deviation over {len(found)} sets of seeds)")
        elif any(f"{name}_std" in first.values for name in _shown_scores(plan, first.values)):
            lines.append("(± is the deviation over parts of one set; --repeats 3 gives that over sets of seeds)")
        if drawing.count < 10_000 and "fid" in plan.request.chosen_metrics:
            lines.append("(a Fréchet distance of fewer than 10,000 images is not comparable with published ones)")
        yield "\n".join(lines)


def _shown_scores(plan: EvaluatePlan, values: dict[str, float]) -> list[str]:
    """Returns the names of the computed scores that the request asks for."""
    chosen = plan.request.chosen_metrics
    return [name for metric in chosen for name in METRICS[metric].scores or (metric,) if name in values]

"""Scores of a run's samples against real images: `ddpm evaluate`, and those of a run while it trains.

Both sides are sets of images, of which the features are stored and never the images. Machines share the pieces. The
loss on held-out images has points and noise that are the same for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby, zip_longest
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpm import figures, metrics, randomness
from ddpm.augment import Latents, in_unit_range
from ddpm.catalogue import METRICS
from ddpm.conditions import learnt
from ddpm.memory import Fitting
from ddpm.model import Sampling
from ddpm.objective import Condition, Drawn, Network, spread_over_steps
from ddpm.state import LossLog, loss_row
from job.config import RunConfig, method
from job.coordination.pieces import IF_NONE_RUNS, WHOLE, Advance, Made, Slice
from job.coordination.sealed import code_version, utc_now
from job.data.reading.cache import ImageCache, open_cache
from job.data.reading.order import Order
from job.data.shards import dataset_key, load_index
from job.evaluation.evaluation_plan import (
    CPU_COUNT,
    EvaluatePlan,
    Evaluation,
    FeaturePieces,
    Named,
    locate_extractor,
    reference_features,
    reference_of,
)
from job.exits import BadDataError
from job.plan import Plan
from job.processes.ranks import Ranks, meet
from job.progress import Progress, note
from job.runs.layout import ObjectKind
from job.runs.metric_rows import Row
from job.runs.run import Reference, RunHandle, Scores, score_name, score_words
from job.sampling.conditions import SEED, stored_condition
from job.sampling.painter import Painter, prepared
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
    with prepared(plan.sampling, ranks) as (sampling_plan, painter, sampling):
        plan = replace(plan, sampling=sampling_plan)
        # Machines of any kind share one number of samples.
        if plan.request.count is None and not plan.request.slice and painter.device.type == "cpu":
            plan = replace(plan, count=CPU_COUNT)
        unscored = ranks.on_main(lambda: [one.name for one in plan.evaluations if one.scores() is None])
        todo = [one for one in plan.evaluations if one.name in unscored]
        if not todo or _is_scored(plan, todo, painter, sampling):
            ranks.on_main(lambda: print("\n\n".join(tables(plan))))


def _is_scored(plan: EvaluatePlan, todo: list[Evaluation], painter: Painter, sampling: Sampling) -> bool:
    """Scores sample sets; returns False while other machines are at work on some of their features. Collective."""
    of_run, ranks = plan.sampling, painter.ranks
    extract, share = plan.located.load(painter.device), todo[0].sample_set.share
    look = partial(real_features, of_run, plan.reference, extract, ranks, painter.check_stopped, share)
    real = look()
    for one in todo:
        painter.load(of_run.run, one.sample_set.ref, of_run.config.sample.weights)

        def sampled(piece: int, advance: Advance, one: Evaluation = one) -> Iterator[np.ndarray]:
            seeds = one.sample_set.config.seeds(piece)
            return painter.sample_batches(seeds, sampling, of_run.config.sample.batch_size, advance)

        def compared(piece: int, images: np.ndarray, one: Evaluation = one) -> Named:
            seeds = one.sample_set.config.seeds(piece)
            scores = painter.conditions.scores(seeds, images) if painter.conditions else None
            return {} if scores is None else {"paired": scores}

        _make_features(one.features, sampled, extract, one.sample_set.name, ranks, compared)
    both = [reference_features(of_run, plan.reference), *(one.features for one in todo)]
    if missing := ranks.on_main(lambda: sum(len(features.missing()) for features in both)):
        others = f"{missing:,} pieces are to come from other machines; {IF_NONE_RUNS}"
        ranks.on_main(lambda: print(f"{plan.request.run}  (slice {plan.request.slice} is done: {others})"))
        return False
    # Other machines may have made the last of them meanwhile.
    real = look() if real is None else real
    for one in todo:
        painter.load(of_run.run, one.sample_set.ref, of_run.config.sample.weights)
        ranks.on_main(partial(_publish, one, real or {}, _bits_per_dim(plan, painter), ranks.stop))
    return True


def real_features(
    of_run: RunHandle,
    reference: Reference,
    extract: ExtractorFunction,
    ranks: Ranks,
    check: Callable[[], object],
    share: Slice = WHOLE,
) -> Named | None:
    """Makes the missing features of the real images of this machine's slice, and loads all of them. Collective.

    `check` is called now and then, and raises to stop.

    Returns:
        All features on the main process, {} on the others; None while other machines are still making some.
    """
    features = reference_features(of_run, reference, share)
    if not ranks.on_main(features.missing):
        # Loading deletes a damaged piece, which is made again below.
        with suppress(BadDataError):
            return ranks.only_on_main(features.load) or {}
    chosen = Order((reference.of_images,), seed=0).indices(np.arange(reference.images))
    of_pieces = np.split(chosen, np.cumsum(features.sizes, dtype=int)[:-1])
    pixels = of_run.pixels()
    assert pixels is not None
    images = open_cache(of_run.bucket, pixels, of_run.config.data.cache_gigabytes * 1e9, ranks.stop)

    def read(piece: int, advance: Advance) -> Iterator[np.ndarray]:
        for start in range(0, len(of_pieces[piece]), REAL_BATCH_IMAGES):
            check()
            some = of_pieces[piece][start : start + REAL_BATCH_IMAGES]
            yield images.read(some)
            advance(len(some))

    _make_features(features, read, extract, f"looking at {reference.dataset}", ranks)
    return None if ranks.on_main(features.missing) else ranks.only_on_main(features.load) or {}


def _make_features(
    features: FeaturePieces,
    images_of: Callable[[int, Advance], Iterator[np.ndarray]],
    extract: ExtractorFunction,
    title: str,
    ranks: Ranks,
    compared: Callable[[int, np.ndarray], Named] = lambda piece, images: {},
) -> None:
    """Makes the missing features of a set of images; `images_of` yields those of a piece in batches. Collective.

    `compared` returns further values of the images of a piece, [n, …].
    """
    fitting, seen = Fitting(), partial(features_of, extract, device=ranks.device)

    def make(piece: int, advance: Advance) -> Made:
        batches = [*images_of(piece, advance)]
        parts = [part for images in batches for part in fitting.in_parts(seen, images)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return features.made(piece, found | compared(piece, np.concatenate(batches)))

    features.make_missing(make, title, stop=ranks.stop, ranks=ranks)


@torch.inference_mode()
def features_of(extract: ExtractorFunction, images: np.ndarray, device: torch.device) -> Named:
    """Returns the features of images [n, H, W, C], in 8 bits of the channels that `figures.shown` takes."""
    features, logits = extract(torch.from_numpy(figures.shown(images)).permute(0, 3, 1, 2).to(device))
    found = {"features": features} if logits is None else {"features": features, "logits": logits}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def has_bound(config: RunConfig) -> bool:
    """Returns whether a bound on the likelihood means something: the ends of trajectories are no estimates of x_0."""
    return not config.diffusion.offset_noise and config.diffusion.objective == "denoising"


def _bits_per_dim(plan: EvaluatePlan, painter: Painter) -> tuple[float | None, int]:
    """Returns the bound on held-out images, else on training images, and the number of images. Collective."""
    config, index = plan.sampling.config, plan.index
    if not has_bound(config) or index.encoding:
        return None, 0
    if index.held_out:
        index = load_index(plan.sampling.bucket, dataset_key(index.held_out, index.size))
    images = open_cache(plan.sampling.bucket, index, config.data.cache_gigabytes * 1e9, painter.stop)
    row = validation_row(painter, images)
    return row["val_bits_per_dim"], min(config.log.validate_images, index.images)


def _publish(evaluation: Evaluation, real: Named, bound: tuple[float | None, int], stop: Stop) -> None:
    """Computes and stores the scores, and deletes the features of the samples."""
    plan, sample_set = evaluation.plan, evaluation.sample_set
    try:
        samples = evaluation.features.load()
    except ObjectMissingError:
        # An equal evaluation that was faster has deleted the features.
        if evaluation.scores() is None:
            raise
        return
    values, floor, floor_images = scored(tuple(metrics.COMPARISONS), samples, real, stop, f"scoring {sample_set.name}")
    if "logits" in samples:
        # The inception score grows with the number of images, so both sides get the same number.
        for scores, logits in ((values, samples["logits"]), (floor, real["logits"][: floor_images[0]])):
            scores["is"], scores["is_std"] = metrics.inception_score(logits)
    if "paired" in samples:
        # A derivation that is random has no consistency.
        psnr, ssim, error, psnr_before, ssim_before = samples["paired"].double().mean(dim=0).tolist()
        values |= {"psnr": psnr, "ssim": ssim} | ({"consistency": error} if error == error else {})
        floor |= {"psnr": psnr_before, "ssim": ssim_before}
    if bound[0] is not None:
        values["bpd"] = bound[0]
    record = Scores(
        sample_set=sample_set.config,
        reference=plan.reference,
        values=values,
        floor=floor,
        floor_images=floor_images,
        bits_per_dim_images=bound[1],
        held_out=bool(plan.index.held_out),
        name=evaluation.name,
        created=utc_now(),
        code_version=code_version(),
    )
    # Another machine that found no piece missing may write the same scores at another time.
    with suppress(ObjectExistsError):
        sample_set.run.create(ObjectKind.SCORES.key(folder=evaluation.name), record.to_json())
    evaluation.features.delete()


def scored(
    chosen: Sequence[str], samples: Named, real: Named, stop: Stop, title: str
) -> tuple[dict[str, float], dict[str, float], tuple[int, int]]:
    """Returns the scores of samples, those of real images against other real images, and the numbers of the latter.

    Raises:
        StoppedError: a stop was requested.
    """
    reals = real["features"]
    count = min(len(samples["features"]), len(reals) // 2)
    pairs = ((samples["features"], reals), (reals[:count], reals[count:]))
    found: list[dict[str, float]] = [{}, {}]
    with Progress(title, total=2 * len(chosen), unit="metrics") as bar:
        for number, (scores, pair) in enumerate(zip(found, pairs, strict=True)):
            for done, metric in enumerate(chosen, 1):
                stop.check("while scoring")
                scores.update(metrics.compared((metric,), *pair))
                bar.update(number * len(chosen) + done)
    return found[0], found[1], (count, len(reals) - count)


def tables(plan: EvaluatePlan) -> Iterator[str]:
    """Yields a text for each checkpoint: the protocol, and the scores beside those of real images."""
    for ref, group in groupby(plan.evaluations, key=lambda each: each.sample_set.ref):
        found = [scores for evaluation in group if (scores := evaluation.scores())]
        first, sampling = found[0], plan.sampling
        config, extractor = first.sample_set, plan.located.extractor
        against = "{:,} real images against {:,}".format(*first.floor_images)
        seeds = f"seeds from {' and '.join(f'{one.sample_set.first_seed:,}' for one in found)}"
        what = f"{sampling.run.uri.rpartition('/')[2]}, {sampling.label(ref.images_seen)}"
        lines = [
            f"{what}: {config.count:,} images, {sampling.how()}, weights {config.weights}, {seeds}",
            f"against {first.reference}, seen by {extractor.title}, {extractor.how}",
            f"{'':<20}{'samples':>22}  {against}",
        ]
        chosen = plan.request.chosen_metrics
        for name in [name for metric in chosen for name in METRICS[metric].scores or (metric,) if name in first.values]:
            of_sets = [one.values[name] for one in found]
            # The bound does not depend on the samples: it is the same for all sets.
            varies = name != "bpd" and len(of_sets) > 1
            spread = stdev(of_sets) if varies else first.values.get(f"{name}_std")
            score = f"{fmean(of_sets):.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
            real = f"{first.floor[name]:.4g}" if name in first.floor else ""
            lines.append(f"{score_name(name, extractor.name):<20}{score:>22}  {real}")
        if "bpd" in first.values and "bpd" in chosen:
            kind = "held-out images" if first.held_out else "training images"
            lines.append(f"(bpd: the variational bound on {first.bits_per_dim_images:,} {kind})")
        if "psnr" in first.values and "paired" in chosen:
            lines.append("(psnr, ssim: on the right those of the condition image itself, such as bicubic)")
        if any(" ± " in line for line in lines):
            over = f"{len(found)} sets of seeds" if len(found) > 1 else "parts of one set"
            lines.append(f"(± is the deviation over {over})")
        if config.count < 10_000 and "fid" in chosen:
            lines.append("(a Fréchet distance of fewer than 10,000 images is not comparable with published ones)")
        yield "\n".join(lines)


class Evaluator:
    """Scores a run's samples while it trains against the features of real images, which are computed once."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        """Computes the features of the real images, which may take minutes. Collective.

        Raises:
            StoppedError: a stop was requested; the same command resumes.
        """
        self._chosen, self._sample, pixels = plan.config.evaluate, plan.config.sample, plan.pixels()
        assert pixels is not None
        found = locate_extractor(self._chosen.extractor, plan.bucket)
        self._extract = found.load(ranks.device)
        reference = reference_of(pixels, found.extractor, self._chosen.references)
        check = partial(ranks.stop.check, "while looking at real images")
        self._real = real_features(plan, reference, self._extract, ranks, check) or {}

    def scores(self, painter: Painter) -> Row:
        """Returns the scores of the painter's network by name on the main process, and {} on the others. Collective.

        Raises:
            StoppedError: one of the processes got a stop request; it raises on all of them at once.
        """
        chosen, sample, name_of = self._chosen, self._sample, partial(score_name, extractor=self._chosen.extractor)

        def features(images: np.ndarray) -> np.ndarray:
            return features_of(self._extract, images, painter.device)["features"].numpy()

        def score() -> Row:
            values, floor, counts = scored(chosen.metrics, samples, self._real, painter.stop, "scoring")
            shown = score_words(values, floor, chosen.extractor)
            note(f"{chosen.images:,} images: {shown}; real ones are {counts[0]:,} against {counts[1]:,}")
            own = {name_of(name): value for name, value in values.items()}
            return own | {f"real {name_of(name)}": value for name, value in floor.items()}

        seeds, sampling = range(chosen.images), method.sampling_of(sample)
        kept = painter.sample_together(seeds, sampling, sample.batch_size, "sampling for scores", kept=features)
        samples: Named = {"features": torch.from_numpy(kept)}
        return painter.ranks.only_on_main(score) or {}


def validation_row(
    painter: Painter, images: ImageCache, latents: Latents | None = None, teacher: Network | None = None
) -> Row:
    """Returns the mean loss as `val_loss`, and by quarters of the draws as `val_loss_q0` and so on. Collective.

    The points are spread evenly over the draws, which lowers the variance. `val_bits_per_dim` is the variational bound
    on pixels with independent noise, to which each image adds one step.

    Args:
        painter: has the weights, such as averaged ones, and the settings of the run.
        images: the held-out images, of which it takes `log.validate_images` at most.
        latents: the distribution of latents, for a run on them.
        teacher: the network of the loss's teacher, for a run that has one.

    Raises:
        StoppedError: one of the processes got a stop request; it raises on all of them at the same batch.
    """
    config, objective = painter.config, method.objective_of(painter.config, teacher)
    count = min(config.log.validate_images, images.index.images)
    numbers = np.linspace(0, images.index.images - 1, count).astype(np.int64)
    # Images are in order of classes: without a permutation each class would get its own part of the draws.
    strata = randomness.training_uniforms(SEED, torch.arange(count)).argsort()
    spread = replace(objective, diffusion=replace(objective.diffusion, stratified=True))
    points = spread.draw(SEED, strata, count)
    steps, stands_for = (part[strata] for part in spread_over_steps(objective.process.num_timesteps, count))
    log, bits = LossLog(painter.device), LossLog(painter.device)
    is_bounded = has_bound(config) and not latents
    of_ranks = painter.shared_out(count, config.sample.batch_size)

    @torch.inference_mode()
    def losses_of(places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        x_start, noise, condition = _noised(places, images, numbers[places], painter, latents)
        drawn, predict = Drawn.of(points[:, places].to(painter.device)), painter.predict
        losses, bound = objective.losses(predict, x_start, noise, drawn, condition), None
        if is_bounded:
            at = steps[places], stands_for[places]
            bound = objective.bits_per_dim(predict, x_start, noise, *at, condition)
        return losses, bound, drawn.quartile

    # Every process checks as often as the first one, which has the most images: the others would wait for it for ever.
    for _, of_batch in zip_longest(of_ranks[0], of_ranks[painter.ranks.rank]):
        painter.check_agreed("while validating")
        for losses, bound, quartile in painter.fitting.in_parts(losses_of, np.array(of_batch or [], np.int64)):
            log.add(losses, quartile)
            if bound is not None:
                bits.add(bound, quartile)
    painter.agreement.finish()
    row = {f"val_{name}": value for name, value in loss_row(log.reduced()).items()}
    return row | ({"val_bits_per_dim": loss_row(bits.reduced())["loss"]} if is_bounded else {})


def _noised(
    numbers: np.ndarray, images: ImageCache, indices: np.ndarray, painter: Painter, latents: Latents | None
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Returns images without augmentation, and what a loss needs beside them, on the painter's device.

    Args:
        numbers: decide the noise, int64 [b], and the sample of latents.
        images: the dataset.
        indices: of the images, int64 [b].
        painter: has the settings of the run.
        latents: the distribution of latents, for a run on them.

    Returns:
        The images and the noise, float32 [b, C, H, W], and the condition, as far as the network learns it.
    """
    stored, on_host = torch.from_numpy(images.read(indices)).permute(0, 3, 1, 2), torch.from_numpy(numbers)
    stored = stored.to(painter.device)
    x_start = latents.drawn(SEED, on_host.to(painter.device), stored) if latents else in_unit_range(stored)
    offset, shape = painter.config.diffusion.offset_noise, tuple(x_start.shape[1:])
    noise = randomness.training_noise(SEED, on_host, shape, painter.device, offset)
    condition = stored_condition(images, indices, painter.config, painter.device)
    return x_start, noise, learnt(condition, x_start, SEED, on_host, painter.config.condition, noise=False)

"""`ddpm sample`, and the grids that training makes: pictures in the run's folder, or with `--count` images themselves.

RUN/samples/epoch-0080-ddim-100.png              one image per seed, from the averaged weights
            epoch-0080-ddim-50-eta-1-seeds-0-63.png  the name lists the differences from the run's settings
            comparison-30-80-490-ddim-100.png    the same seeds under several checkpoints
            denoising-epoch-0080-ddim-100.gif    from noise to image, 20 frames at most
            epoch-0080-ddim-100-inpaint-image-3-mask-half-resamplings-10.png  see `ddpm.editing`
            epoch-0080-ddim-100-0-50000-1f3a9c02/  see `sampling_plan`

The figures of the method, `ddpm figure schedule` and `ddpm figure noising`, need no network.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image

from ddpm import editing, figures, randomness
from ddpm.augment import in_unit_range
from ddpm.catalogue import Diffusion
from ddpm.image_size import ImageSize
from ddpm.model import Sampling
from ddpm.objective import Condition
from ddpm.process import VarianceExploding, VariancePreserving, make_process
from ddpm.samplers import Walk
from job.config import RunConfig
from job.coordination.pieces import IF_NONE_RUNS, Advance, Made
from job.data.codecs import encode, encode_npy
from job.data.reading.cache import ImageCache, open_cache
from job.data.shards import find_dataset, load_index
from job.exits import BadRequestError
from job.processes.ranks import meet
from job.requests import GIF_SEEDS, parse_numbers
from job.runs import records
from job.runs.layout import CheckpointRef, ObjectKind
from job.runs.run import SampleSetConfig, denoising_key, file_words, grid_key, moment_of, put_picture, title_of
from job.sampling.given import GivenImages
from job.sampling.painter import Painter, Route, prepared
from job.sampling.sampling_plan import SamplePlan, SampleSet, plan_sets, sample_kind
from job.stop import NEVER, Stop
from job.store import Store, open_store
from job.store.files import write_file

COLUMNS = 8
"""Images of a row between two seeds, or a given one with its results."""
PAIRS = 4
"""The default number of rows between seeds."""
_COLUMNS = 6
"""Columns of a figure of noised images."""
_HIDDEN = 128
"""The grey of the part that inpaint replaces."""


def run_sampling(plan: SamplePlan, stop: Stop = NEVER) -> None:
    """Samples the planned images from each chosen checkpoint, and prints their URIs. Collective.

    Raises:
        BadDataError: a checkpoint or a record is damaged; the message names the object.
        StoppedError: with `--count`, whole pieces are saved, and the same command resumes.
    """
    with prepared(plan, meet(stop)) as (plan, painter, sampling):
        editor = Editor(plan.given, painter, sampling) if plan.given else None
        if plan.count is None:
            _make_pictures(plan, painter, sampling, editor)
        for sample_set in plan_sets(plan):
            _make_set(plan, painter, sampling, sample_set, editor)


def _make_pictures(plan: SamplePlan, painter: Painter, sampling: Sampling, editor: Editor | None) -> None:
    request, sample, is_main = plan.request, plan.config.sample, painter.ranks.is_main
    usual_seeds = editor.default_seeds() if editor else range(plan.conditions.count or sample.images)
    usual_seeds = range(PAIRS) if plan.conditions.is_row else usual_seeds
    seeds = parse_numbers(request.seeds, "--seeds") if request.seeds else usual_seeds
    all_seeds = editor.all_seeds(seeds) if editor else seeds
    if plan.conditions.is_row:
        all_seeds = [seed for seed in seeds for _ in plan.conditions.rows]
    route = editor.route(seeds) if editor else None
    gif_seeds = seeds[:GIF_SEEDS] if request.seeds else range(GIF_SEEDS)
    how, usual = plan.how(request.seeds), plan.stored.sample
    layout = "" if editor or sample.nearest == usual.nearest else "-nearest" if sample.nearest else "-no-nearest"
    layout += f"-show-{'_'.join(map(str, sample.show))}" if sample.show != usual.show else ""
    training = None
    if sample.nearest and is_main and editor is None and (pixels := plan.pixels()):
        training = open_cache(plan.bucket, pixels, plan.config.data.cache_gigabytes * 1e9, painter.stop)
    grids: list[tuple[str, np.ndarray]] = []

    def publish(ref: CheckpointRef, key: str, picture: bytes, note: str = "") -> None:
        put_picture(plan.run, key, picture, ref)
        # A closed pipe, as after `head`, must not prevent the other pictures.
        with suppress(BrokenPipeError):
            print(f"{plan.run.uri_of(key)}{note}")

    for ref in plan.checkpoints:
        label = plan.label(ref.images_seen)
        painter.load(plan.run, ref, sample.weights)
        began = time.monotonic()
        if plan.conditions.is_row:
            images = _along_vectors(plan, painter, sampling, seeds, label)
        else:
            images = painter.sample_together(all_seeds, sampling, sample.batch_size, label, route)
        if is_main:
            rate = len(all_seeds) / (time.monotonic() - began)
            grids.append((moment_of(label), figures.shown(images, sample.show)))
            title = title_of(plan.run, moment_of(label), plan.words, seeds)
            if plan.conditions.is_row:
                heads = [", ".join(f"{number:.3g}" for number in row) for row in plan.conditions.rows]
                scale = max(1, 96 // max(images.shape[1:3]))
                grid = figures.png(figures.image_grid(images, len(heads), 2, scale, column_labels=heads, title=title))
            elif editor:
                grid = editor.grid(images, seeds, with_class(title, plan.sampled_classes))
            else:
                beside = painter.conditions.beside(seeds) if painter.conditions else {}
                classes, show = plan.sampled_classes, sample.show
                grid = grid_png(images, seeds, classes, training, painter.stop, title, show, beside)
            publish(ref, grid_key(label, how + layout), grid, f"  ({rate:.2f} images/s)")
        if request.gif and is_main:
            title = with_class(title_of(plan.run, moment_of(label), plan.words, gif_seeds), plan.sampled_classes)
            gif = painter.denoising_gif(gif_seeds, sampling, title)
            publish(ref, denoising_key(label, how), gif)
    if len(grids) > 1:
        key = grid_key(f"comparison-{file_words(request.checkpoints, '-')}", how)
        title = with_class(title_of(plan.run, f"{len(grids)} checkpoints", plan.words, seeds), plan.sampled_classes)
        classes = plan.sampled_classes if len(plan.sampled_classes) > 1 else ("seed",)
        picture = figures.comparison(grids, [f"{classes[seed % len(classes)]} {seed}" for seed in all_seeds], title)
        publish(max(plan.checkpoints), key, figures.png(picture))


def _along_vectors(
    plan: SamplePlan, painter: Painter, sampling: Sampling, seeds: Sequence[int], label: str
) -> np.ndarray:
    """Samples each seed with each of the vectors, uint8 [n · vectors, H, W, C] on the main process. Collective."""
    columns, usual = [], painter.given
    for number in range(len(plan.conditions.rows)):

        def given(seeds: torch.Tensor, number: int = number) -> Condition:
            # Seed k has vector k.
            return usual(seeds)._replace(vector=usual(torch.full_like(seeds, number)).vector)

        painter.given = given
        columns.append(painter.sample_together(seeds, sampling, plan.config.sample.batch_size, label))
    painter.given = usual
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def _make_set(
    plan: SamplePlan, painter: Painter, sampling: Sampling, sample_set: SampleSet, editor: Editor | None
) -> None:
    """Makes the missing pieces, first those of this slice, and the index if the set is then complete. Collective."""
    ranks, config, pieces, began = painter.ranks, sample_set.config, sample_set.pieces, time.monotonic()
    sample = plan.config.sample

    def make(number: int, advance: Advance) -> Made:
        seeds = config.seeds(number)
        route = editor.route(seeds) if editor else None
        # Batches stay within a piece: rounding depends on the other images of a batch, and bytes must not change.
        images = np.concatenate([*painter.sample_batches(seeds, sampling, sample.batch_size, advance, route)])
        if number == 0:
            moment, shown = moment_of(plan.label(sample_set.ref.images_seen)), seeds[: sample.images]
            title = title_of(plan.run, moment, plan.words, shown)
            beside = painter.conditions.beside(shown) if painter.conditions else {}
            classes, show = plan.sampled_classes, sample.show
            grid = grid_png(images[: sample.images], shown, classes, title=title, show=show, beside=beside)
            put_picture(plan.run, sample_set.key(ObjectKind.GRID), grid, sample_set.ref)
        return made_piece(sample_set, number, images)

    there_before = ranks.on_main(lambda: config.count - sum(pieces.sizes[number] for number in pieces.missing()))
    if there_before < config.count:
        painter.load(plan.run, sample_set.ref, sample.weights)
    made = pieces.make_missing(make, f"sampling {sample_set.name}", stop=painter.stop, ranks=ranks)
    rate = f" at {made / (time.monotonic() - began):.2f} images/s" if made else ""
    note = f"{made:,} made{rate}, {there_before:,} there before"

    def finish() -> None:
        if missing := pieces.missing():
            others = f"{len(missing):,} of {config.pieces:,} pieces are to come from other machines; {IF_NONE_RUNS}"
            print(f"{sample_set.folder.uri}  (slice {plan.request.slice} is done: {note}; {others})")
            return
        if sample_set.index() is None:
            sample_set.publish(painter.stop)
        print(sample_set.describe(note if made else "complete already"))

    ranks.on_main(finish)


def grid_png(
    images: np.ndarray,
    seeds: Sequence[int],
    classes: Sequence[str] = (),
    training: ImageCache | None = None,
    stop: Stop = NEVER,
    title: str = "",
    show: Sequence[int] = (),
    beside: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> bytes:
    """Returns a grid of images with the names of their classes, or each beside others: its nearest training image.

    Args:
        images: uint8 or uint16 [n, H, W, C].
        seeds: the seeds of the images.
        classes: the classes that the seeds take in turn, if the network has any.
        training: the images to search for the nearest ones; None: a grid without them.
        stop: ends the search.
        title: the title of the picture.
        show: channels; see `figures.shown`.
        beside: the condition of each image and its true image, uint8 [n, H, W, 1 or 3], by their captions.

    Raises:
        StoppedError: a stop was requested.
    """
    title, images = with_class(title, classes), figures.shown(images, show)
    if beside:
        parts = {"condition": beside.get("condition"), "sample": images, "truth": beside.get("truth")}
        there = {name: figures.shown(part, show) for name, part in parts.items() if part is not None}
        tiles = np.stack([np.broadcast_to(part, (*part.shape[:3], 3)) for part in there.values()], axis=1)
        heads, scale = [*there] * min(len(images), 9 // len(there)), max(1, 96 // max(images.shape[1:3]))
        tiles = tiles.reshape(-1, *tiles.shape[2:])
        return figures.png(figures.image_grid(tiles, len(heads), 2, scale, column_labels=heads, title=title))
    if training is not None:

        def chunks() -> Iterator[np.ndarray]:
            for first in range(0, training.index.images, 1024):
                stop.check("while the nearest training images were looked for")
                some = np.arange(first, min(first + 1024, training.index.images))
                yield figures.shown(training.read(some), show)

        indices, _ = figures.nearest_pairs(images, chunks)
        columns, above, below = _arranged(seeds, classes, 5)
        nearest = figures.shown(training.read(indices), show)
        pairs = figures.pairs_grid(images, nearest, columns, below, column_labels=above, title=title)
        return figures.png(pairs)
    columns, above, below = _arranged(seeds, classes, 10 if len(classes) > 1 else 8)
    scale = max(1, 96 // max(images.shape[1:3]))
    grid = figures.image_grid(images, columns, scale=scale, labels=below, column_labels=above, title=title)
    return figures.png(grid)


def with_class(title: str, classes: Sequence[str]) -> str:
    """Returns a title, with the class if all images have the same."""
    return f"{title} · class {classes[0]}" if len(classes) == 1 and title else title


def _arranged(
    seeds: Sequence[int], classes: Sequence[str], widest: int
) -> tuple[int, Sequence[str] | None, Sequence[str] | None]:
    """Returns columns, captions above them and captions under images: a column for each class if possible."""
    count = len(classes)
    if count < 2:
        return min(widest, len(seeds)), None, None
    names = [classes[seed % count] for seed in seeds]
    if count > widest or list(seeds) != list(range(seeds[0], seeds[0] + len(seeds))):
        return min(widest, len(seeds)), None, names
    columns = min(widest // count * count, len(seeds))
    return columns, names[:columns], None


def made_piece(sample_set: SampleSet, number: int, images: np.ndarray) -> Made:
    """Returns the files of a piece with uint8 or uint16 [n, H, W, C]."""
    config, seeds = sample_set.config, sample_set.config.seeds(number)
    files = [_sample_file(one, config) for one in images]
    if config.save == "shards":
        return Made({sample_set.key(ObjectKind.PIECE, number): _shard(config, seeds, files)})
    return Made({sample_set.key(ObjectKind.IMAGE, number, seed): file for seed, file in zip(seeds, files, strict=True)})


def _sample_file(image: np.ndarray, config: SampleSetConfig) -> bytes:
    """Returns an image [H, W, C] as a file, with the values of its dataset's source if it has 16 bits."""
    is_png, (low, high) = sample_kind(config.channels, config.levels) == "png", config.levels
    if config.bits == 16:
        dtype = np.uint16 if low >= 0 and high < 1 << 16 else np.int32
        image = np.rint(low + image * ((high - low) / 65535)).astype(dtype)
    elif is_png:
        return figures.png(Image.fromarray(image.squeeze(-1) if config.channels == 1 else image))
    return encode(image) if is_png else encode_npy(image)


def _shard(config: SampleSetConfig, seeds: range, files: list[bytes]) -> bytes:
    """Returns a tar that webdataset can read: `000003072.png` or `.npy`, and `000003072.cls` if there are classes."""
    file = io.BytesIO()
    labels, kind = config.labels or range(len(config.classes)), sample_kind(config.channels, config.levels)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for seed, content in zip(seeds, files, strict=True):
            members = {kind: content} | ({"cls": str(labels[seed % len(labels)]).encode()} if labels else {})
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{seed:09d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Editor:
    """The given images, on the device, and the routes of sampling from them.

    Seed k has image k mod n of the n given ones. Interpolation between seeds has no given images.
    """

    def __init__(self, given: GivenImages, painter: Painter, sampling: Sampling) -> None:
        self._painter, self._editing, self.evaluations = painter, given.editing, painter.evaluations_of(sampling)
        if given.images is None:
            return
        self._shown = {"given": given.images}
        self._images = torch.tensor(given.images).permute(0, 3, 1, 2).to(painter.device).float() / 127.5 - 1
        if given.unknown is None:
            edit = editing.inverted if self._editing.mode == "invert" else editing.from_image
            self._edit = partial(edit, strength=self._editing.strength)
        else:
            unknown = torch.from_numpy(given.unknown).to(painter.device)
            path = editing.resampled(sampling.steps, resamplings=self._editing.resamplings)
            self._edit = partial(editing.inpaint, unknown=unknown, path=path)
            self._shown["masked"] = np.where(given.unknown[:, :, None], np.uint8(_HIDDEN), given.images)
        image = torch.zeros(1, *painter.image_shape)
        of_image = {"image": image} | ({"unknown": image == 0} if given.unknown is not None else {})
        self.evaluations = painter.evaluations_of(sampling, partial(self._edit, **of_image))

    def default_seeds(self) -> range:
        """Returns the seeds of a picture by default."""
        if self._editing.mode == "interpolate":
            return range(2 * PAIRS)
        # Inversion does not depend on the seed without a sampler's noise, so one seed per image is enough.
        return range(len(self._images) * (1 if self._editing.mode == "invert" else COLUMNS - 1))

    def all_seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """Returns the seed of each image of a picture."""
        return [seed for seed in seeds[::2] for _ in range(COLUMNS)] if self._editing.mode == "interpolate" else seeds

    def route(self, seeds: Sequence[int]) -> Route:
        """Returns the route to the images of these seeds, of a picture or a piece."""
        return Route(self.evaluations, partial(self._walk, seeds))

    def _walk(self, seeds: Sequence[int], places: Sequence[int]) -> Walk:
        device = self._painter.device
        if self._editing.mode == "interpolate":
            others = torch.tensor([seeds[place // COLUMNS * 2 + 1] for place in places], device=device)
            weight = torch.tensor([place % COLUMNS / (COLUMNS - 1) for place in places], device=device)
            return partial(editing.interpolate, other=self._painter.noise_of(others), weight=weight)
        return partial(self._edit, image=self._images[[seeds[place] % len(self._images) for place in places]])

    def grid(self, images: np.ndarray, seeds: Sequence[int], title: str) -> bytes:
        """Returns a picture with a row per pair of seeds, or with rows per given image, which comes first.

        Between the given image and the results of `inpaint` is what the network sees of the image.
        """
        scale = max(1, 96 // max(images.shape[1:3]))
        if self._editing.mode == "interpolate":
            names = [f"{a} to {b}" for a, b in zip(seeds[::2], seeds[1::2], strict=True)]
            return figures.png(figures.image_grid(images, COLUMNS, scale=scale, row_labels=names, title=title))
        count = len(self._images)
        of_each = [images[[seed % count == number for seed in seeds]] for number in range(count)]
        made = min(COLUMNS - 1, max(map(len, of_each)))
        heads = [*self._shown, *["made"] * made]
        tiles: list[np.ndarray] = []
        for number, own in enumerate(of_each):
            for start in range(0, len(own), made):
                tiles += [*(shown[number] for shown in self._shown.values()), *own[start : start + made]]
                tiles += [np.full_like(images[0], 255)] * (-len(tiles) % len(heads))
        picture = figures.image_grid(np.stack(tiles), len(heads), 8, scale, column_labels=heads, title=title)
        return figures.png(picture)


def schedule_picture(bucket: str, run: str, schedule: str, timesteps: int | None, output: Path) -> None:
    """Writes the plot of β and ᾱ, or of σ and α of a process without β: that of a run, or the named one.

    Raises:
        BadRequestError: the schedule is another than the run's.
        MissingInputError: no such run.
    """
    diffusion, _ = _diffusion(open_store(bucket), run, schedule, timesteps)
    process, title = make_process(diffusion), f"{_words(diffusion)}, T = {diffusion.timesteps}"
    if isinstance(process, VariancePreserving):
        curves = {r"$\beta_t$": process.betas, r"$\bar\alpha_t$": process.alphas_cumprod}
    else:
        _, alpha, sigma = process.numbered(torch.arange(process.num_timesteps))
        curves = {r"$\sigma_t$": sigma, r"$\alpha_t$": alpha}
    title = f"{run} · {title}" if run else title
    write_file(output, figures.schedule_figure(curves, title, log=isinstance(process, VarianceExploding)))
    print(output)


def noising_picture(
    bucket_uri: str,
    run: str,
    dataset: str,
    size: ImageSize | None,
    *,
    schedule: str,
    timesteps: str,
    image: int | None,
    output: Path,
) -> None:
    """Writes a figure of images beside q(x_t|x_0), and two more files with the images and the noised images alone.

    With `image` the figure is that one image of the dataset at each of the timesteps, with the same noise.

    Raises:
        BadRequestError: a wrong timestep, or no such image.
        MissingInputError: no such dataset or run.
    """
    bucket = open_store(bucket_uri)
    diffusion, config = _diffusion(bucket, run, schedule)
    evenly = np.linspace(0, diffusion.timesteps - 1, 2 * _COLUMNS)[image is not None :].round().astype(int).tolist()
    steps = parse_numbers(timesteps, "--timesteps") if timesteps else evenly
    if max(steps) >= diffusion.timesteps:
        raise BadRequestError(f"--timesteps: {max(steps)} is not in 0 to {diffusion.timesteps - 1}")
    if config and not dataset:
        dataset, size = config.data.dataset, config.data.size
    if not dataset:
        raise BadRequestError("--dataset is needed: it names the images, unless --run names a run that saw some")
    index = load_index(bucket, find_dataset(bucket, dataset, size))
    if index.encoding:
        raise BadRequestError(f"--dataset {dataset} holds latents, of {index.encoding.source}: name that one")
    if image is not None and image >= index.images:
        raise BadRequestError(f"--image {image}: {index.name} has the images 0 to {index.images - 1:,}")
    numbers = np.linspace(0, index.images - 1, len(steps)).astype(np.int64) if image is None else np.array([image])
    images = figures.shown(ImageCache(bucket, index).read(numbers))
    process, x_start = make_process(diffusion), in_unit_range(torch.from_numpy(images).permute(0, 3, 1, 2))
    noise = randomness.sampling_noise(torch.arange(len(images)), 0, tuple(x_start.shape[1:]), x_start.device)
    _, alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in process.numbered(torch.tensor(steps)))
    # Scaled to the variance of the images: otherwise most pixels of EDM's noise would be black or white.
    noised = (alpha * x_start + sigma * noise) / sigma.clamp(min=1)
    is_edm = isinstance(process, VarianceExploding)
    labels = [f"sigma = {each:.2g}" for each in sigma.flatten().tolist()] if is_edm else [f"t = {t}" for t in steps]
    if image is None:
        figure = figures.noising_figure(images, noised, labels)
        beside = [output.with_name(f"{output.stem}-{part}{output.suffix}") for part in ("original", "noised")]
        pictures = {output: figure.combined, beside[0]: figure.original, beside[1]: figure.noised}
    else:
        tiles, scale = np.concatenate([images, figures.to_pixels(noised)]), max(1, 96 // max(images.shape[1:3]))
        title = f"{index.name} · image {image:,} · {_words(diffusion)}"
        pictures = {output: figures.image_grid(tiles, _COLUMNS, 4, scale, labels=["the image", *labels], title=title)}
    for path, picture in pictures.items():
        write_file(path, figures.png(picture))
        print(path)


def _diffusion(
    bucket: Store, run: str, schedule: str, timesteps: int | None = None
) -> tuple[Diffusion, RunConfig | None]:
    """Returns the settings of the process of a run, with its configuration, or those that the options name."""
    if run:
        if schedule or timesteps:
            option = "--schedule" if schedule else "--timesteps"
            raise BadRequestError(f"{option}: run {run!r} has a schedule of its own: leave {option} or --run out")
        config = records.existing_config(bucket, run)
        return config.diffusion, config
    usual = Diffusion()
    return replace(usual, schedule=schedule or usual.schedule, timesteps=timesteps or usual.timesteps), None


def _words(diffusion: Diffusion) -> str:
    return f"{diffusion.schedule} schedule" + ", zero terminal SNR" * diffusion.zero_terminal_snr

"""The page of a run: the facts of its folder, in one HTML file with all pictures and scripts, without the network.

Jinja escapes every value of a run, and the page's security policy allows only its scripts, by hash: a class with the
name `<script>` is text. `bucket_page` has the page of all runs in a bucket.
"""

from __future__ import annotations

import re
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import resources
from io import BytesIO
from math import inf, isfinite, prod, sqrt
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from job.config import CHOSEN_ELSEWHERE, FOLLOWS, RunConfig, description_of, draft, shown
from job.coordination.sealed import code_version, utc_now
from job.data.checks import preview_png
from job.data.shards import PREVIEW
from job.exits import BadDataError, JobError, State
from job.progress import note
from job.runs import metric_rows, records
from job.runs.checkpoints import by_progress, list_checkpoints, newest_sound
from job.runs.layout import ObjectKind, places_in
from job.runs.metric_rows import Row
from job.runs.outlook import AttemptSpan, Outlook, attempts_of, duration, outlook_of, spans_of, state_in
from job.runs.records import Status
from job.runs.run import RunHandle, Scores, denoising_key, grid_key, label_at, moment_of
from job.store import ObjectMissingError, Store

PAGE_KEY = ObjectKind.PAGE.value
POINTS = 1000
"""The largest number of points of a curve; longer ones are averaged in blocks."""
GRIDS = 60
"""The largest number of grids on a page; of more, evenly spaced ones are chosen."""
OWN_PICTURES = 12
"""The largest number of pictures of `ddpm sample` on a page; it has links to the others."""
GRID_BYTES, NEWEST_BYTES, DENOISING_BYTES, SHEET_BYTES = 28_000, 400_000, 600_000, 150_000
"""Size limits of the pictures, by which a page with all of them, as base64, stays below 5 MB."""
ALL_OWN_BYTES, OWN_BYTES = 600_000, 150_000
"""Those of all pictures of `ddpm sample` together, and of one."""
WIDEST_PIXELS = 1200
MOST_FILE_BYTES = 1 << 27
"""The limit of reading: a longer object counts as truncated."""
MOST_FRAMES, MOST_PIXELS = 1000, 70_000_000
"""Limits of decoding; the pixels are those of all frames together. A grid of 64 images of 1024² is within them, and a
GIF of 12 images of 512². At four bytes a pixel, or eight with transparency, no picture takes a gigabyte.
"""
SCRIPTS = ("uPlot.iife.min.js", "page.js")
_QUARTERS = {
    "1st quarter of the noise": "the timesteps with the least noise",
    "2nd": "those with more",
    "3rd": "with more still",
    "4th": "those with the most",
}
_NO_SCORES = (
    *("images_seen", "epoch", "time", "stage"),
    *("learning_rate", "ema_decay", "images_per_second", "memory_bytes"),
)
_LABEL = "LABEL"
"""A label in the patterns of `_in_order`."""


@dataclass(frozen=True)
class Facts:
    """The state of a run at one moment."""

    handle: RunHandle
    name: str
    status: Status | None
    outlook: Outlook
    attempts: list[AttemptSpan]
    rows: list[Row]
    """The merged rows of the metrics, in order."""
    grids: list[tuple[str, str]]
    """The sample grids, oldest first: the moment of the weights, such as `epoch 80`, and the key below the run."""
    newest_gif: str
    """The key of the newest denoising GIF; empty without one."""
    own_pictures: list[str]
    """The keys of the pictures that `ddpm sample` made."""
    scores: list[Scores]
    parameters: int
    """The approximate number of the network's parameters; 0 before the first checkpoint."""
    checkpoints: list[str]
    """The moments of the checkpoints."""
    state: str
    """See `job.runs.outlook.state_in`."""
    median_images_per_second: float | None
    """The median of all rows; None without rows."""

    @property
    def config(self) -> RunConfig:
        """Returns the configuration as it was last changed."""
        return self.handle.config

    @property
    def epoch_images(self) -> int | None:
        """Returns the images of an epoch; None if the dataset is missing."""
        return self.handle.index.images if self.handle.index else None

    @property
    def go_on(self) -> str:
        """Returns the command that goes on with the run; empty if it cannot be trained."""
        data = self.config.data
        if not data.dataset:
            return ""
        more = ["--epochs", str(2 * self.config.train.epochs)] if self.state == State.FINISHED else []
        about = ["--dataset", data.dataset, "--run", self.name, "--bucket", self.handle.bucket.uri]
        return shlex.join(["ddpm", "train", *about, *more])

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Returns the values that differ from the preset, by key: the preset's, and the run's."""
        config, left_out = self.config, (*CHOSEN_ELSEWHERE, *FOLLOWS)
        try:
            of_file = {
                key: value for key, value in config.flat().items() if config.model.kind == "own" and key[:6] == "model."
            }
            theirs = draft(config.preset, {"model.kind": config.model.kind, **of_file}).flat()
            theirs["model.kind"] = draft(config.preset, {}).model.kind
        except JobError:
            return {}
        pairs = {key: (theirs.get(key), ours) for key, ours in config.flat().items() if key not in left_out}
        # For `auto` the machine chooses a value.
        return {key: (preset, ours) for key, (preset, ours) in pairs.items() if preset not in (ours, "auto")}


def facts_of(handle: RunHandle, name: str, rows: Sequence[Row] | None = None, status: Status | None = None) -> Facts:
    """Collects the facts about a run.

    Args:
        handle: the run.
        name: of the run.
        rows: of the metrics; None: those of the newest checkpoint.
        status: of the run; None: the one in its folder.
    """
    run, config = handle.run, handle.config
    status = status or records.read_status(run)
    refs = list_checkpoints(run)
    if rows is None:
        manifest, rows = metric_rows.newest_rows(run)
    else:
        manifest = newest_sound(run, refs)
    places = places_in(run, ObjectKind.PICTURE.folder, ObjectKind.SCORES.folder)
    attempts = spans_of(attempts_of(run), status)
    pictures = [key for key in places if places[key].kind in (ObjectKind.PICTURE, ObjectKind.GRID)]
    how = handle.how_sampled
    grids, gifs = (_in_order(pictures, key_of(_LABEL, how)) for key_of in (grid_key, denoising_key))
    made_by_run = {key for _, key in (*grids, *gifs)}
    labels = [label_at(seen, handle.dataset_images, config.train.batch_size) for seen in by_progress(refs)]
    rows = metric_rows.merged(rows)
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    scores = []
    for key, place in places.items():
        if place.kind is ObjectKind.SCORES:
            try:
                scores.append(Scores.load(run, key))
            except (BadDataError, ObjectMissingError) as error:
                note(f"the page is without {error}")
    return Facts(
        handle=handle,
        name=name,
        status=status,
        outlook=outlook_of(attempts, status),
        attempts=attempts,
        rows=rows,
        grids=grids,
        newest_gif=gifs[-1][1] if gifs else "",
        own_pictures=sorted(set(pictures) - made_by_run, key=_newest_first),
        scores=sorted(scores, key=lambda each: (each.ref.images_seen, each.name)),
        # A parameter has four bytes; the headers of the files are small.
        parameters=manifest.bytes_of("model") // 4 if manifest else 0,
        checkpoints=[moment_of(label) for label in labels],
        state=state_in(run, status),
        median_images_per_second=median(speeds) if speeds else None,
    )


def _in_order(keys: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """Returns the moments and keys that match `pattern`, in which `_LABEL` is any label; the oldest first."""
    matches = (re.fullmatch(re.escape(pattern).replace(_LABEL, r"((epoch|images)-(\d+))"), key) for key in keys)
    found = sorted((match[2], int(match[3]), match[1], match[0]) for match in matches if match)
    return [(moment_of(label), key) for _, _, label, key in found]


def _newest_first(key: str) -> tuple[float, str]:
    """Returns the order of a picture's key: first those of several checkpoints, then from the newest checkpoint on."""
    match = re.search(r"(?:epoch|images)-(\d{1,12})", key)
    return -int(match[1]) if match else -inf, key


def run_page(facts: Facts, pictures: PictureCache) -> bytes:
    """Returns the page."""
    run, config = facts.handle.run, facts.config
    chosen = [facts.grids[i] for i in evenly(len(facts.grids), GRIDS)]
    grids = [
        {"moment": moment, "src": src}
        for moment, key in chosen
        if (src := pictures.get(run, key, NEWEST_BYTES if key == chosen[-1][1] else GRID_BYTES))
    ]
    newest = facts.own_pictures[:OWN_PICTURES]
    own_bytes = min(OWN_BYTES, ALL_OWN_BYTES // max(1, len(newest)))
    own = {key: src for key in newest if (src := pictures.get(run, key, own_bytes))}
    settings = {key: (value, description_of(key)) for key, value in config.flat().items()}
    return rendered(
        "run.html",
        {
            "charts": charts_of(facts),
            "grids": grids,
            "unit": "epoch" if facts.epoch_images else "images seen",
            "running": facts.state == State.RUNNING,
        },
        facts=facts,
        grids=grids,
        left_out=len(facts.grids) - len(chosen),
        own=own,
        others=[key for key in facts.own_pictures if key not in own],
        denoising=pictures.get(run, facts.newest_gif, DENOISING_BYTES) if facts.newest_gif else "",
        sheet=_sheet(facts, pictures),
        missing=pictures.missing,
        settings=settings,
        duration=duration,
        python=f'import job\n\nmodel = job.load("{run.uri}")\nimages = model.sample(16, seed=0)',
    )


def rendered(template: str, data: dict[str, Any], **values: Any) -> bytes:
    """Renders a template, with `data` for its scripts."""
    scripts = [_asset(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts)
    values |= {"styles": [_asset("uPlot.min.css"), _asset("page.css")], "written": utc_now()}
    values |= {"data": data, "scripts": scripts, "hashes": hashes, "code_version": code_version()}
    return str(_templates().get_template(template).render(values)).encode()


@cache
def _templates() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["shown"] = shown
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


@cache
def _asset(name: str) -> str:
    return (resources.files("job.report") / "assets" / name).read_text(encoding="utf-8")


def _sheet(facts: Facts, pictures: PictureCache) -> str:
    """Returns the preview of the dataset; empty without a dataset, or if it cannot be read."""
    index, bucket = facts.handle.index, facts.handle.bucket
    if index is None:
        return ""

    def sheet() -> bytes:
        pixels = facts.handle.pixels()
        assert pixels is not None
        with suppress(ObjectMissingError):
            return bucket.read(f"{pixels.key}/{PREVIEW}").data
        return preview_png(bucket, pixels)

    where = bucket.uri_of(index.key)
    return pictures.made((where, SHEET_BYTES, WIDEST_PIXELS), sheet)


def charts_of(facts: Facts) -> list[dict[str, Any]]:
    """Returns the charts over epochs; without the dataset, over images seen."""
    charts = list[dict[str, Any]]()

    def chart(
        name: str, title: str, of: Sequence[tuple[str, str, str, str]], divisor: float = 1.0, **more: Any
    ) -> None:
        """Adds a chart with the curves of which a row has a value.

        A curve is (key in the rows, label, colour in page.css, explanation).
        """
        rows = [row for row in facts.rows if any(row.get(key) is not None for key, *_ in of)]
        if not rows:
            return
        x, *values = columns(rows, [key for key, *_ in of], facts.epoch_images or 1, divisor)
        series: list[dict[str, Any]] = [
            {"label": label, "color": color, "about": about, "values": column, "more": key.startswith("loss_q")}
            for (key, label, color, about), column in zip(of, values, strict=True)
            if any(value is not None for value in column)
        ]
        known = [value for value in series[0]["values"] if value is not None]
        summary = f"{series[0]['label']}: {known[0]:.4g} at first, {known[-1]:.4g} now"
        charts.append({"name": name, "title": title, "x": x, "series": series, "summary": summary, **more})

    losses = [("loss", "loss", "loss", "error of the network's predictions, smoothed")]
    losses += [("val_loss", "held out", "held-out", "the same for images that training does not see")]
    losses += [(f"loss_q{i}", label, f"q{i}", about) for i, (label, about) in enumerate(_QUARTERS.items())]
    chart("loss", "Loss", losses, log=True, more="By quarter of the noise", smooth=True)
    for name in dict.fromkeys(key for row in facts.rows for key in row):
        if name in _NO_SCORES or "loss" in name or "_std" in name or name.startswith("real "):
            continue
        title = "Bits per dimension, held out" if name == "val_bits_per_dim" else f"Score {name}"
        real = (f"real {name}", "real images", "q3", "the score of real images, the best to expect")
        chart(f"score-{name}", title, [(name, name, "loss", "that of drawn images"), real])
    chart("speed", "Images per second", [("images_per_second", "images/s", "loss", "")])
    if facts.median_images_per_second is not None:
        charts[-1]["summary"] += f"; median {facts.median_images_per_second:.4g}"
    chart("stage", "Stage", [("stage", "of the two points", "loss", "")], log=False)
    chart("rate", "Learning rate", [("learning_rate", "learning rate", "loss", "")], log=False)
    chart("memory", "Memory (GB)", [("memory_bytes", "of the main process", "loss", "")], divisor=1e9)
    return charts


def columns(
    rows: Sequence[Row], keys: Sequence[str], unit: int, divisor: float = 1.0, points: int = POINTS
) -> list[list[float | None]]:
    """Averages rows in blocks, one for each point; returns the positions along x in units, and each key's means."""
    table = np.array([[row.get(key) for key in ("images_seen", *keys)] for row in rows], dtype=np.float64)
    known = ~np.isnan(table)
    starts = [block[0] for block in np.array_split(np.arange(len(rows)), min(points, len(rows)))]
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(known, table, 0), starts) / np.add.reduceat(known, starts, dtype=int)
    x, *values = means.T.tolist()
    x = [_digits(value / unit, 7) for value in x]
    return [x, *([_digits(value / divisor) for value in column] for column in values)]


def _digits(value: float, digits: int = 5) -> float | None:
    """Rounds a number, to keep pages small; None for NaN and infinite ones."""
    return float(f"{value:.{digits}g}") if isfinite(value) else None


class PictureCache:
    """A cache of pictures as data URIs, each read and shrunk once: pictures keep their names while a run trains.

    Attributes:
        missing: the reasons why pictures are missing, by URI.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Makes an empty cache; `say` receives messages about pictures that cannot be read."""
        self._say, self._made = say, dict[tuple[str, int, int], str]()
        self.missing = dict[str, str]()

    def get(self, store: Store, key: str, most_bytes: int, widest_pixels: int = WIDEST_PIXELS) -> str:
        """Returns the picture in an object; empty if it is missing or cannot be read."""

        def data() -> bytes:
            with store.open(key) as file:
                return file.read(MOST_FILE_BYTES)

        return self.made((store.uri_of(key), most_bytes, widest_pixels), data)

    def made(self, name: tuple[str, int, int], data: Callable[[], bytes]) -> str:
        """Returns the picture of a name (its source, and the limits of bytes and width); calls `data` if it is new."""
        if name not in self._made:
            try:
                self._made[name] = _shrunk(data(), *name[1:])
            # For broken files decoders raise anything from SyntaxError to ZeroDivisionError: the page is without them.
            except Exception as error:
                # Pillow's message ends with the address of a Python object.
                why = " ".join(str(error).partition(" <_io")[0].split()) or type(error).__name__
                self._made[name], self.missing[name[0]] = "", why
                self._say(f"the page is without {name[0]}: {why}")
        return self._made[name]


def _shrunk(data: bytes, most_bytes: int, widest_pixels: int) -> str:
    """Returns a PNG, or the animation of a GIF, as the data URI of a WebP of at most about `most_bytes`.

    Raises:
        BadDataError: it is larger than the limits. For damaged ones see Pillow's decoders.
    """
    frames, milliseconds = _frames(data, widest_pixels)
    more = {"save_all": True, "duration": milliseconds, "loop": 0} if len(frames) > 1 else {}
    width = frames[0].width
    while True:
        file = BytesIO()
        frames[0].save(file, "WEBP", quality=75, method=2, append_images=frames[1:], **more)
        over = file.tell() / most_bytes
        if over <= 1 or width == 1:
            return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"
        # Bytes grow with pixels. A lower quality instead would be visible.
        width = int(0.95 * width / sqrt(over)) or 1
        frames = [_resized(frame, width) for frame in frames]


def _frames(data: bytes, widest_pixels: int) -> tuple[list[Image.Image], int]:
    """Returns the frames, at most so wide, and the milliseconds of each; decodes only what the headers allow."""
    # Runs have no other formats, and some decoders allocate memory before they know the size.
    with Image.open(BytesIO(data), formats=("PNG", "GIF")) as picture:
        count, frames, width = getattr(picture, "n_frames", 1), list[Image.Image](), min(widest_pixels, picture.width)
        for frame in ImageSequence.Iterator(picture):
            # Frames of a GIF may be larger than the first.
            if count > MOST_FRAMES or count * prod(frame.size) > MOST_PIXELS:
                size = " × ".join(f"{number:,}" for number in (count, *frame.size))
                raise BadDataError(f"it has {size} pixels; {MOST_PIXELS:,} in {MOST_FRAMES:,} frames are the most")
            frames.append(_resized(frame if frame.mode == "RGB" else frame.convert("RGB"), width))
        return frames, picture.info.get("duration", 200)


def _resized(frame: Image.Image, width: int) -> Image.Image:
    return frame.resize((width, max(1, round(frame.height * width / frame.width))), Image.Resampling.HAMMING)


def evenly(count: int, most: int) -> list[int]:
    """Returns at most `most` indices, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()

"""`ddpm export`: writes a checkpoint as a folder for diffusers and the hub."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from job.exits import BadRequestError, MissingInputError
from job.plan import RunHandle, open_run
from job.progress import Progress, note
from job.runs import pipeline
from job.runs.checkpoints import choose, opened
from job.runs.drawings import grid_key, label_of
from job.runs.layout import CheckpointRef
from job.runs.readers import reading_chosen
from job.sampling.sampling_plan import check_average
from job.sealed import code_version
from job.stop import Stop
from job.store import ObjectExistsError, ObjectMissingError, Store, open_store

CARD, PICTURE = "README.md", "grid.png"
MOST_NAMES = 20
"""Classes that the card names."""
_PIPELINE = """```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained("this folder")
images = pipeline(4, num_inference_steps={steps}{call}).images
```

{remark}"""
_LOOP = """```python
import torch
from diffusers import {kind}, UNet2DModel

unet = UNet2DModel.from_pretrained("this folder", subfolder="unet")
scheduler = {kind}.from_pretrained("this folder", subfolder="scheduler")
scheduler.set_timesteps({steps})
labels = torch.arange(4)
x = torch.randn(4, {channels}, {size}, {size})
for t in scheduler.timesteps:
    with torch.no_grad():
        output = unet(x, t, class_labels=labels).sample
    x = scheduler.step(output, t, x{call}).prev_sample
```

`id2label.json` has the names of the classes: {classes}."""
_REMARK = {
    "DDIMScheduler": "This call gives the images of the run's sampler `ddim`. The default call of diffusers clips the "
    "estimated image, but keeps the noise of the estimate before clipping.",
    "DDPMScheduler": "The network also gives the variance of a step, which `DDPMPipeline` uses.",
}


def export_run(bucket_uri: str, name: str, to: str, checkpoint: str = "latest", weights: str = "") -> None:
    """Writes a checkpoint of a run as a folder of diffusers, and prints its URI.

    Args:
        bucket_uri: the bucket of the run.
        name: the run.
        to: a new or empty folder; a path or a URI.
        checkpoint: an epoch, or `latest`.
        weights: `ema`, `ema-STD` or `model`; empty: the run's `sample.weights`.

    Raises:
        MissingInputError: no such run, checkpoint or weights.
        BadRequestError: diffusers lacks the network, or the folder `to` has other files.
        BadDataError: the checkpoint is damaged.
    """
    stop = Stop().install()
    of_run = open_run(bucket_uri, name, stop)
    described = pipeline.described(of_run.config, of_run.classes)
    if not described.objects:
        raise BadRequestError(f"run {name!r} cannot be exported to diffusers: {described.lacking}")
    if not re.fullmatch("[0-9]{1,9}", checkpoint) and checkpoint != "latest":
        raise BadRequestError(f"--checkpoint {checkpoint!r}: use an epoch such as 80, or latest")
    find = partial(choose, of_run.run, checkpoint, of_run.dataset_images, of_run.config.train.batch_size)
    target = open_store(to, of_run.bucket.retry)
    config = of_run.config.updated({"sample.weights": weights}) if weights else of_run.config
    weights = config.sample.weights
    written: list[str] = []
    try:
        with ExitStack() as stack:
            (ref,), _ = stack.enter_context(reading_chosen(of_run.run, find))
            check_average(of_run.run, ref, weights, name)
            restored = stack.enter_context(opened(of_run.run, ref, (weights,)))
            paths = restored.files[weights]
            files = dict(zip(pipeline.weights_names(len(paths)), paths, strict=True))
            label = label_of(ref.images_seen, of_run.dataset_images, of_run.config.train.batch_size)
            small = _small_objects(of_run, ref, label, weights, described=described, files=files)
            _check_free(target, to, {*files, *small})
            total = sum(path.stat().st_size for path in paths)
            with Progress(f"exporting {name}", unit="MB", total=total // 10**6) as bar:
                for key, path in files.items():
                    stop.check("while exporting", "its files are deleted, and the same command begins again")
                    target.upload(path, key)
                    written.append(key)
                    bar.update(sum(files[done].stat().st_size for done in written) // 10**6)
                for key, data in small.items():
                    target.create(key, data)
                    written.append(key)
    except ObjectExistsError as error:
        raise BadRequestError(f"{error}: name another folder, or an empty one") from None
    except BaseException:
        for key in written:
            target.delete(key)
        raise
    print(f"{target.uri}  ({label}, weights {weights}, {total:,} bytes)")
    if described.lacking:
        note(f"without model_index.json: {described.lacking}; see {CARD}")


def _small_objects(
    of_run: RunHandle,
    ref: CheckpointRef,
    label: str,
    weights: str,
    *,
    described: pipeline.Described,
    files: dict[str, Path],
) -> dict[str, bytes]:
    """Returns all other objects of an export; model_index.json, which makes it a pipeline, comes last."""
    small = dict(described.objects)
    last = {key: small.pop(key) for key in ("model_index.json",) if key in small}
    if len(files) > 1:
        small[pipeline.INDEX] = _index(files)
    with suppress(ObjectMissingError):
        small[PICTURE] = of_run.run.read(grid_key(label, of_run.config.sample.name(of_run.first_drawing))).data
    small[CARD] = _card(of_run, ref, weights, small | last, described.lacking).encode()
    return small | last


def _check_free(target: Store, to: str, own: set[str]) -> None:
    """Raises `BadRequestError` if the folder holds other objects than those of a killed export."""
    # A local folder that does not exist cannot be listed.
    with suppress(MissingInputError):
        if strangers := [entry.key for entry in target.list() if entry.key not in own]:
            raise BadRequestError(f"--to {to}: {strangers[0]} is there already; name another folder, or an empty one")


def _index(files: dict[str, Path]) -> bytes:
    """Returns the index that names the file of each tensor."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name.rpartition("/")[2])
    return pipeline.weights_index(sum(path.stat().st_size for path in files.values()), places)


def _card(of_run: RunHandle, ref: CheckpointRef, weights: str, objects: dict[str, bytes], lacking: str) -> str:
    """Returns the model card of the folder, which the hub shows."""
    config, index = of_run.config, of_run.index
    said = json.loads(objects.get(pipeline.SCHEDULER_CONFIG, b"{}"))
    kind, steps = said.get("_class_name", ""), config.sample.steps
    call = ", use_clipped_model_output=True" if kind == "DDIMScheduler" else ""
    channels, size, _ = config.image_shape
    if "model_index.json" in objects:
        how = _PIPELINE.format(kind=kind.replace("Scheduler", "Pipeline"), steps=steps, call=call, remark=_REMARK[kind])
    elif config.model.num_classes and kind:
        names = ", ".join(of_run.classes[:MOST_NAMES]) + (", …" if len(of_run.classes) > MOST_NAMES else "")
        how = _LOOP.format(kind=kind, steps=steps, call=call, channels=channels, size=size, classes=names)
    else:
        how = f'`UNet2DModel.from_pretrained(..., subfolder="unet")` loads the network; {lacking}.'
    licence = index.licence if index else ""
    kind_of = "class-conditional" if config.model.num_classes else "unconditional-image-generation"
    of_images = f"{index.images:,} images of {index.name}" if index else "unknown images"
    licences = ["license: other", f"license_name: {json.dumps(licence)}"] if licence else []
    return "\n".join(
        [
            *("---", "library_name: diffusers", f"tags: [{kind_of}, ddpm]", *licences, "---", ""),
            f"# {of_run.run.uri.rpartition('/')[2]}",
            "",
            f"A U-Net of {size}×{size} pixels, trained on {of_images}: {ref.images_seen:,} images seen, "
            f"weights `{weights}`, code {code_version()}.",
            f"Licence of the images: {licence or 'not stated'}.",
            "",
            how,
            "",
            *([f"![Samples]({PICTURE})", ""] if PICTURE in objects else []),
        ]
    )

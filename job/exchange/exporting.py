"""`ddpm export`: a checkpoint as a folder that diffusers, and the hub, take as it is."""

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

The classes, from 0: {classes}."""
_REMARK = {
    "DDIMScheduler": "With this call diffusers draws what the run itself does with its sampler `ddim`; by default it "
    "clips the estimated image and keeps the noise of the estimate before.",
    "DDPMScheduler": "The network gives the variance of a step as well, which `DDPMPipeline` takes.",
}
_SCHEDULER = "scheduler/scheduler_config.json"


def export_run(bucket_uri: str, name: str, to: str, checkpoint: str = "latest", weights: str = "") -> None:
    """Writes a checkpoint of a run as a folder of diffusers, and says where it lies.

    Args:
        bucket_uri: where the run lies.
        name: of the run.
        to: an empty folder, or one that is not there; a path or a URI.
        checkpoint: an epoch, or `latest`.
        weights: which; none: those that the run draws with.

    Raises:
        MissingInputError: no such run, checkpoint or weights.
        BadRequestError: diffusers has no such network, or there is something at `to`.
        BadDataError: the checkpoint is damaged.
    """
    stop = Stop().install()
    of_run = open_run(bucket_uri, name, stop)
    described = pipeline.described(of_run.config)
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
            names = pipeline.weights_names(len(paths))
            small = dict(described.objects)
            if len(paths) > 1:
                small[pipeline.INDEX] = _index(paths, names)
            label = label_of(ref.images_seen, of_run.dataset_images, of_run.config.train.batch_size)
            with suppress(ObjectMissingError):
                small[PICTURE] = of_run.run.read(grid_key(label, of_run.config.sample.name(of_run.own))).data
            small[CARD] = _card(of_run, ref, weights, small, described.lacking).encode()
            # Last what says that the folder is a pipeline.
            small = dict(sorted(small.items(), key=lambda each: each[0] == "model_index.json"))
            total = sum(path.stat().st_size for path in paths)
            _check_free(target, to, {*names, *small})
            with Progress(f"exporting {name}", unit="MB", total=total // 10**6) as bar:
                for path, key in zip(paths, names, strict=True):
                    stop.check("while exporting", "what was written is deleted, and the same command begins again")
                    target.upload(path, key)
                    written.append(key)
                    bar.update(sum(path.stat().st_size for path in paths[: len(written)]) // 10**6)
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


def _check_free(target: Store, to: str, own: set[str]) -> None:
    """Raises `BadRequestError` if the folder holds other objects than an export that was killed has left."""
    # A local folder that does not exist cannot be listed.
    with suppress(MissingInputError):
        if strangers := [entry.key for entry in target.list() if entry.key not in own]:
            raise BadRequestError(f"--to {to}: {strangers[0]} is there already; name another folder, or an empty one")


def _index(paths: list[Path], names: list[str]) -> bytes:
    """Says in which file each tensor lies."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name.rpartition("/")[2])
    return pipeline.weights_index(sum(path.stat().st_size for path in paths), places)


def _card(of_run: RunHandle, ref: CheckpointRef, weights: str, objects: dict[str, bytes], lacking: str) -> str:
    """What a person should know of the folder, as the hub shows it."""
    config, index = of_run.config, of_run.index
    said = json.loads(objects.get(_SCHEDULER, b"{}"))
    kind, steps = said.get("_class_name", ""), config.sample.steps
    call = ", use_clipped_model_output=True" if kind == "DDIMScheduler" else ""
    channels, size, _ = config.image_shape
    if "model_index.json" in objects:
        how = _PIPELINE.format(kind=kind.replace("Scheduler", "Pipeline"), steps=steps, call=call, remark=_REMARK[kind])
    elif config.model.num_classes and kind:
        names = ", ".join(of_run.classes)
        how = _LOOP.format(kind=kind, steps=steps, call=call, channels=channels, size=size, classes=names)
    else:
        how = f'`UNet2DModel.from_pretrained(..., subfolder="unet")` loads the network; {lacking}.'
    licence = index.licence if index else ""
    kind_of = "class-conditional" if config.model.num_classes else "unconditional-image-generation"
    of_images = f"{index.images:,} images of {index.name}" if index else "images that are not known"
    licences = ["license: other", f"license_name: {json.dumps(licence)}"] if licence else []
    return "\n".join(
        [
            *("---", "library_name: diffusers", f"tags: [{kind_of}, ddpm]", *licences, "---", ""),
            f"# {of_run.run.uri.rpartition('/')[2]}",
            "",
            f"A U-Net of {size}×{size} pixels, learnt from {of_images}: {ref.images_seen:,} images seen, "
            f"weights `{weights}`, code {code_version()}.",
            f"Licence of the images: {licence or 'nothing is said of it'}.",
            "",
            how,
            "",
            *([f"![Images that it draws]({PICTURE})", ""] if PICTURE in objects else []),
        ]
    )

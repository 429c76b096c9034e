"""The model card of an export: its origin, the licence of its images, its scores and sample code, for people."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass

from job.exits import BadDataError
from job.plan import RunHandle
from job.runs import pipeline
from job.runs.drawings import Scores, score_name
from job.runs.layout import CheckpointRef, ObjectKind, places_in
from job.sealed import code_version
from job.store import ObjectMissingError

CARD, PICTURE = "README.md", "grid.png"
MOST_NAMES = 20
"""The most classes that a card names."""
_PIPELINE = """```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained("{place}")
images = pipeline(4, num_inference_steps={steps}{call}).images
```

{remark}"""
_CLASSES = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)
images = pipeline(class_labels={labels}, num_inference_steps={steps}).images
```

`trust_remote_code` lets diffusers execute `{code}`. `id2label.json` has the names of the classes: {names}."""
_REMARK = {
    "DDIMScheduler": "This call gives the images of the run's sampler `ddim`. The default call of diffusers clips the "
    "estimated image, but keeps the noise of the estimate before clipping.",
    "FlowMatchEulerDiscreteScheduler": "The loop of `DDPMPipeline` takes any scheduler: this one goes Euler's steps "
    "along a rectified flow, without clipping.",
    "DDPMScheduler": "The network also gives the variance of a step, which `DDPMPipeline` uses.",
}


@dataclass(frozen=True)
class Card:
    """The facts of a model card.

    Attributes:
        of_run: the run.
        ref: the checkpoint.
        weights: the exported weights, such as `ema`.
        place: the name by which diffusers finds the export: a folder, or a repository of the hub.
        lacking: the reason why diffusers has no pipeline for it; empty if it has one.
    """

    of_run: RunHandle
    ref: CheckpointRef
    weights: str
    place: str
    lacking: str

    def text(self, objects: dict[str, bytes]) -> str:
        """Returns the text, with the metadata that the hub reads; `objects` are the others of the export."""
        config, index = self.of_run.config, self.of_run.index
        licence = index.licence if index else ""
        kind = "class-conditional" if config.model.num_classes else "unconditional-image-generation"
        # The hub takes no free text as the name of a licence.
        licence_id = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")[:64]
        size = config.image_size.words
        of_images = f"{index.images:,} images of {index.name}" if index else "unknown images"
        preset = f" with the preset `{config.preset}`" if config.preset else ""
        return "\n".join(
            [
                *("---", "library_name: diffusers", f"tags: [{kind}, ddpm]"),
                *(["license: other", f"license_name: {json.dumps(licence_id)}"] if licence_id else []),
                *("---", "", f"# {self.of_run.run.uri.rpartition('/')[2]}", ""),
                f"A U-Net of {size} pixels, trained on {of_images}{preset}: {self.ref.images_seen:,} images "
                f"seen, weights `{self.weights}`, code {code_version()}. `{pipeline.RUN_CONFIG}` has all settings.",
                *([f"It began with the weights of {config.parent.words}."] if config.parent.run else []),
                *("", f"Licence of the images: {licence or 'not stated'}.", ""),
                *(line for scores in self._scores() for line in (_words_of(scores), "")),
                *(self._code(objects), ""),
                *([f"![Samples]({PICTURE})", ""] if PICTURE in objects else []),
            ]
        )

    def _code(self, objects: dict[str, bytes]) -> str:
        """Returns the sample code."""
        config, classes = self.of_run.config, self.of_run.classes
        kind = json.loads(objects.get(pipeline.SCHEDULER_CONFIG, b"{}")).get("_class_name", "")
        given = {"place": self.place, "steps": config.sample.steps}
        if "model_index.json" not in objects:
            return f'`UNet2DModel.from_pretrained("{self.place}", subfolder="unet")` loads the network; {self.lacking}.'
        if pipeline.PIPELINE_CODE in objects:
            names = ", ".join(classes[:MOST_NAMES]) + (", …" if len(classes) > MOST_NAMES else "")
            labels = [number % len(classes) for number in range(4)]
            return _CLASSES.format(labels=labels, code=pipeline.PIPELINE_CODE, names=names, **given)
        call = ", use_clipped_model_output=True" if kind == "DDIMScheduler" else ""
        pipeline_class = json.loads(objects["model_index.json"])["_class_name"]
        return _PIPELINE.format(kind=pipeline_class, call=call, remark=_REMARK[kind], **given)

    def _scores(self) -> list[Scores]:
        """Returns the stored scores of the exported weights; a damaged record must not stop an export."""
        run, found = self.of_run.run, []
        for key, place in places_in(run, ObjectKind.SCORES.folder).items():
            with suppress(BadDataError, ObjectMissingError):
                if place.kind is ObjectKind.SCORES and (scores := Scores.load(run, key)).ref == self.ref:
                    found.append(scores)
        return [scores for scores in found if scores.drawing.weights == self.weights]


def _words_of(scores: Scores) -> str:
    """Returns the scores as a sentence: `FID 23.4 (real images 5.1): 5,000 images, …`."""
    words = []
    for name, value in scores.values.items():
        if not name.endswith("_std"):
            real = f" (real images {scores.floor[name]:.4g})" if name in scores.floor else ""
            words.append(f"{score_name(name, scores.reference.extractor)} {value:.4g}{real}")
    drawing = scores.drawing
    how = f"{drawing.count:,} images by {drawing.sampler} in {drawing.steps:,} steps, against {scores.reference}"
    return f"Scores of {how}: {', '.join(words)}."

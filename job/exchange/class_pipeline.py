"""The pipeline of networks with classes, which diffusers lacks. An export has this file as `pipeline.py`.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` finds it there; `model_index.json` names its class.
"""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples pixels of given classes: DDPM, DDIM (η = 0) or a rectified flow, as the scheduler is."""

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Returns an image of each class.

        Args:
            class_labels: numbers of classes, which `id2label.json` names.
            num_inference_steps: steps of the scheduler.
            generator: of the noise of all images, or one for each image.
            output_type: `pil`, or `pt` for float [B, C, H, W] in [0, 1].
        """
        size, labels = self.unet.config.sample_size, torch.tensor(class_labels, device=self.device)
        shape = (len(labels), self.unet.config.in_channels, *([size, size] if isinstance(size, int) else size))
        x = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        # DDIM's default keeps the noise of the estimate before clipping, which no longer adds up to x.
        options = {"use_clipped_model_output": True} if isinstance(self.scheduler, DDIMScheduler) else {}
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.unet(x, t, class_labels=labels).sample
            x = self.scheduler.step(output, t, x, generator=generator, **options).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            images = self.numpy_to_pil(images.cpu().float().permute(0, 2, 3, 1).numpy())
        return ImagePipelineOutput(images=images)

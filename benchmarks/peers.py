"""The peers, each used as its manual says: diffusers to train and sample, and three loaders of images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddpm import catalogue
from job.config import RunConfig
from job.platform import usable_cores

IMAGES = 1024
"""The images that the training loop of diffusers finds in memory."""
BATCH_SIZE_IMAGES = 128
WORKERS = usable_cores()
"""Processes or threads of each loader: one for each core, as ours has decoders; two cores were no faster with more."""
CHUNK_BYTES = "16MB"
"""Size of litData's chunks, and of our shards beside them."""


def diffusers_twin(network: nn.Module, config: RunConfig) -> Any:
    """Returns the same network as a diffusers `UNet2DModel` at its defaults: fp32, contiguous, equal weights."""
    from diffusers import UNet2DModel

    model = config.model
    assert isinstance(model, catalogue.UNetConfig)
    size = min(config.image_shape[1:])
    sizes = [size // 2**level for level in range(len(model.channel_mults))]
    attention = ["Attn" if size in model.attention_sizes else "" for size in sizes]
    twin: Any = UNet2DModel(
        sample_size=size,
        block_out_channels=tuple(model.channels * mult for mult in model.channel_mults),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
        layers_per_block=model.layers_per_level,
        norm_num_groups=model.norm_groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=model.dropout,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    twin.load_state_dict(network.state_dict())
    return twin


def compiled(model: nn.Module) -> None:
    """Compiles a network in place on a machine with a GPU; on a CPU that takes minutes."""
    if torch.cuda.is_available():
        model.compile()


class DiffusersLoop:
    """Runs the step of diffusers' example of unconditional training, with EMA.

    By default as the example does: Accelerate in fp32, AdamW, cosine schedule, clipping at 1, `EMAModel`. At its best
    with `--mixed_precision bf16`, channels_last and `torch.compile`. Its images are ready in memory, so the comparison
    leaves its reading of images out.
    """

    def __init__(self, config: RunConfig, network: Any, best: bool = False) -> None:
        from accelerate import Accelerator
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        from benchmarks.subject import forget_accelerator

        forget_accelerator()
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if best else "no")
        model = diffusers_twin(network, config)
        if best:
            model.to(memory_format=torch.channels_last)
        how = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        self._ema = EMAModel(model.parameters(), 0.9999, model_cls=type(model), model_config=model.config, **how)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self._noise_scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        images = torch.rand(max(IMAGES, config.train.batch_size), *config.image_shape) * 2 - 1
        loader = DataLoader(TensorDataset(images), batch_size=config.train.batch_size, shuffle=True, drop_last=True)
        rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self._model, self._optimizer, self._loader, self._rates = self._accelerator.prepare(
            model, optimizer, loader, rates
        )
        if best:
            compiled(self._model)
        self._ema.to(self._accelerator.device)
        self._batches = self._endless()

    def _endless(self) -> Iterator[Tensor]:
        while True:
            for (images,) in self._loader:
                yield images

    def step(self) -> None:
        """Runs one whole step, and reads the loss as the example does for its progress bar."""
        self._model.train()
        clean = next(self._batches)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = self._noise_scheduler.add_noise(clean, noise, timesteps)
        with self._accelerator.accumulate(self._model):
            loss = F.mse_loss(self._model(noisy, timesteps).sample.float(), noise.float())
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._rates.step()
            self._optimizer.zero_grad()
        self._ema.step(self._model.parameters())
        loss.detach().item()


def diffusers_sampler(
    twin: Any, steps: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """Returns a function that draws a batch with diffusers' DDIM pipeline, on a CPU under autocast for another type."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline: Any = DDIMPipeline(twin.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")

    return draw


def installed(*peers: str) -> list[str]:
    """Returns those of the loaders that are installed: litData comes with the extra `bench`."""
    modules = {"webdataset": "webdataset", "ImageFolder": "torchvision", "litData": "litdata"}
    return [peer for peer in peers if peer in modules and find_spec(modules[peer])]


def webdataset_epoch(urls: list[str]) -> Any:
    """Reads our shards with webdataset, shuffled within 1,000 images and decoded with PIL; s3:// through boto3."""
    import webdataset
    from torchvision.transforms import PILToTensor

    # Its own way to S3 is the command line of AWS. The package has a function of the module's name.
    sys.modules["webdataset.gopen"].gopen_schemes["s3"] = _open_s3
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(1000).decode("pil")
    dataset = samples.to_tuple("png").map_tuple(PILToTensor())
    return DataLoader(dataset, BATCH_SIZE_IMAGES, num_workers=WORKERS)


def _open_s3(url: str, *_: object, **__: object) -> Any:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


def image_folder_epoch(folder: Path) -> Iterable[object]:
    """Reads the files before packing with torchvision: shuffled, decoded with PIL."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    dataset = ImageFolder(str(folder), transform=PILToTensor())
    return DataLoader(dataset, BATCH_SIZE_IMAGES, shuffle=True, num_workers=WORKERS)


def litdata_optimize(files: Path, chunks: Path) -> None:
    """Writes the files below a folder as litData's chunks, which keep the PNG, in a process of its own.

    It prints a lot, and changes how all later processes start.
    """
    words = [sys.executable, "-m", "benchmarks.peers", str(files), str(chunks)]
    subprocess.run(words, capture_output=True, check=True, cwd=Path(__file__).parents[1])


def _file(path: str) -> dict[str, bytes]:
    return {"image": Path(path).read_bytes()}


def litdata_epoch(chunks: str, cache: Path) -> Iterator[object]:
    """Reads such chunks with litData: shuffled, decoded with torchvision."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # A server without TLS is not among its settings.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset: Any = StreamingDataset(
        chunks, cache_dir=str(cache), shuffle=True, transform=_decoded, max_cache_size="25GB"
    )
    return iter(StreamingDataLoader(dataset, batch_size=BATCH_SIZE_IMAGES, num_workers=WORKERS))


def _decoded(sample: dict[str, bytes]) -> torch.Tensor:
    from torchvision.io import decode_image

    return decode_image(torch.frombuffer(bytearray(sample["image"]), dtype=torch.uint8))


if __name__ == "__main__":
    import litdata

    inputs = sorted(map(str, Path(sys.argv[1]).rglob("*.png")))
    litdata.optimize(fn=_file, inputs=inputs, output_dir=sys.argv[2], chunk_bytes=CHUNK_BYTES, num_workers=WORKERS)

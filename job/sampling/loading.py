"""A run's model for Python: `job.load("gs://my-bucket/runs/celeba").sample(16, seed=0)`."""

from __future__ import annotations

import re

import torch

from ddpm.model import Model
from job.config import method
from job.data.autoencoder import load_decoder
from job.exits import BadRequestError
from job.requests import SampleRequest
from job.runs.checkpoints import opened
from job.runs.layout import RUNS
from job.runs.readers import reading_chosen
from job.sampling.sampling_plan import plan_sampling


def load(
    run: str, *, epoch: int | None = None, weights: str | None = None, device: str | torch.device | None = None
) -> Model:
    """The model that a run has learnt, every byte of it verified. It draws as the run does, unless told otherwise.

    Image k is that of `ddpm sample` for seed k, with the same options.

    Args:
        run: its folder, such as `gs://my-bucket/runs/celeba` or `bucket/runs/celeba`.
        epoch: whose checkpoint; none: the newest.
        weights: `ema`, `ema-STD` or `model`; none: those that the run draws with.
        device: none: the first GPU, if there is one.

    Raises:
        BadRequestError: `run` is no run's folder, or a library is missing.
        MissingInputError: there is no such run, checkpoint or average; the message names those there are.
        BadDataError: the checkpoint is damaged.
    """
    uri = str(run).rstrip("/")
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
        raise BadRequestError(f"epoch={epoch!r}: use the number of an epoch, such as 80, or none for the newest")
    match = re.fullmatch(rf"(?:(.*)/)?{RUNS}/([^/]+)", uri)
    if match is None:
        raise BadRequestError(f"{uri!r} is no run's folder: name one such as gs://my-bucket/runs/celeba")
    chosen = {"weights": weights} if weights else {}
    checkpoints = "latest" if epoch is None else str(epoch)
    # A bucket may lie at the root of a disk.
    bucket = match[1] or ("/" if uri.startswith("/") else ".")
    plan = plan_sampling(SampleRequest(match[2], bucket, checkpoints, chosen=chosen).check())
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = plan.config.updated({"sample.weights": plan.sample.weights})
    decode = load_decoder(plan.bucket, plan.index, on)
    # Unlike on a GPU, bf16 is slower than fp32 on many processors.
    model = method.model_of(config, on, plan.precision if on.type == "cuda" else "fp32", decode, plan.classes)
    tensors = {plan.sample.weights: {name: each.detach() for name, each in model.network.named_parameters()}}
    with reading_chosen(plan.run, plan.choose) as ((ref,), _), opened(plan.run, ref, tuple(tensors)) as restored:
        restored.copy_into(tensors)
    return model

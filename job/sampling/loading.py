"""A run's model for Python: `job.load("gs://my-bucket/runs/celeba").sample(16, seed=0)`."""

from __future__ import annotations

import torch

from ddpm.model import Model
from job.config import method
from job.data.autoencoder import load_decoder
from job.exits import BadRequestError
from job.requests import SampleRequest
from job.runs.checkpoints import opened
from job.runs.drawings import moment_of
from job.runs.records import split_run
from job.runs.retention import reading_chosen
from job.sampling.sampling_plan import plan_sampling


def load(
    run: str, *, epoch: int | None = None, weights: str | None = None, device: str | torch.device | None = None
) -> Model:
    """Returns the model of a run, with every byte verified. It samples with the run's settings by default.

    Image k is that of `ddpm sample` for seed k, with the same options.

    Args:
        run: the run's folder, such as `gs://my-bucket/runs/celeba` or `bucket/runs/celeba`.
        epoch: the epoch of the checkpoint; None: the newest.
        weights: `ema`, `ema-STD` or `model`; None: those of the run's `sample.weights`.
        device: None: the first GPU, if there is one, else the CPU.

    Raises:
        BadRequestError: `run` is not the folder of a run, or a library is missing.
        MissingInputError: no such run, checkpoint or average; the message lists those that exist.
        BadDataError: the checkpoint is damaged.
    """
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
        raise BadRequestError(f"epoch={epoch!r}: use the number of an epoch, such as 80, or None for the newest")
    bucket, name = split_run(str(run))
    chosen = {"weights": weights} if weights else {}
    checkpoints = "latest" if epoch is None else str(epoch)
    plan = plan_sampling(SampleRequest(name, bucket=bucket, checkpoints=checkpoints, chosen=chosen).check())
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = plan.config.updated({"sample.weights": plan.sample.weights})
    decode = load_decoder(plan.bucket, plan.index, on)
    # On many processors bf16 is slower than fp32.
    model = method.model_of(config, on, plan.precision if on.type == "cuda" else "fp32", decode, plan.classes)
    tensors = {plan.sample.weights: {name: each.detach() for name, each in model.network.named_parameters()}}
    with reading_chosen(plan.run, plan.choose) as ((ref,), _), opened(plan.run, ref, into=tensors):
        pass
    model.source = f"{plan.run.uri}, {moment_of(plan.label(ref))}, weights {plan.sample.weights}"
    return model

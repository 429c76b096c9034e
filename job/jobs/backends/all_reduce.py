"""A sum over processes for the doctor, by NCCL on GPUs and by gloo without."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = timedelta(seconds=20)


def main() -> None:
    """Runs `python -m job.jobs.backends.all_reduce FILE WORLD_SIZE`, which fails if the sum is wrong."""
    meeting, world_size = sys.argv[1], int(sys.argv[2])
    # Forked, so that PyTorch is imported once; a CUDA context, which a fork would break, does not exist yet.
    torch.multiprocessing.start_processes(_sum, (meeting, world_size), nprocs=world_size, start_method="fork")


def _sum(rank: int, meeting: str, world_size: int) -> None:
    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    value = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(value)
    dist.destroy_process_group()
    if value.item() != world_size * (world_size + 1) / 2:
        raise RuntimeError(f"the sum over {world_size} processes is {value.item():g}")
    if rank == 0:
        print(f"{backend}, PyTorch {torch.__version__}, {torch.cuda.device_count()} GPUs")


if __name__ == "__main__":
    main()

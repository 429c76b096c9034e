"""For the doctor: one rank of a sum over processes, by NCCL on GPUs and by gloo without."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)


def main() -> None:
    """`python -m job.jobs.all_reduce FILE WORLD_SIZE RANK`: ends with 1 if the sum is wrong. They meet by the file."""
    meeting, world_size, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    value = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(value)
    dist.destroy_process_group()
    if rank == 0:
        print(f"{backend}, PyTorch {torch.__version__}, {torch.cuda.device_count()} GPUs")
    sys.exit(value.item() != world_size * (world_size + 1) / 2)


if __name__ == "__main__":
    main()

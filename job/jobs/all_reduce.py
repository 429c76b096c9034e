"""For the doctor: one rank of a sum over processes, by NCCL on GPUs and by gloo without."""

from __future__ import annotations

import sys
from datetime import timedelta

TIMEOUT_SECONDS = 20


def main() -> None:
    """`python -m job.jobs.all_reduce FILE RANK WORLD_SIZE`: ends with 1 if the sum is wrong. They meet by the file."""
    import torch
    import torch.distributed as dist

    meeting, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    value = torch.full((1,), float(rank + 1), device="cuda" if on_gpu else "cpu")
    dist.all_reduce(value)
    right = value.item() == world_size * (world_size + 1) / 2
    dist.destroy_process_group()
    if rank == 0:
        print(f"{backend}, PyTorch {torch.__version__}, {torch.cuda.device_count()} GPUs")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

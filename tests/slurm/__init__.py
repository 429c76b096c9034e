"""Jobs on a real Slurm, which `make test-slurm` runs."""

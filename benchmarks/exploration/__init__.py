"""Every interleaving that fits: the protocols of the job, run by a deterministic scheduler over a bucket in memory."""

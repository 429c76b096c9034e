"""Processes that share a run or long work: records with a hash, the lease, numbered pieces, the outcome of a job."""

"""Goodput: the share of the wall time that survives kills, ours beside the checkpoints of accelerate and torch."""

"""Proof by killing: a run that is killed at every point of its protocols ends like one that nobody disturbed."""

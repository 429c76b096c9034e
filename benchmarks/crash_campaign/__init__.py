"""The crash campaign: proves that a run killed at every point of its protocols ends like one without interruption."""

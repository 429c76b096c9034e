"""Scores of a run's samples against real images."""

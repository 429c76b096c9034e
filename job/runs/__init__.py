"""Runs: what lies in a run's folder, who may write there, and how long it stays."""

"""Imports of checkpoints, and exports for diffusers and the hub."""

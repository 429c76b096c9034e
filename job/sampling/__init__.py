"""Sampling from checkpoints: grids and GIFs for people, numbered images by the thousand."""

"""Runs before everything else in each process of `ddpm train`, whose PYTHONPATH begins with this folder."""

from benchmarks.goodput.trace import install

install()

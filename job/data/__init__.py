"""Datasets: packed from archives into verified shards, streamed back in one order that no machine changes."""

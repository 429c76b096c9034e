"""Datasets: packed from archives into verified shards, and streamed in an order that no number of machines changes."""

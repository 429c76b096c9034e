"""How good what a run draws is: scores of its checkpoints against real images."""

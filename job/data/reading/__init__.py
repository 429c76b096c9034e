"""Reading a dataset: `order` has that of a run's images and their batches, `cache` finds and decodes them."""

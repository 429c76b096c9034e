"""The science: schedules, networks, objectives, samplers. Knows tensors; knows nothing of buckets or command lines."""

"""The benchmarks behind all claims about speed: `make bench`, or `python -m benchmarks loader` for one part."""

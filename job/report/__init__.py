"""HTML pages of a run and of all runs in a bucket, each a single file that needs no network."""

"""What people look at: the page of a run, and the page of all runs in a bucket, each one file that needs no network."""

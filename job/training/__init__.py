"""One attempt at a run: it begins or resumes the run, and ends with everything in the bucket."""

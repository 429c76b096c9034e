"""The engines that run jobs: each renders a spec, and talks to its engine about it."""

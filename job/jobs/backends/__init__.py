"""The engines that run jobs: each module has the targets of one, renders a job, and talks to the engine about it."""
